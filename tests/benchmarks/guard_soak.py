"""The same overload on the real vLLM (CPU build) with the guard (RESERVE=all) and without it, side by side.

    M3QUANT_ENGINE_PYTHON=ENGINE/bin/python python -m tests.benchmarks.guard_soak --seconds 120 --with-and-without [--json FILE]

Figures are of a tiny model on whatever CPU runs this: counts mean something, seconds do not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from tests.support.engine.guarded_server import BLOCK, ENGINE_PYTHON, Server, os, serving
from tests.support.engine.overload import Load, Result, overload

BLOCKS, CONTEXT = 65, 1024  # 2,048 usable tokens: two requests of full length
PREEMPTIONS = "vllm:num_preemptions_total"


def run(guard: bool, load: Load, work: Path) -> dict[str, Any]:
    settings = {"RESERVE": "all", "QUEUE_TIMEOUT_S": "20", "WATCHDOG_S": "10"} if guard else {}
    env = {f"M3QUANT_GUARD_{name}": value for name, value in settings.items()}
    with serving(work, guard=guard, blocks=BLOCKS, max_model_len=CONTEXT, env=env) as server:
        result = asyncio.run(overload(server.port, load))
        return {**summary(result), **after(server, guard)}


def summary(result: Result) -> dict[str, Any]:
    done = [outcome for outcome in result.outcomes if outcome.kind == "success"]
    firsts = [outcome.first_byte_s for outcome in done if outcome.first_byte_s is not None]
    return {
        "requests": len(result.outcomes),
        "outcomes": result.counts(),
        "peak_tokens_asked": result.peak_asked_tokens,
        "demand_over_pool": round(result.peak_asked_tokens / (BLOCKS * BLOCK), 1),
        "seconds": round(result.seconds),
        "tokens_of_successes": sum(outcome.asked_tokens for outcome in done),
        "successes_cut_short": sum(outcome.short for outcome in done),
        "median_first_byte_s": round(median(firsts), 2) if firsts else None,
        "longest_success_s": round(max((outcome.seconds for outcome in done), default=0.0), 1),
    }


def after(server: Server, guard: bool) -> dict[str, Any]:
    """What the server says once all clients are gone: preemptions, and whether anything is still held."""
    settled = settle(server)
    health, _ = server.get("/health")
    found = {
        "preemptions": int(settled[PREEMPTIONS]),
        "engine_running": int(settled["vllm:num_requests_running"]),
        "engine_waiting": int(settled["vllm:num_requests_waiting"]),
        "health": health,
    }
    if guard:
        found["reserved_tokens"] = int(settled["m3quant_guard_reserved_tokens"])
        found["queued_tokens"] = int(settled["m3quant_guard_queued_tokens"])
    return found


def settle(server: Server, tries: int = 20) -> dict[str, float]:
    import time

    for _ in range(tries):
        metrics = server.metrics()
        if not metrics["vllm:num_requests_running"] and not metrics["vllm:num_requests_waiting"]:
            break
        time.sleep(0.5)
    return metrics


def versions() -> dict[str, str]:
    code = "import vllm,torch,sys;print(vllm.__version__,torch.__version__,sys.version.split()[0])"
    answer = subprocess.run([os.environ[ENGINE_PYTHON], "-c", code], capture_output=True, text=True, check=True)
    vllm, torch, python = answer.stdout.split()[-3:]
    return {"vllm": vllm, "torch": torch, "python": python, "machine": platform.machine(), "cpus": str(os.cpu_count())}


def table(runs: dict[str, dict[str, Any]]) -> str:
    rows = list(dict.fromkeys(key for run in runs.values() for key in run if key != "outcomes"))
    kinds = sorted({kind for run in runs.values() for kind in run["outcomes"]})
    lines = [["", *runs], ["---"] * (len(runs) + 1)]
    lines += [[f"ended as {kind}", *(str(run["outcomes"].get(kind, 0)) for run in runs.values())] for kind in kinds]
    lines += [[row.replace("_", " "), *(str(run.get(row, "-")) for run in runs.values())] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=Load.clients)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--with-and-without", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load = Load(clients=options.clients, seconds=options.seconds, seed=options.seed, patience_s=60)
    plans = {"with guard": (True, load)}
    if options.with_and_without:
        plans["without"] = (False, load)
    runs = {}
    with tempfile.TemporaryDirectory() as work:
        for name, (guard, plan) in plans.items():
            runs[name] = run(guard, plan, Path(work))
            print(f"{name}: {json.dumps(runs[name])}", file=sys.stderr)
    print(table(runs))
    if options.json:
        pool = {"blocks": BLOCKS, "block_size": BLOCK, "max_model_len": CONTEXT}
        record = {"pool": pool, "load": asdict(load), "versions": versions(), "runs": runs}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
