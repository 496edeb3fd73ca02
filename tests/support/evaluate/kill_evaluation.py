"""Kills an evaluation with SIGKILL at durable operations, continues it, and compares the figures. Run as a script by test_pass.py:

    python -m tests.support.evaluate.kill_evaluation CHECKPOINT SOURCE FOLDER host|disk STRIDE

One process imports torch and transformers and forks a child for every run. Prints {"operations", "points", "differing", "again"}; a write that
is killed is torn, half of its bytes reach the file.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

# Imported here, once, and not in every child; the first evaluation in this process would start torch's threads.
from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl, modeling_minimax_m3_vl  # noqa: F401

from tests.support.evaluate.measuring import Plain, run, sequence

NAMES = ("write", "pwritev", "fsync", "unlink", "replace", "rename", "posix_fallocate", "ftruncate", "mkdir")


def install(act_at: int) -> list[str]:
    """Count durable operations in this process from now on; at the act_at-th, die."""
    seen: list[str] = []

    def counted(name: str, call: Any) -> Any:
        def one(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == act_at:
                if name == "write":
                    call(args[0], memoryview(args[1])[: len(args[1]) // 2])
                elif name == "pwritev":
                    call(args[0], [memoryview(args[1][0])[: len(args[1][0]) // 2]], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return one

    for name in NAMES:
        setattr(os, name, counted(name, getattr(os, name)))
    return seen


def child(folder: Path, act_at: int) -> int:
    """One evaluation in a fork; its exit status, and how many operations it did in folder.count."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            seen = install(act_at)
            task = Plain([sequence(40), sequence(300, [299]), sequence(40, seed=1)], noise=[1])
            run(Path(sys.argv[1]), Path(sys.argv[2]), [task], folder, states=sys.argv[4], batch_tokens=120)
            count = len(seen)
            folder.with_suffix(".count").write_text(str(count))
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def figures(folder: Path) -> Any:
    """What eval.json measured, and what else is in the folder (nothing)."""
    record = json.loads((folder / "eval.json").read_text())
    return [r["metrics"] for r in record["results"]], record["layers"], sorted(p.name for p in folder.iterdir())


def main() -> None:
    work, stride = Path(sys.argv[3]), int(sys.argv[5])
    if child(work / "whole", 0):
        raise SystemExit("the undisturbed run failed")
    expected = figures(work / "whole")
    operations = int((work / "whole.count").read_text())
    # Cleaning up at the end is where half a journal could mislead the next run: all of it.
    points = sorted({*range(1, operations + 1, stride), *range(operations - 4, operations + 1)})
    differing = []
    for at in points:
        folder = work / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        died = child(folder, at)
        if died != -signal.SIGKILL or child(folder, 0) or figures(folder) != expected:
            differing.append(at)
    # One folder, killed a little later each time until a run gets through.
    folder, kills = work / "again", 0
    while child(folder, 8 + 6 * kills) == -signal.SIGKILL:
        kills += 1
    same = figures(folder) == expected
    print(json.dumps({"operations": operations, "points": len(points), "differing": differing, "again": [kills, same]}))


if __name__ == "__main__":
    main()
