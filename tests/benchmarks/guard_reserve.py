"""What the guard costs under overload: plain vLLM, RESERVE=all and RESERVE=learned take the same load in turns, on vLLM's CPU build.

    M3QUANT_ENGINE_PYTHON=ENGINE/bin/python python -m tests.benchmarks.guard_reserve [--rounds 3] [--json FILE]

Tokens are those that the engine generated while the load lasted, from its own counters, after the first seconds. The servers are started together
and take turns, so that what else the machine does weighs on all: only ratios between arms mean something. A step of the engine is the same work in
every arm but for its batch, so tokens a step do not depend on the machine at all. A client that is refused comes back with another request, so where
requests are refused, small ones are served more often.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from tests.benchmarks.guard_soak import BLOCKS, CONTEXT, settle, versions
from tests.support.engine.guarded_server import BLOCK, Server
from tests.support.engine.overload import Load, Result, overload

ARMS: dict[str, dict[str, str] | None] = {
    "plain": None,
    "all": {"M3QUANT_GUARD_RESERVE": "all"},
    "learned": {"M3QUANT_GUARD_RESERVE": "learned"},
}
SHARED = {"M3QUANT_GUARD_QUEUE_TIMEOUT_S": "20", "M3QUANT_GUARD_WATCHDOG_S": "10"}
WARM_UP_S = 15.0
STEPS, WRITTEN = "vllm:iteration_tokens_total_count", "vllm:generation_tokens_total"
PREEMPTIONS, ENDED, USAGE = "vllm:num_preemptions_total", "vllm:request_success_total", "vllm:kv_cache_usage_perc"
CPU = "cpu seconds of the server"
RESERVED, MAXIMUM = "m3quant_guard_reserved_tokens", "m3quant_guard_maximum_tokens"


def cpu_seconds(group: int) -> float:
    """CPU time so far of the server's process group: API server, engine, workers."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()  # from the third on: state, parent, group, ...
            if int(fields[2]) == group:
                found += int(fields[11]) + int(fields[12])
    return found / os.sysconf("SC_CLK_TCK")


@dataclass
class Watch:
    """The server's metrics over time, by a thread that asks twice a second."""

    server: Server
    seen: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        began = time.monotonic()
        while not self.over.wait(0.5):
            metrics = {**self.server.metrics(), CPU: cpu_seconds(self.server.process.pid)}
            self.seen.append((time.monotonic() - began, metrics))

    def window(self, first_s: float, last_s: float) -> list[tuple[float, dict[str, float]]]:
        return [(at, metrics) for at, metrics in self.seen if first_s <= at <= last_s]


def start(arm: str, work: Path) -> Server:
    env = ARMS[arm]
    given = {} if env is None else {**SHARED, **env}
    return Server(work, guard=env is not None, blocks=BLOCKS, max_model_len=CONTEXT, env=given)


def run(server: Server, load: Load) -> dict[str, Any]:
    settle(server, tries=240)
    watch = Watch(server)
    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        result = asyncio.run(overload(server.port, load))
    finally:
        watch.over.set()
        thread.join()
    preempted = watch.seen[-1][1][PREEMPTIONS] - watch.seen[0][1][PREEMPTIONS]
    return {**measured(watch.window(WARM_UP_S, load.seconds)), **outcomes(result), "preemptions": int(preempted)}


def measured(window: list[tuple[float, dict[str, float]]]) -> dict[str, Any]:
    (began, first), (ended, last) = window[0], window[-1]
    tokens, steps = last[WRITTEN] - first[WRITTEN], last[STEPS] - first[STEPS]
    pool = (BLOCKS - 1) * BLOCK
    found = {
        "tokens_a_second": round(tokens / (ended - began), 1),
        "tokens_a_cpu_second": round(tokens / (last[CPU] - first[CPU]), 1),
        "tokens_a_step": round(tokens / steps, 3),
        "preempted_share": round((last[PREEMPTIONS] - first[PREEMPTIONS]) / max(1.0, last[ENDED] - first[ENDED]), 4),
        "mean_usage": round(mean(metrics[USAGE] for _, metrics in window), 3),
    }
    if MAXIMUM in last:
        found["mean_reserved_over_pool"] = round(mean(metrics[RESERVED] for _, metrics in window) / pool, 3)
        found["mean_maximum_over_pool"] = round(mean(metrics[MAXIMUM] for _, metrics in window) / pool, 3)
        found["forecasting_share"] = round(mean(metrics["m3quant_guard_forecasting"] for _, metrics in window), 3)
        # What ended a moment ago is still counted by the engine's last report, or no longer by the guard's.
        found["samples_in_use_above_maximum"] = sum(
            metrics[USAGE] * pool > metrics[MAXIMUM] + BLOCK * 4 for _, metrics in window
        )
    return found


def outcomes(result: Result) -> dict[str, Any]:
    done = [outcome for outcome in result.outcomes if outcome.kind == "success"]
    waits = sorted(outcome.first_byte_s for outcome in done if outcome.first_byte_s is not None and outcome.streamed)
    return {
        "outcomes": result.counts(),
        "demand_over_pool": round(result.peak_asked_tokens / (BLOCKS * BLOCK), 1),
        "unanswered": sum(outcome.kind in ("no_answer", "broken") for outcome in result.outcomes),
        "answers_cut_short": sum(outcome.short for outcome in done),
        "first_token_s_median": round(median(waits), 2),
        "first_token_s_p99": round(waits[int(0.99 * len(waits))], 2),
        "longest_refusal_s": round(max((o.seconds for o in result.outcomes if o.kind == "429"), default=0.0), 2),
    }


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Each arm against plain, round by round, so that what else the machine did weighs on both."""
    found: dict[str, Any] = {}
    for arm in runs:
        for name in ("tokens_a_second", "tokens_a_cpu_second", "tokens_a_step"):
            ratios = [one[name] / plain[name] for one, plain in zip(runs[arm], runs["plain"], strict=True)]
            found.setdefault(arm, {})[f"{name}_over_plain"] = {
                "median": round(median(ratios), 3),
                "each": [round(ratio, 3) for ratio in ratios],
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=75)
    parser.add_argument("--clients", type=int, default=70)
    parser.add_argument("--patience", type=float, default=120, help="seconds after which a client counts as unanswered")
    parser.add_argument(
        "--arms", default=",".join(ARMS), help="which arms, comma-separated; plain is needed to compare"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    arms = options.arms.split(",")
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    load = Load(clients=options.clients, seconds=options.seconds, patience_s=options.patience)
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as stack:
        servers = {arm: start(arm, Path(work)) for arm in arms}
        for server in servers.values():
            stack.callback(server.stop)
        for server in servers.values():
            server.wait_ready(1200)
        for number in range(options.rounds):
            load.seed = number
            for arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
                runs[arm].append(run(servers[arm], load))
                print(f"round {number}, {arm}: {json.dumps(runs[arm][-1])}", file=sys.stderr, flush=True)
    record: dict[str, Any] = {
        "command": f"python -m tests.benchmarks.guard_reserve --rounds {options.rounds} --seconds {options.seconds:g} --clients {options.clients} --patience {options.patience:g}",
        "pool": {"blocks": BLOCKS, "block_size": BLOCK, "max_model_len": CONTEXT},
        "load": {name: value for name, value in asdict(load).items() if name != "seed"},
        "versions": versions(),
        "runs": runs,
    }
    if "plain" in runs:
        record["compared"] = compare(runs)
        print(json.dumps(record["compared"], indent=1))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
