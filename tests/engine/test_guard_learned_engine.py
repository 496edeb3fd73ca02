"""RESERVE=learned in the real vLLM (CPU build): an overload ends every request, more runs than fits in full, and the most is never below what is used."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.engine.guarded_server import BLOCK, Server, serving
from tests.support.engine.overload import Load, overload
from tests.support.engine.running import NEEDS_ENGINE

pytestmark = NEEDS_ENGINE
POOL = 2048
RESERVED, MAXIMUM = "m3quant_guard_reserved_tokens", "m3quant_guard_maximum_tokens"
USAGE, PREEMPTIONS, ENDED = "vllm:kv_cache_usage_perc", "vllm:num_preemptions_total", "vllm:request_success_total"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"M3QUANT_GUARD_RESERVE": "learned", "M3QUANT_GUARD_QUEUE_TIMEOUT_S": "20"}
    with serving(tmp_path_factory.mktemp("learned"), guard=True, env=env) as found:
        yield found


def test_an_overload_with_learned_reservations(server: Server) -> None:
    seen: list[dict[str, float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.3):
            seen.append(server.metrics())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = asyncio.run(overload(server.port, Load(clients=40, seconds=25, patience_s=120)))
    finally:
        over.set()
        thread.join()
    counts = result.counts()
    print(f"{counts}, {seen[-1][PREEMPTIONS]:g} preemptions")
    assert {"success", "429"} <= set(counts) <= {"success", "400", "429", "hung_up"}
    assert not any(outcome.short for outcome in result.outcomes)
    busy = [metrics for metrics in seen if metrics["m3quant_guard_forecasting"]]
    assert busy and max(metrics[MAXIMUM] for metrics in busy) > POOL  # more than fits if all of it were used
    assert all(metrics[RESERVED] <= metrics[MAXIMUM] for metrics in seen)
    # The engine's gauge is that of its last step; what ended since then the guard no longer counts.
    above = [metrics for metrics in seen if metrics[USAGE] * POOL > metrics[MAXIMUM] + 4 * BLOCK]
    assert len(above) <= len(seen) // 20
    assert seen[-1][PREEMPTIONS] <= 0.1 * max(10.0, seen[-1][ENDED])
    for _ in range(40):
        settled = server.metrics()
        if not settled[MAXIMUM] and not settled["vllm:num_requests_running"]:
            break
        time.sleep(0.5)
    assert (settled[RESERVED], settled[MAXIMUM], settled["m3quant_guard_queued_tokens"]) == (0, 0, 0)
    assert server.get("/health")[0] == 200
