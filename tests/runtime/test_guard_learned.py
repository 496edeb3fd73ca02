"""RESERVE=learned through the whole guard: what answers teach, what the gauges allow, and what the metrics say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from m3quant.runtime.guard.lengths import AT_RISK
from m3quant.runtime.guard.metrics import metrics
from m3quant.runtime.guard.referee import HEARD
from tests.support.runtime.guard_app import FakeEngine, ask, completion, make_guard, settle, start

COMPLETIONS = "/v1/completions"
SHORT = [b'data: {"choices": [{"text": "a"}]}\n\n'] * 5 + [b"data: [DONE]\n\n"]


class Gauges:
    """The engine's gauges, which move with every look while `alive`."""

    def __init__(self) -> None:
        self.alive = True
        self.values: dict[str, float] = dict.fromkeys(HEARD, 0.0)
        self.values |= {"vllm:kv_cache_usage_perc": 0.1, "vllm:num_requests_running": 1.0}

    def read(self, names: tuple[str, ...]) -> dict[str, float]:
        if not self.alive:
            raise RuntimeError("Read beyond file size detected, file is corrupted.")
        self.values["vllm:generation_tokens_total"] += 0.01  # slowly, so that answers grow by what they send
        return dict(self.values)


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> Gauges:
    found = Gauges()
    monkeypatch.setattr("m3quant.runtime.guard.middleware.read_gauges", found.read)
    monkeypatch.setattr("m3quant.runtime.guard.outlook.FRESH_S", 0.0)
    return found


def learned(engine: FakeEngine, **more: Any) -> Any:
    return make_guard(engine, reserve="learned", **more)


async def teach(guard: Any, answers: int = 2 * AT_RISK, **request: Any) -> None:
    for _ in range(answers):
        assert (await ask(guard, COMPLETIONS, completion(4, 200, **request))).status == 200


async def at_once(guard: Any, engine: FakeEngine, count: int, **request: Any) -> int:
    """How many of the requests for 304 tokens each run together; three fit in full."""
    engine.go.clear()
    calls = [start(guard, COMPLETIONS, completion(100, 200, **request)) for _ in range(count)]
    await settle(100)
    running = engine.running
    assert guard.admission.ledger.reserved == running * 304
    engine.go.set()
    await asyncio.gather(*(call.task for call in calls if call.task is not None))
    assert {call.status for call in calls} == {200} and guard.admission.ledger.reserved == 0
    return running


def go(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_short_answers_make_room_for_more(gauges: Gauges) -> None:
    async def scenario() -> None:
        engine = FakeEngine(SHORT)
        guard = learned(engine)
        assert await at_once(guard, engine, 8) == 3
        await teach(guard)
        assert await at_once(guard, engine, 8) == 8
        assert await at_once(learned(engine), engine, 8) == 3  # another process knows nothing

    go(scenario)


def test_a_class_learns_from_its_own_route_key_and_model(gauges: Gauges) -> None:
    async def scenario() -> None:
        engine = FakeEngine(SHORT)
        guard = learned(engine, api_keys="one,two")

        async def of(key: str, model: str) -> int:
            engine.go.clear()
            body, head = completion(100, 200, model=model), {"authorization": f"Bearer {key}"}
            calls = [start(guard, COMPLETIONS, body, headers=head) for _ in range(8)]
            await settle(100)
            running = engine.running
            engine.go.set()
            await asyncio.gather(*(call.task for call in calls if call.task is not None))
            return running

        for _ in range(2 * AT_RISK):
            head = {"authorization": "Bearer one"}
            await ask(guard, COMPLETIONS, completion(4, 200, model="m"), headers=head)
        assert await of("one", "other") == 3 and await of("two", "m") == 3
        assert await of("one", "m") == 8

    go(scenario)


def test_keys_that_nobody_verified_share_a_class(gauges: Gauges) -> None:
    async def scenario() -> None:
        guard = learned(FakeEngine(SHORT))
        for number in range(200):
            head = {"authorization": f"Bearer made up {number}"}
            await ask(guard, COMPLETIONS, completion(4, 200), headers=head)
        assert len(guard.outlook.table.classes) == 1

    go(scenario)


def test_models_that_the_engine_refuses_teach_nothing(gauges: Gauges) -> None:
    async def scenario() -> None:
        engine = FakeEngine(SHORT)
        guard = learned(engine)
        assert (await ask(guard, COMPLETIONS, completion(4, 200, model="unknown"))).status == 404
        engine.fail = RuntimeError("broken")
        await ask(guard, COMPLETIONS, completion(4, 200, model="other"))
        assert not guard.outlook.table.classes

    go(scenario)


@pytest.mark.parametrize("request_more", [{"n": 2}, {"prompt": ["a b", "c d"]}])
def test_several_sequences_are_reserved_in_full(gauges: Gauges, request_more: dict[str, Any]) -> None:
    async def scenario() -> None:
        engine = FakeEngine(SHORT)
        guard = learned(engine)
        await teach(guard)
        engine.go.clear()
        calls = [start(guard, COMPLETIONS, {**completion(2, 240), **request_more}) for _ in range(4)]
        await settle(100)
        assert engine.running == 2  # of 512 tokens each
        engine.go.set()
        await asyncio.gather(*(call.task for call in calls if call.task is not None))

    go(scenario)


def test_without_gauges_all_is_reserved_as_ever(gauges: Gauges) -> None:
    async def scenario() -> None:
        engine = FakeEngine(SHORT)
        guard = learned(engine)
        await teach(guard)
        gauges.alive = False
        assert await at_once(guard, engine, 8) == 3
        gauges.alive = True
        assert await at_once(guard, engine, 8) == 8

    go(scenario)


def test_a_full_cache_is_believed_before_any_forecast(gauges: Gauges) -> None:
    async def scenario() -> None:
        engine = FakeEngine(SHORT)
        guard = learned(engine)
        await teach(guard)
        gauges.values["vllm:kv_cache_usage_perc"] = 0.99
        assert await at_once(guard, engine, 8) == 3
        gauges.values["vllm:kv_cache_usage_perc"] = 0.7
        assert await at_once(guard, engine, 8) == 8

    go(scenario)


def test_a_waiting_request_starts_when_the_gauges_come_back(gauges: Gauges) -> None:
    async def scenario() -> None:
        engine = FakeEngine(SHORT)
        guard = learned(engine, watchdog_interval_s=0.01)
        await teach(guard)
        gauges.alive = False
        watch = asyncio.ensure_future(guard.health.watch())
        engine.go.clear()
        calls = [start(guard, COMPLETIONS, completion(100, 200)) for _ in range(6)]
        await settle(100)
        assert engine.running == 3
        gauges.alive = True
        await asyncio.sleep(0.2)
        assert engine.running == 6  # although none has ended
        engine.go.set()
        await asyncio.gather(*(call.task for call in calls if call.task is not None))
        watch.cancel()

    go(scenario)


def test_the_metrics_and_health_say_what_is_promised_and_what_may_be_used(gauges: Gauges) -> None:
    async def scenario() -> None:
        engine = FakeEngine(SHORT)
        guard = learned(engine)
        await teach(guard)
        engine.go.clear()
        calls = [start(guard, COMPLETIONS, completion(100, 200)) for _ in range(8)]
        await settle(100)
        guard.health.show()
        found = {name: getattr(metrics(), name)._value.get() for name in ("reserved", "maximum", "forecasting", "pool")}
        assert found["maximum"] == 8 * 304 > found["pool"] == 1024 > found["reserved"] >= 8 * 104
        assert found["forecasting"] == 1
        state = guard.state()
        assert state["maximum_tokens"] == 8 * 304 and state["forecasting"] is True
        gauges.alive = False
        guard.health.show()
        assert metrics().reserved._value.get() == 8 * 304 and metrics().forecasting._value.get() == 0
        engine.go.set()
        await asyncio.gather(*(call.task for call in calls if call.task is not None))

    go(scenario)


@pytest.mark.parametrize(("heard", "warned"), [(HEARD, False), (HEARD[:-1], True)])
def test_a_server_without_the_gauges_is_told_at_its_start(
    heard: tuple[str, ...], warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("m3quant.runtime.guard.health.read_gauges", lambda names: dict.fromkeys(heard, 0.0))

    async def started(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})

    async def message(*_: Any) -> dict[str, str]:
        return {"type": "lifespan.startup"}

    guard = make_guard(started, reserve="learned")
    guard._chain_signals = lambda: None  # type: ignore[method-assign]  # the signals of this process belong to pytest
    asyncio.run(guard({"type": "lifespan"}, message, message))
    assert ("RESERVE=learned needs the engine's gauges" in caplog.text) is warned


def test_a_plain_answer_to_a_client_that_left_is_no_answer(gauges: Gauges) -> None:
    """vLLM ends such a request with 200 and `null` (with_cancellation), which would teach that answers are as short as clients' patience."""

    class Cancelling(FakeEngine):
        async def generate(self, receive: Any, send: Any) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"null"})

    async def scenario() -> None:
        engine = Cancelling()
        guard = learned(engine)
        counted = {name: metrics().request_of(name)._value for name in ("success", "disconnected")}
        before = {name: value.get() for name, value in counted.items()}
        for _ in range(2 * AT_RISK):
            call = start(guard, COMPLETIONS, completion(100, 200))
            while not engine.running:
                await asyncio.sleep(0)
            gauges.values["vllm:generation_tokens_total"] += 9
            call.hang_up()
            await call.task  # type: ignore[misc]
        assert {name: value.get() - before[name] for name, value in counted.items()} == {
            "success": 0,
            "disconnected": 2 * AT_RISK,
        }
        assert guard.outlook is not None and not guard.outlook.table.classes

    go(scenario)
