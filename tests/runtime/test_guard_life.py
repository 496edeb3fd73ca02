"""The guard around its requests: settings, start, drain, watchdog, metrics, and whole lives of requests in every order."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from m3quant.errors import GuardError
from m3quant.runtime.guard import Guard, GuardSettings, read_settings
from m3quant.runtime.guard.clamp import with_number
from m3quant.runtime.guard.pool import PoolReader, draft_slots
from m3quant.runtime.guard.watchdog import GAUGES, Watchdog
from tests.support.runtime.guard_app import Call, FakeEngine, ask, completion, make_guard, settle, start

COMPLETIONS = "/v1/completions"


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


# Settings


def test_settings_come_from_the_environment() -> None:
    found = read_settings(
        {"M3QUANT_GUARD_POOL_TOKENS": "4096", "M3QUANT_GUARD_OPEN_PATHS": "/health, /metrics", "PATH": "x"}
    )
    assert (found.pool_tokens, found.open_paths, found.oversize) == (4096, ("/health", "/metrics"), "refuse")
    assert read_settings({"M3QUANT_GUARD_QUEUE_TOKENS": ""}) == read_settings({})


@pytest.mark.parametrize(
    ("name", "value"),
    [("POOL_TOKENS", "many"), ("POOL_TOKENS", "0"), ("WATERMARK", "1"), ("RESERVE", "some"), ("WATERMARK", "nan"), ("OVERSIZE", "cut"), ("COUNT", "guess"),
     ("QUEUE_TIMEOUT_S", "-1"), ("QUEUE_TIMEOUT_S", "inf"), ("OPEN_PATHS", "health"), ("MAX_BODY_BYTES", "1.5"), ("QUEUE_TOKEN", "5")],
)  # fmt: skip
def test_a_wrong_setting_is_named_in_one_sentence(name: str, value: str) -> None:
    with pytest.raises(GuardError) as caught:
        read_settings({f"M3QUANT_GUARD_{name}": value})
    assert f"M3QUANT_GUARD_{name}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["", " ", ",", " , "])
def test_keys_that_came_out_empty_do_not_open_the_door(value: str) -> None:
    with pytest.raises(GuardError, match="API_KEYS is set and holds no key"):
        read_settings({"M3QUANT_GUARD_API_KEYS": value})


def test_keys_are_not_shown() -> None:
    found = read_settings({"M3QUANT_GUARD_API_KEYS": "hunter2,hunter3"})
    assert "hunter" not in repr(found) and "hunter" not in found.model_dump_json()


def test_the_check_before_an_engine_is_loaded() -> None:
    command = [sys.executable, "-m", "m3quant.runtime.guard"]
    good = subprocess.run(
        command, env={**os.environ, "M3QUANT_GUARD_WATERMARK": "0.05"}, capture_output=True, text=True
    )
    assert good.returncode == 0 and json.loads(good.stdout)["watermark"] == 0.05
    bad = subprocess.run(command, env={**os.environ, "M3QUANT_GUARD_WATERMARK": "2"}, capture_output=True, text=True)
    assert (
        bad.returncode == 2 and bad.stderr.startswith("M3QUANT_GUARD_WATERMARK='2': ") and "Traceback" not in bad.stderr
    )


def test_the_guard_imports_no_torch_vllm_or_transformers() -> None:
    code = (
        "import sys, m3quant.runtime.guard; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# Start: what the server is told through the lifespan protocol


async def startup(guard: Guard, state: Any = None) -> dict[str, Any]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if sent:
            await asyncio.sleep(60)
        return {"type": "lifespan.startup"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    task = asyncio.ensure_future(guard({"type": "lifespan", "app": SimpleNamespace(state=state)}, receive, send))
    for _ in range(100):
        await asyncio.sleep(0.001)
        if sent:
            break
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return sent[0]


async def ready(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()


def vllm_state(**changes: Any) -> SimpleNamespace:
    """The attributes of vLLM's app.state that the guard reads."""
    values = {
        "kv_cache_size_tokens": 1040,
        "block_size": 16,
        "max_model_len": 512,
        "servers": 1,
        "replicas": 1,
        "prefix": True,
        **changes,
    }
    cache = SimpleNamespace(
        kv_cache_size_tokens=values["kv_cache_size_tokens"],
        block_size=values["block_size"],
        enable_prefix_caching=values["prefix"],
    )
    model = SimpleNamespace(
        max_model_len=values["max_model_len"],
        generation_config="auto",
        override_generation_config=values.get("override", {}),
        get_diff_sampling_param=lambda: values.get("sampling", {}),
    )
    parallel = SimpleNamespace(
        _api_process_count=values["servers"],
        data_parallel_size=values["replicas"],
        pipeline_parallel_size=values.get("stages", 1),
    )
    speculative = SimpleNamespace(num_speculative_tokens=values["draft"]) if "draft" in values else None
    config = SimpleNamespace(
        cache_config=cache, model_config=model, parallel_config=parallel, speculative_config=speculative
    )
    return SimpleNamespace(vllm_config=config, args=SimpleNamespace(api_key=values.get("api_key")))


@pytest.mark.parametrize(
    ("changes", "own", "text"),
    [
        ({}, {}, None),
        ({"servers": 2}, {}, "2 API server processes share one KV cache"),
        ({"replicas": 4}, {}, "4 data-parallel engines"),
        ({"kv_cache_size_tokens": None}, {}, "set M3QUANT_GUARD_POOL_TOKENS."),
        ({"kv_cache_size_tokens": 16}, {}, "leaves nothing to serve from"),
        ({"prefix": False}, {"prefix_hits": "count"}, "needs vLLM's prefix caching"),
    ],
)
def test_start(changes: dict[str, Any], own: dict[str, Any], text: str | None) -> None:
    async def scenario() -> None:
        message = await startup(Guard(ready, GuardSettings(**own)), vllm_state(**changes))
        if text is None:
            assert message == {"type": "lifespan.startup.complete"}
        else:
            assert message["type"] == "lifespan.startup.failed" and text in message["message"]

    run(scenario())


def test_another_server_without_sizes_does_not_start() -> None:
    message = run(startup(Guard(ready, GuardSettings())))
    assert (
        "M3QUANT_GUARD_POOL_TOKENS and M3QUANT_GUARD_BLOCK_SIZE and M3QUANT_GUARD_MAX_MODEL_LEN" in message["message"]
    )


def test_a_wrong_environment_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3QUANT_GUARD_WATERMARK", "2")
    message = run(startup(Guard(ready), vllm_state()))
    assert message["type"] == "lifespan.startup.failed" and "M3QUANT_GUARD_WATERMARK" in message["message"]


def test_a_server_that_skips_the_lifespan_serves_nothing_unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        call = await ask(Guard(engine, GuardSettings()), COMPLETIONS, completion(1))
        assert call.status == 503 and "M3QUANT_GUARD_POOL_TOKENS" in call.json["error"]["message"] and not engine.bodies
        monkeypatch.setenv("M3QUANT_GUARD_WATERMARK", "2")
        call = await ask(Guard(engine), COMPLETIONS, completion(1))
        assert call.status == 503 and not engine.bodies

    run(scenario())


def test_the_pool_is_vllms_own_figure_and_is_read_again_for_every_request() -> None:
    state = vllm_state(draft=3, sampling={"max_tokens": 100}, override={"max_new_tokens": 100})
    pool = PoolReader(GuardSettings(watermark=0.1)).read({"app": SimpleNamespace(state=state)})
    assert (pool.tokens, pool.usable, pool.lookahead, pool.longest) == (
        1040,
        912,
        9,
        512,
    )  # (1040 - 16) x 0.9 in whole blocks
    assert (pool.default_output, pool.output_cap) == (100, 100)

    async def scenario() -> None:
        engine = FakeEngine()
        guard = Guard(engine, GuardSettings())
        state = vllm_state()
        scope = {"app": SimpleNamespace(state=state)}
        assert (await ask(guard, COMPLETIONS, completion(100), scope=scope)).status == 200
        state.vllm_config.cache_config.kv_cache_size_tokens = 64
        assert (await ask(guard, COMPLETIONS, completion(100), scope=scope)).status == 400

    run(scenario())


def test_slots_of_a_draft_are_reserved_with_the_tokens() -> None:
    """Speculative decoding writes ahead: a request that fills its last block takes one more."""

    async def scenario(**draft: int) -> int:
        engine = FakeEngine()
        guard = Guard(engine, GuardSettings())
        engine.go.clear()
        scope = {"app": SimpleNamespace(state=vllm_state(**draft))}
        body = {"prompt": list(range(12)), "max_tokens": 20}  # 32 tokens are two blocks of 16
        call = asyncio.create_task(ask(guard, COMPLETIONS, body, scope=scope))
        await settle()
        reserved = guard.admission.ledger.reserved
        engine.go.set()
        await call
        return reserved

    # Three slots a guessed token: of the step in flight, of the one planned behind it, and written ahead.
    assert [asyncio.run(scenario(draft=guesses)) for guesses in (0, 5, 6)] == [32, 48, 64]
    assert draft_slots(3, 1) == 9 and draft_slots(3, 2) == 13  # two steps in flight: 3 x 4, 3 + 1 ahead, less 3
    assert asyncio.run(scenario(draft=3, stages=2)) == 48 and asyncio.run(scenario(draft=4, stages=2)) == 64


def test_vllms_own_keys_are_asked_for_before_anything_is_counted() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = Guard(engine, GuardSettings())
        scope = {"app": SimpleNamespace(state=vllm_state(api_key=["s3cret"]))}
        assert (await ask(guard, COMPLETIONS, completion(1), scope=scope)).status == 401
        assert (
            await ask(guard, COMPLETIONS, completion(1), scope=scope, headers={"Authorization": "Bearer s3cret"})
        ).status == 200

    run(scenario())


def test_websockets_need_a_key() -> None:
    async def scenario() -> None:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
        await make_guard(FakeEngine(), api_keys="k")(scope, receive, send)
        assert sent == [{"type": "websocket.close", "code": 1008}]

    run(scenario())


# Watchdog and drain

STUCK = dict(zip(GAUGES, (2.0, 0.0, 0.0), strict=True))


@pytest.mark.parametrize("other", [(0.0, 0.0, 0.0), (2.0, 1.0, 0.5), (2.0, 0.0, 0.4)])
def test_the_watchdog_wants_the_whole_pattern_for_the_whole_time(other: tuple[float, float, float]) -> None:
    now = [0.0]
    watchdog = Watchdog(10, clock=lambda: now[0])
    watchdog.see(STUCK)
    now[0] = 9.9
    watchdog.see(STUCK)
    assert not watchdog.hanging
    now[0] = 10.0
    assert watchdog.hanging
    watchdog.see(dict(zip(GAUGES, other, strict=True)))
    assert not watchdog.hanging and watchdog.stalled_s == 0
    now[0] = 11.0
    watchdog.see(STUCK)
    now[0] = 20.0
    assert not watchdog.hanging  # counted from the start of this spell


def test_requests_without_an_answer_count_as_waiting_but_not_those_whose_client_reads_slowly() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, watchdog_s=5)
        now = [0.0]
        guard.health.watchdog.clock = lambda: now[0]
        idle = dict.fromkeys(GAUGES, 0.0)
        engine.go.clear()
        call = start(guard, COMPLETIONS, completion(5))
        await settle()
        guard.health.look(idle)
        now[0] = 6.0
        guard.health.look(idle)
        assert guard.health.watchdog.hanging
        health = await ask(
            guard, "/health", b"", method="GET"
        )  # meant: one request that the engine does not begin is enough
        assert (health.status, health.json["requests_unanswered"], health.json["requests_waiting"]) == (503, 1, 0)
        guard.health.look({})  # no gauges, no verdict
        assert not guard.health.watchdog.hanging
        engine.go.set()
        await call.task
        slow = start(guard, COMPLETIONS, completion(5), read_s=0.05)
        await settle()
        guard.health.look(idle)
        assert guard.health.watchdog.since is None
        await slow.task

    run(scenario())


def test_a_hang_fails_health_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        guard = make_guard(FakeEngine(), watchdog_s=5, api_keys="topsecret")
        now = [0.0]
        guard.health.watchdog.clock = lambda: now[0]
        for second in range(8):
            now[0] = float(second)
            guard.health.look(STUCK)
        health = await ask(guard, "/health", b"", method="GET")
        assert health.status == 503 and health.json["status"] == "hanging" and health.json["stalled_s"] == 7.0
        guard.health.look(dict.fromkeys(GAUGES, 0.0))
        assert (await ask(guard, "/health", b"", method="GET")).status == 200

    with caplog.at_level("WARNING"):
        run(scenario())
    logged = [record.getMessage() for record in caplog.records]
    assert (
        len(logged) == 2
        and "the engine hangs: 2 requests waiting, none running" in logged[0]
        and "moves again" in logged[1]
    )
    assert "capacity_tokens" in logged[0] and "topsecret" not in logged[0]


def test_gauges_that_cannot_be_read_once_do_not_end_the_watch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """prometheus_client raises where it meets a file in the middle of another process's write."""
    answers = iter([RuntimeError("Read beyond file size detected, file is corrupted."), OSError("gone")])

    def read(names: tuple[str, ...]) -> dict[str, float]:
        if (error := next(answers, None)) is not None:
            raise error
        return STUCK

    async def scenario() -> None:
        guard = make_guard(FakeEngine(), watchdog_s=0.001, watchdog_interval_s=0.001)
        monkeypatch.setattr("m3quant.runtime.guard.health.read_gauges", read)
        watching = asyncio.create_task(guard.health.watch())
        while not guard.health.watchdog.hanging and not watching.done():
            await asyncio.sleep(0.005)
        assert not watching.done()
        watching.cancel()

    run(asyncio.wait_for(scenario(), 30))
    assert "file is corrupted" in caplog.text and "gone" not in caplog.text  # logged once until it can be read again


def test_sigterm_lets_what_runs_finish_and_nothing_new_in() -> None:
    async def scenario() -> None:
        seen: list[int] = []
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, seen.append, 1)  # the server's own handling
        engine = FakeEngine()
        guard = make_guard(engine, watchdog_interval_s=0.01)
        guard._chain_signals()
        watch = asyncio.ensure_future(guard.health.watch())
        engine.go.clear()
        running = [start(guard, COMPLETIONS, completion(200, 56)) for _ in range(4)]
        await settle()
        waiting = start(guard, COMPLETIONS, completion(200, 56))
        await settle()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        assert seen == [1]
        assert waiting.status == 503 and int(waiting.headers["retry-after"]) > 0
        late = await ask(guard, COMPLETIONS, completion(1))
        assert late.status == 503 and "retry-after" in late.headers
        assert (await ask(guard, "/health", b"", method="GET")).json["status"] == "draining"
        engine.go.set()
        await asyncio.gather(*(call.task for call in running))
        assert [call.status for call in running] == [200] * 4 and guard.admission.ledger.reserved == 0
        watch.cancel()

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run(scenario())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_metrics_stand_beside_the_servers() -> None:
    from prometheus_client import REGISTRY, generate_latest

    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine)
        engine.go.clear()
        call = start(guard, COMPLETIONS, completion(200, 56))
        await settle()
        metrics = start(guard, "/metrics", b"", method="GET")
        await settle()
        shown = generate_latest(REGISTRY).decode()
        assert "m3quant_guard_reserved_tokens 256.0" in shown and "m3quant_guard_pool_tokens 1024.0" in shown
        engine.go.set()
        await asyncio.gather(call.task, metrics.task)
        await ask(guard, COMPLETIONS, completion(600))
        shown = generate_latest(REGISTRY).decode()
        assert 'm3quant_guard_requests_total{outcome="success"}' in shown
        assert 'm3quant_guard_requests_total{outcome="never_fits"}' in shown

    run(scenario())


def test_metrics_in_multiprocess_mode(tmp_path: Any) -> None:
    """vLLM sets PROMETHEUS_MULTIPROC_DIR for several API servers; values then live in files."""
    code = """
import os
from m3quant.runtime.guard.metrics import current_registry, metrics, read_gauges
from prometheus_client import generate_latest
metrics().reserved.set(48)
print(generate_latest(current_registry()).decode(), read_gauges(("m3quant_guard_reserved_tokens",)))
"""
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert "m3quant_guard_reserved_tokens 48.0" in shown and "{'m3quant_guard_reserved_tokens': 48.0}" in shown


# Clamping changes one member

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(
    before=st.dictionaries(st.text(max_size=5), JSON, max_size=4),
    after=st.dictionaries(st.text(max_size=5), JSON, max_size=4),
    old=st.none() | JSON,
    spaced=st.booleans(),
    ascii_only=st.booleans(),
)
def test_setting_a_number_changes_that_member_only(
    before: Any, after: Any, old: Any, spaced: bool, ascii_only: bool
) -> None:
    body = {**before, **({} if old is None else {"max_tokens": old}), **after}
    text = json.dumps(body, indent=2 if spaced else None, ensure_ascii=ascii_only)
    changed = with_number(text.encode(), "max_tokens", 17)
    assert json.loads(changed) == {**body, "max_tokens": 17}
    assert len(changed) - len(text.encode()) <= len('"max_tokens":17,')


def test_duplicates_are_all_set() -> None:
    assert with_number(b'{"max_tokens":1, "a":{"max_tokens":5}, "max_tokens":2}', "max_tokens", 9) == (
        b'{"max_tokens":9, "a":{"max_tokens":5}, "max_tokens":9}'
    )
    assert with_number(b"{ }", "n", 9) == b'{"n":9 }'


# Whole lives of requests, in every order


class GuardMachine(RuleBasedStateMachine):
    """Requests arrive, stream, end, fail, hang up and are cancelled, before and after they were admitted."""

    calls: Bundle = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.inside: dict[int, asyncio.Future[str]] = {}
        self.all: list[tuple[int, Call]] = []
        self.guard = make_guard(
            self.app, queue_tokens=512, pool_tokens=528, queue_timeout_s=60, count="bytes", template_tokens=0
        )

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        number = json.loads((await receive())["body"])["number"]
        until = self.inside[number] = self.loop.create_future()
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({until, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not until.done():
                return
            if until.result() == "fail":
                raise RuntimeError("engine died")
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"token", "more_body": True})
            if until.result() == "fail late":
                raise RuntimeError("engine died")
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            del self.inside[number]

    def turn(self) -> None:
        self.loop.run_until_complete(settle(12))

    @rule(target=calls, tokens=st.integers(1, 500), key=st.sampled_from("ab"))
    def arrive(self, tokens: int, key: str) -> tuple[int, Call]:
        number = len(self.all)

        async def begin() -> Call:
            body = {"prompt": [1] * tokens, "max_tokens": 12, "number": number}
            return start(self.guard, COMPLETIONS, body, headers={"Authorization": f"Bearer {key}"})

        call = self.loop.run_until_complete(begin())
        self.all.append((number, call))
        self.turn()
        return number, call

    @rule(which=consumes(calls), how=st.sampled_from(["end", "fail", "fail late"]))
    def end(self, which: tuple[int, Call], how: str) -> None:
        until = self.inside.get(which[0])
        if until is not None and not until.done():
            until.set_result(how)
        self.turn()

    @rule(which=calls)
    def hang_up(self, which: tuple[int, Call]) -> None:
        which[1].hang_up()
        self.turn()

    @rule(which=calls)
    def cancel(self, which: tuple[int, Call]) -> None:
        assert which[1].task is not None
        which[1].task.cancel()
        self.turn()

    @rule(first=calls, second=calls)
    def end_and_hang_up_at_once(self, first: tuple[int, Call], second: tuple[int, Call]) -> None:
        """One request's end admits another in the very turn in which that one hangs up."""
        until = self.inside.get(first[0])
        if until is not None and not until.done():
            until.set_result("end")
        second[1].hang_up()
        self.turn()

    @invariant()
    def what_is_inside_is_what_is_reserved(self) -> None:
        ledger = self.guard.admission.ledger
        assert ledger.admitted == len(self.inside)
        assert ledger.reserved <= 512 and (ledger.reserved > 0) == bool(self.inside)
        assert ledger.waiting == len(self.guard.admission._waiters)
        assert self.inside or not ledger.waiting

    def teardown(self) -> None:
        while self.inside:
            for until in self.inside.values():
                if not until.done():
                    until.set_result("end")
            self.turn()
        ledger = self.guard.admission.ledger
        assert (ledger.reserved, ledger.admitted, ledger.queued, ledger.waiting) == (0, 0, 0, 0)
        for _, call in self.all:
            assert call.task is not None and call.task.done()
            assert call.status in (0, 200, 400, 429)
        self.loop.close()


TestGuard = GuardMachine.TestCase
TestGuard.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
