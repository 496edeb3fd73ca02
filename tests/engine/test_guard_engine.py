"""The guard in the real vLLM (CPU build): its words, an overload of ten times the KV cache, a stopped engine, and a drain.

One server for all tests, in the order of this file: the last one stops it. The same load for two minutes, next to a server without the
guard: tests/benchmarks/guard_soak.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.engine.guarded_server import ENGINE_PYTHON, Server, serving
from tests.support.engine.overload import Load, exchange, overload
from tests.support.engine.running import NEEDS_ENGINE

pytestmark = NEEDS_ENGINE
CONTEXT, POOL = 1024, 2048


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"VLLM_SERVER_DEV_MODE": "1", "M3QUANT_GUARD_QUEUE_TIMEOUT_S": "20", "M3QUANT_GUARD_WATCHDOG_S": "3"}
    env["M3QUANT_GUARD_RESERVE"] = "all"  # no preemption at all is what it promises
    arguments = ("--shutdown-timeout", "60", "--enable-auto-tool-choice", "--tool-call-parser", "minimax_m2")
    with serving(tmp_path_factory.mktemp("guarded"), guard=True, env=env, arguments=arguments) as found:
        yield found


def post(server: Server, path: str, body: Any = None) -> tuple[int, dict[str, str], bytes]:
    data = b"" if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}", data, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def test_the_pool_is_the_engines_own(server: Server) -> None:
    assert server.metrics()["m3quant_guard_pool_tokens"] == POOL
    assert "m3quant guard: 2048 of 2080 KV cache tokens to reserve in blocks of 32" in server.log.read_text()


VLLM_SAYS = """
import json
from vllm.renderers.params import TokenizeParams
from vllm.exceptions import VLLMValidationError
said = []
for output, tokens in ((5, 1025), (1025, 5)):
    try:
        TokenizeParams(max_total_tokens=1024, max_output_tokens=output, max_total_tokens_param="max_model_len",
                       max_output_tokens_param="max_tokens")._token_len_check(None, [0] * tokens)
    except VLLMValidationError as error:
        said.append([str(error).replace("at least ", ""), error.parameter])
print(json.dumps(said))
"""


def test_refusals_are_in_this_vllms_words(server: Server) -> None:
    answer = subprocess.run([os.environ[ENGINE_PYTHON], "-c", VLLM_SAYS], capture_output=True, text=True, check=True)
    expected = json.loads(answer.stdout.splitlines()[-1])
    assert len(expected) == 2
    for body, (message, param) in zip(
        [{"prompt": [5] * 1025, "max_tokens": 5}, {"prompt": [5] * 5, "max_tokens": 1025}], expected, strict=True
    ):
        status, _, said = post(server, "/v1/completions", body)
        error = {"message": message, "type": "BadRequestError", "param": param, "code": 400}
        assert (status, json.loads(said)) == (400, {"error": error})


def test_the_count_is_the_engines_count(server: Server) -> None:
    """What the guard counts before is what the engine's usage says after, chat template and tools included."""
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    bodies = [
        ("/v1/completions", {"prompt": "It is a truth universally acknowledged"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Good morning, sir"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Good morning"}], "tools": [tool]}),
    ]
    for path, body in bodies:
        status, _, answer = post(server, path, {**body, "max_tokens": 4})
        assert status == 200, answer
        prompt = json.loads(answer)["usage"]["prompt_tokens"]
        # The largest max_tokens that passes is the context less the prompt: one more is refused, naming the guard's count.
        status, _, answer = post(server, path, {**body, "max_tokens": CONTEXT - prompt + 1})
        assert status == 400 and f"your prompt contains {prompt} input tokens" in json.loads(answer)["error"]["message"]
    assert server.metrics()["m3quant_guard_counted_total"] >= 6


def test_a_burst_of_one_key_is_counted_by_the_tokenizer_and_so_is_what_comes_after(server: Server) -> None:
    """More at once than one key has places (half of 64), and as many that hang up meanwhile: a place lost is a wait of 20 s, and a bound by bytes."""
    short = {"prompt": "Good morning, sir", "max_tokens": 2}
    long = {"prompt": "universally acknowledged " * 2400, "max_tokens": 2}  # 60 kB, more tokens than the context: 400
    longer = {"prompt": "universally acknowledged " * 3200, "max_tokens": 2}  # 80 kB: counted one at a time
    bodies = [short] * 120 + [long] * 40 + [longer] * 8
    bounded = counted_by_bytes(server)
    assert asyncio.run(burst(server, bodies + bodies)) == {200: 240, 400: 96}
    asyncio.run(burst(server, bodies, hang_up_s=0.2))
    began = time.monotonic()
    assert asyncio.run(burst(server, [short, long, longer])) == {200: 1, 400: 2}
    assert time.monotonic() - began < 10 and counted_by_bytes(server) == bounded
    wait_for(server, lambda m: m["m3quant_guard_requests_in_flight"] == m["m3quant_guard_queued_tokens"] == 0)


def test_a_client_that_leaves_a_plain_answer_is_no_success(server: Server) -> None:
    before = outcomes(server)
    body = {"prompt": [5] * 4, "max_tokens": 1000, "ignore_eos": True}
    assert asyncio.run(burst(server, [body], hang_up_s=0.5)) == {0: 1}
    wait_for(server, lambda m: m["m3quant_guard_requests_in_flight"] == 0)
    assert outcomes(server) == before + Counter(disconnected=1)


def outcomes(server: Server) -> Counter[str]:
    found = re.findall(r'm3quant_guard_requests_total\{outcome="(\w+)"\} (\S+)', server.get("/metrics")[1])
    return Counter({outcome: int(float(count)) for outcome, count in found})


def counted_by_bytes(server: Server) -> float:
    found = re.search(r'm3quant_guard_counted_total\{method="bytes"\} (\S+)', server.get("/metrics")[1])
    return float(found[1]) if found else 0.0


async def burst(server: Server, bodies: list[dict[str, Any]], hang_up_s: float = 90) -> dict[int, int]:
    """All at once, as one key. How many were answered with each status."""

    async def one(body: dict[str, Any]) -> int:
        try:
            async with asyncio.timeout(hang_up_s):
                return (await exchange(server.port, "/v1/completions", body, []))[0]
        except TimeoutError:
            return 0

    return dict(Counter(await asyncio.gather(*map(one, bodies))))


def test_an_overload_of_ten_times_the_pool_ends_every_request_and_preempts_none(server: Server) -> None:
    load = Load(clients=70, seconds=30, patience_s=90)
    result = asyncio.run(overload(server.port, load))
    counts = result.counts()
    print(f"{counts}, at most {result.peak_asked_tokens} tokens asked for at once")
    assert result.peak_asked_tokens > 10 * POOL
    assert set(counts) <= {"success", "400", "429", "hung_up"} and {"success", "400", "429", "hung_up"} <= set(counts)
    assert not any(outcome.short for outcome in result.outcomes)  # no request got fewer tokens than asked for
    settled = wait_for(
        server, lambda m: m["m3quant_guard_reserved_tokens"] == 0 and m["vllm:num_requests_running"] == 0
    )
    assert settled["vllm:num_preemptions_total"] == 0
    assert settled["m3quant_guard_queued_tokens"] == 0 and settled["m3quant_guard_requests_in_flight"] == 0
    assert settled["vllm:num_requests_waiting"] == 0 and server.get("/health")[0] == 200


def wait_for(server: Server, condition: Any, tries: int = 40) -> dict[str, float]:
    for _ in range(tries):
        metrics = server.metrics()
        if condition(metrics):
            return metrics
        time.sleep(0.5)
    raise AssertionError(f"never so: { ({k: v for k, v in metrics.items() if 'guard' in k or 'num_requests' in k}) }")


def test_an_engine_that_stops_is_noticed_and_told(server: Server) -> None:
    """Paused by vLLM's own development route, the engine takes requests and runs none; its /health alone would stay 200."""
    assert post(server, "/pause?mode=keep")[0] == 200
    answers: list[int] = []
    body = {"prompt": "Mr. Bennet", "max_tokens": 4}
    caller = threading.Thread(target=lambda: answers.append(post(server, "/v1/completions", body)[0]))
    caller.start()
    try:
        wait_for(server, lambda m: m["m3quant_guard_healthy"] == 0)
        status, said = server.get("/health")
        assert status == 503 and json.loads(said)["status"] == "hanging" and json.loads(said)["requests_in_flight"] == 1
    finally:
        post(server, "/resume")
    caller.join(60)
    assert answers == [200]
    wait_for(server, lambda m: m["m3quant_guard_healthy"] == 1)
    assert server.get("/health")[0] == 200
    log = server.log.read_text()
    assert "m3quant guard: the engine hangs" in log and "Mr. Bennet" not in log


def test_sigterm_drains(server: Server) -> None:
    answers: list[tuple[int, bytes]] = []

    def long() -> None:
        status, _, answer = post(server, "/v1/completions", {"prompt": [5] * 4, "max_tokens": 600, "ignore_eos": True})
        answers.append((status, answer))

    caller = threading.Thread(target=long)
    caller.start()
    wait_for(server, lambda m: m["vllm:num_requests_running"] == 1)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    status, headers, _ = post(server, "/v1/completions", {"prompt": "late", "max_tokens": 1})
    assert status == 503 and int(headers["retry-after"]) > 0
    assert json.loads(server.get("/health")[1])["status"] == "draining"
    caller.join(60)
    assert answers[0][0] == 200 and json.loads(answers[0][1])["usage"]["completion_tokens"] == 600
    assert server.process.wait(60) == 0
