"""Kills conversions with SIGKILL at chosen durable operations, continues them, and compares the results.

Run as a script by test_kill.py and test_disk_full.py. One process imports torch once and forks a child for every run, so
that a kill point costs a fraction of a second:

    python -m tests.support.convert.kill_driver SOURCE FOLDER RECIPE STRIDE

prints one JSON object. A durable operation is any call that changes what a disk holds; a write is torn, half of its
bytes reach the file before the process dies. STRIDE n takes every n-th plain write and every operation of other kinds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from m3quant.planning.plan import Plan
from m3quant.reports import pages
from tests.support.convert.common import files, make_plan_of, quickly_calibrated, run_plan, same_output

WRITES = ("write", "pwritev")
OTHERS = (
    "fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "truncate", "ftruncate", "posix_fallocate",
)  # fmt: skip


class Counter:
    """Counts durable operations from the moment `install` patches them into os, and acts at one of them."""

    def __init__(self, act_at: int, act: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]) -> None:
        self.names: list[str] = []
        self.act_at, self.act = act_at, act
        self._lock = threading.Lock()

    def install(self) -> None:
        for name in (*WRITES, *OTHERS):
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.names.append(name)
                chosen = len(self.names) == self.act_at
            if chosen:
                return self.act(name, call, args)
            return call(*args, **kwargs)

        return counted


def die(name: str, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Do half of a write, nothing of anything else, and be gone."""
    if name == "write":
        call(args[0], memoryview(args[1])[: len(args[1]) // 2])
    elif name == "pwritev":
        call(args[0], [memoryview(args[1][0])[: len(args[1][0]) // 2]], args[2])
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], Any]) -> int:
    """Exit status of `work` in a forked child: 0, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            # torch replaces the pool that a fork broke when it is next asked for, and not thread-safely: ask here, once
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def import_for_children(plan: Plan, folder: Path) -> None:
    """Import here, once, what a run would else import in every child, and compile the report's template; the run itself must not start
    torch's threads here."""
    listed = folder / "modules.json"

    def work() -> None:
        run_plan(plan, folder / "warm")
        listed.write_text(json.dumps(sorted(sys.modules)))

    in_child(work)
    for name in json.loads(listed.read_text()):
        if name.startswith(("m3quant", "torch", "transformers", "numpy")) and name not in sys.modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    pages._templates().get_template("page.html.jinja")


def operations(plan: Plan, folder: Path) -> list[str]:
    """Names of the durable operations of one undisturbed run, whose output stays in `folder`/whole."""
    listed = folder / "operations.json"

    def work() -> None:
        counter = Counter(0, die)
        counter.install()
        run_plan(plan, folder / "whole")
        names = list(counter.names)
        listed.write_text(json.dumps(names))

    if in_child(work):
        raise SystemExit("the undisturbed run failed")
    names: list[str] = json.loads(listed.read_text())
    return names


def kill_points(names: Sequence[str], stride: int) -> list[int]:
    """1-based operations to die at: every `stride`-th write, and all others."""
    writes = 0
    chosen = []
    for number, name in enumerate(names, start=1):
        if name == "write":
            writes += 1
            if writes % stride:
                continue
        chosen.append(number)
    return chosen


def weights_and_config(output: Path) -> dict[str, bytes]:
    """The files a loader reads, those that hold times left out; no temporary ones."""
    return files(output, but=(".", "m3quant.json", "m3quant-report/", "eval.json"))


def half_files(output: Path, whole: dict[str, bytes]) -> list[str]:
    """Files under a final name that are not what the undisturbed run wrote, or a config.json before everything else."""
    found = weights_and_config(output)
    wrong = [name for name, data in found.items() if data != whole.get(name)]
    if "config.json" in found and found.keys() != whole.keys():
        wrong.append("config.json before the rest")
    return wrong


def kill_everywhere(plan: Plan, folder: Path, stride: int) -> dict[str, Any]:
    """Die at every chosen point, continue with the plain call, and compare with the undisturbed run."""
    names = operations(plan, folder)
    whole = weights_and_config(folder / "whole")
    output = folder / "killed"
    points = kill_points(names, stride)
    failures = []
    for point in points:
        shutil.rmtree(output, ignore_errors=True)

        def killed(point: int = point) -> None:
            Counter(point, die).install()
            run_plan(plan, output)

        status = in_child(killed)
        wrong = half_files(output, whole) if output.exists() else []
        resumed = in_child(lambda: run_plan(plan, output))
        differing = same_output(folder / "whole", output) if resumed == 0 else ["did not continue"]
        if status != -signal.SIGKILL or wrong or differing:
            failures.append({"point": point, "operation": names[point - 1], "status": status, "half": wrong, "differing": differing})  # fmt: skip
    return {"operations": len(names), "points": len(points), "kinds": sorted(set(names)), "failures": failures}


def kill_again_and_again(plan: Plan, folder: Path, step: int) -> dict[str, Any]:
    """One output, its run killed each time a little later than the last, until it is done."""
    output = folder / "again"
    shutil.rmtree(output, ignore_errors=True)
    kills = 0
    while True:

        def killed(at: int = (kills + 1) * step) -> None:
            Counter(at, die).install()
            run_plan(plan, output)

        status = in_child(killed)
        if status == 0:
            return {"kills": kills, "differing": same_output(folder / "whole", output)}
        if status != -signal.SIGKILL:
            return {"kills": kills, "differing": [f"ended with {status}"]}
        kills += 1


def main() -> None:
    source, folder, recipe, stride = sys.argv[1:]
    torch.set_num_threads(1)  # and no thread pool is started before a fork
    plan = make_plan_of(Path(source), recipe, **quickly_calibrated(recipe))
    import_for_children(plan, Path(folder))
    result = kill_everywhere(plan, Path(folder), int(stride))
    result["again"] = kill_again_and_again(plan, Path(folder), 17)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
