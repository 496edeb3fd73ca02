"""What a conversion is compared with: which program of llm-compressor, whether it can run at all, and one run of it.

A run may be given a limit. One that is stopped leaves how far it had got (peer_llmcompressor.write_progress), which bounds
its time from below.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from statistics import median
from typing import Any

from tests.support.paths import ROOT

DATA_FREE, AWQ = "tests.benchmarks.peer_llmcompressor", "tests.benchmarks.peer_awq"
WORKERS = min(8, os.cpu_count() or 1)
GRACE = 10  # seconds between asking a run to stop and killing it
TAIL = 2000  # characters of a failed run's error output


def refusal(calibration: str, device: str) -> str | None:
    """Why llm-compressor cannot be measured on this, in one sentence, or None."""
    if calibration == "none":
        return None
    if calibration != "awq":
        return f"no llm-compressor run is written for calibration '{calibration}': leave --against away."
    if device not in ("cpu", "cuda", "cuda:0"):
        return f"llm-compressor's AWQ takes the first GPU that it sees, not {device}: set CUDA_VISIBLE_DEVICES and use --device cuda."
    return None


def command(python: str, calibration: str, paths: list[Path], device: str, calibration_shape: list[int]) -> list[str]:
    """The peer's command line for `paths` (source, output, answer): round to nearest, or AWQ on [windows, length, batch]."""
    module, rest = (DATA_FREE, [WORKERS]) if calibration == "none" else (AWQ, calibration_shape)
    return [python, "-m", module, *map(str, paths), device, *map(str, rest)]


def run(arguments: list[str], answer: Path, limit: float | None = None) -> dict[str, Any]:
    """The answer that the command writes; `failed` with its last words; or `stopped` with what it had got to by `limit` s.

    `stopped` is the counted part of its seconds, without imports: 0 for a run that was not past them.
    """
    progress = answer.with_suffix(".progress.json")
    progress.unlink(missing_ok=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    try:
        _, words = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        now, seconds = time.time(), time.perf_counter() - started
        reached = json.loads(progress.read_text()) if progress.exists() else {}
        _end(process)
        counted = now - reached["started"] if reached else 0.0
        return {"stopped": counted, "limit": limit, "progress": reached, "process_seconds": seconds}
    except BaseException:
        _end(process)
        raise
    seconds = time.perf_counter() - started
    if process.returncode:
        return {"failed": words[-TAIL:], "process_seconds": seconds}
    result: dict[str, Any] = json.loads(answer.read_text())
    return {**result, "process_seconds": seconds}


def _end(process: subprocess.Popen[str]) -> None:
    """Stop the process and what it started; kill what has not ended within GRACE seconds."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def outcome(row: dict[str, Any]) -> str:
    """One run in a line: its seconds and their parts, where it was stopped, or why it failed."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    if "stopped" in row:
        return f"stopped after {row['process_seconds']:.0f} s, {_where(row['progress'])}"
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in row.get("split", {}).items())
    if not parts:
        return f"{row['seconds']:.2f} s"
    return (
        f"{row['seconds']:.2f} s: {parts} ({row['mappings']} mappings, {row['packed']} INT4 tensors, "
        f"{row['batch']} windows a batch, activations kept on {row['cache']})"
    )


def _where(reached: dict[str, Any]) -> str:
    if not reached:
        return "before its imports were done"
    stage = f"in {reached['stage']}"
    return f"at mapping {reached['mapping']} of {reached['mappings']} ({stage})" if "mapping" in reached else stage


def ratio(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> str | None:
    """Our speed in the peer's by the medians; a stopped run counts with the seconds that it had, so "more than"."""
    mine = [row["seconds"] for row in ours if "seconds" in row]
    theirs = [row.get("seconds", row.get("stopped")) for row in others if "failed" not in row]
    if not mine or not theirs:
        return None
    bound = "more than " if any("stopped" in row for row in others) else ""
    return f"{bound}{median(theirs) / median(mine):.2f} times as fast as the peer"
