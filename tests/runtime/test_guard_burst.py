"""Bursts: hundreds of requests at once, of which many fail in every way, and after them nothing is taken, waited for or running.

Time is virtual (tests/support/runtime/virtual_time.py) and in steps of `STEP`, so that many things happen in the same instant.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from m3quant.runtime.guard import Guard
from m3quant.runtime.guard.admission import WINDOW_S, ReleaseRate
from m3quant.runtime.guard.aside import ASIDE_BYTES
from m3quant.runtime.guard.counting import LEAST_S
from m3quant.runtime.guard.idspan import LONG
from m3quant.runtime.guard.inbox import Inbox
from m3quant.runtime.guard.referee import HEARD
from m3quant.runtime.guard.replies import bad_request
from m3quant.runtime.guard.turns import Turns
from tests.support.runtime.guard_app import Call, FakeEngine, ask, completion, make_guard, start
from tests.support.runtime.virtual_time import run_virtually

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
STEP, SLOW_READ = 0.01, 0.2
CACHE = SimpleNamespace(kv_cache_size_tokens=4112, block_size=16, enable_prefix_caching=True)
STATE = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=CACHE))
SCOPE = {"app": SimpleNamespace(state=STATE)}


def text(size: int) -> str:
    """About `size` bytes, and few tokens by the fake tokenizer."""
    return ("w" * 999 + " ") * (size // 1000) or "a few words of text"


TEXTS = {size: text(size) for size in (0, LONG - 4000, LONG + 14_000, ASIDE_BYTES + 20_000)}


@dataclass
class Unreliable(FakeEngine):
    """Counts and answers, or fails to, as its dice say, `slow` times as slowly; `calm`: neither fails nor waits."""

    rng: random.Random
    slow: int = 1
    calm: bool = False
    began: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def steps(self, *most: int) -> float:
        return STEP * self.rng.randrange(1 + self.rng.choice(most))

    async def answer_tokenize(self, body: bytes, send: Any) -> None:
        how = "" if self.calm else self.rng.choices(("", "raise", "500", "garbage", "never"), (40, 4, 4, 4, 1))[0]
        if not self.calm and (seconds := self.steps(0, 0, 10, 100)):
            await asyncio.sleep(seconds * self.slow)
        if how == "raise":
            raise RuntimeError("no tokenizer")
        if how == "never":
            await asyncio.Event().wait()
        if not how:
            await super().answer_tokenize(body, send)
            return
        await send({"type": "http.response.start", "status": 500 if how == "500" else 200, "headers": []})
        await send({"type": "http.response.body", "body": self.rng.choice([b"", b"{", b"[1]", b'{"count": "x"}'])})

    async def generate(self, receive: Any, send: Any) -> None:
        number = dict(self.scopes[-1]["headers"])[b"x-number"].decode()
        self.began[number] = asyncio.get_running_loop().time()
        fate = "" if self.calm else self.rng.choice(["", "", "", "raise", "raise late", "400", "silent"])
        gone = asyncio.ensure_future(receive())
        try:
            if not self.calm:
                await asyncio.wait({gone}, timeout=self.steps(0, 10, 50))
            if gone.done() or fate == "silent":
                return
            if fate == "raise":
                raise RuntimeError("the engine died")
            await send({"type": "http.response.start", "status": 400 if fate == "400" else 200, "headers": []})
            for _ in range(self.rng.randrange(4)):
                await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
                if fate == "raise late":
                    raise RuntimeError("the engine died")
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()


class FakeAside:
    """In place of the other process: takes its time, works on one body at a time, and fails now and then; not while the engine is calm."""

    def __init__(self, engine: Unreliable) -> None:
        self.engine = engine
        self.busy = False

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        assert not self.busy
        self.busy = True
        try:
            await asyncio.sleep(0 if self.engine.calm else self.engine.slow * self.engine.steps(0, 200))
        finally:
            self.busy = False
        if not self.engine.calm and self.engine.rng.random() < 0.1:
            raise bad_request("The body needs more memory to read than there is.", None)
        return function(*arguments)


def make_body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    size = rng.choices(list(TEXTS), (80, 8, 6, 3))[0]
    shared = {"max_tokens": rng.choice([1, 16, 200, 2000]), "stream": rng.random() < 0.5}
    if rng.random() < 0.05:
        shared["model"] = "unknown"  # a 404 of the server's own
    if rng.random() < 0.1:
        shared["max_tokens"] = None
    shape = rng.choice(["text", "list", "ids", "chat", "media"])
    if shape == "text":
        return COMPLETIONS, {**shared, "prompt": TEXTS[size]}
    if shape == "list":
        return COMPLETIONS, {**shared, "prompt": [TEXTS[size], *(["some words"] * rng.randrange(8))]}
    if shape == "ids":
        return COMPLETIONS, {**shared, "prompt": [rng.randrange(9) for _ in range(rng.randrange(1, 300))]}
    content: Any = TEXTS[size]
    if shape == "media":
        content = [{"type": "text", "text": content}, {"type": "image_url", "image_url": {"url": "x"}}]
    return CHAT, {**shared, "messages": [{"role": "user", "content": content}]}


def virtual_guard(engine: Unreliable, **settings: Any) -> Guard:
    guard = make_guard(engine, pool_tokens=4112, max_model_len=1024, media_tokens=64, **settings)
    guard.bodies.aside = FakeAside(engine)  # type: ignore[assignment]
    if guard.outlook is not None:
        clock = asyncio.get_running_loop().time
        written = iter(range(10**9))

        def gauges() -> dict[str, float]:
            return {name: 0.1 if "perc" in name else 0.0 for name in HEARD} | {HEARD[-1]: float(next(written))}

        guard.outlook.gauges, guard.outlook.clock, guard.outlook.referee.clock = gauges, clock, clock
    return guard


async def misbehave(call: Call, rng: random.Random) -> float:
    """Some clients hang up, and some handlers are cancelled. When the handler had ended."""
    assert call.task is not None
    fate = rng.random()
    if fate < 0.35:
        await asyncio.wait({call.task}, timeout=STEP * rng.randrange(rng.choice([1, 20, 400])))
        if fate < 0.25:
            call.hang_up()
        if fate > 0.2:
            call.task.cancel()
    await asyncio.wait({call.task})
    return asyncio.get_running_loop().time()


def assert_nothing_is_held(guard: Guard) -> None:
    for turns in (guard.counter.small, guard.counter.large, guard.bodies.turns):
        assert (turns.inside, turns.lines, turns.virtual, turns._running) == (0, {}, 0, set())
    ledger = guard.admission.ledger
    assert (ledger.reserved, ledger.queued, ledger.admitted, ledger.waiting) == (0, 0, 0, 0)
    assert (ledger.held, ledger.lanes, ledger.block) == ({}, {}, None)
    assert not guard.admission._waiters and not guard.inside
    assert guard.outlook is None or not guard.outlook.running
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others, others


@pytest.mark.parametrize("seed", range(12))
def test_after_bursts_nothing_is_held_and_nobody_waited_longer_than_promised(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)

    async def scenario() -> None:
        clock = asyncio.get_running_loop().time
        engine = Unreliable(rng, slow=rng.choice([1, 20]))
        timeout_s = rng.choice([0.0, 0.5, 30.0])
        guard = virtual_guard(
            engine,
            reserve=rng.choice(["all", "learned"]),
            prefix_hits=rng.choice(["ignore", "count"]),
            default_max_tokens=rng.choice([None, 12]),
            oversize=rng.choice(["refuse", "clamp"]),
            queue_timeout_s=timeout_s,
            tokenize_concurrency=rng.choice([1, 2, 64]),
            send_timeout_s=rng.choice([0.0, 0.05, 15.0]),
            queue_tokens=rng.choice([None, 0, 10**6]),
        )
        keys = ["hog"] * 9 + ["a", "b", ""]
        calls: list[tuple[Call, float, asyncio.Task[float]]] = []
        for number in range(300):
            if rng.random() < 0.02:
                await asyncio.sleep(STEP * rng.randrange(100))
            path, body = make_body(rng)
            headers = {"x-api-key": rng.choice(keys), "x-number": str(number)}
            call = start(
                guard, path, body, headers=headers, read_s=rng.choice([0.0, 0.0, STEP, SLOW_READ]), scope=SCOPE
            )
            calls.append((call, clock(), asyncio.ensure_future(misbehave(call, rng))))
        if seed % 4 == 0:
            await asyncio.sleep(STEP * rng.randrange(100))
            guard.admission.drain()
        await asyncio.wait({task for _, _, task in calls})
        for number, (call, sent, task) in enumerate(calls):
            waited = engine.began.get(str(number), task.result()) - sent
            # Each step gets LEAST_S where the time is over: reading, counting, setting a number. And the slowest client reads two messages.
            assert waited <= max(timeout_s, LEAST_S) + 2 * LEAST_S + 2 * SLOW_READ, (number, call.status, waited)
        await asyncio.sleep(60)  # what nobody waits for any more ends too
        assert_nothing_is_held(guard)
        if guard.admission.draining:
            refused = await ask(guard, COMPLETIONS, completion(3), headers={"x-number": "-1"}, scope=SCOPE)
            assert refused.status == 503
            guard.admission.draining = False
        engine.calm = True
        counted = guard.metrics.count_of("tokenize")._value
        before, now = counted.get(), clock()
        for size in TEXTS:
            body = {"prompt": TEXTS[size], "max_tokens": 5}
            call = start(guard, COMPLETIONS, body, headers={"x-api-key": "hog", "x-number": "last"}, scope=SCOPE)
            await asyncio.wait({call.task})  # type: ignore[type-var]
            assert call.status == 200
        assert counted.get() - before == len(TEXTS) and clock() - now < STEP
        assert_nothing_is_held(guard)

    run_virtually(scenario(), monkeypatch)


def test_under_more_work_than_there_is_time_for_what_is_begun_is_done_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as much as one place does: were the last moment good enough for a turn, only what has waited longest would run, each in vain."""

    async def scenario() -> None:
        turns, begun, done = Turns(1), [0], [0]

        async def work() -> None:
            begun[0] += 1
            await asyncio.sleep(1)

        async def arrive(key: str) -> None:
            inbox = Inbox(asyncio.Event().wait, 10)  # type: ignore[arg-type]
            with contextlib.suppress(TimeoutError):
                await turns.run(key, 1, inbox, time.monotonic() + 10, work)
                done[0] += 1
            inbox.close()

        arrivals = []
        for number in range(200):
            arrivals.append(asyncio.ensure_future(arrive("ab"[number % 2])))
            await asyncio.sleep(0.5)
        await asyncio.gather(*arrivals)
        assert begun[0] > 95 and done[0] > 0.9 * begun[0], (begun, done)

    run_virtually(scenario(), monkeypatch)


def test_what_was_released_is_remembered_for_a_minute_however_long_the_server_is_busy() -> None:
    rate = ReleaseRate()
    rate.start(0.0)
    for second in range(1000):
        rate.add(7, float(second), idle=False)
    assert len(rate.released) <= WINDOW_S + 1 and rate.total == 7 * len(rate.released)
    assert rate.seconds_for(70, 999.0) == pytest.approx(10, rel=0.05)
