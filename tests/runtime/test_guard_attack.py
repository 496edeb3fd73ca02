"""Requests that try to stop the server, to make it promise too much, or to keep it from serving others."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from m3quant.runtime.guard import Guard, GuardSettings
from m3quant.runtime.guard.aside import ASIDE_BYTES, Aside
from m3quant.runtime.guard.begun import within
from m3quant.runtime.guard.clamp import with_number
from m3quant.runtime.guard.demand import Unreadable
from m3quant.runtime.guard.idspan import shorten
from m3quant.runtime.guard.inbox import ClientGone, Inbox
from m3quant.runtime.guard.reading import read_body
from m3quant.runtime.guard.replies import Refusal
from m3quant.runtime.guard.turns import Turns
from tests.support.runtime.guard_app import FakeEngine, ask, completion, make_guard, settle, start

CHAT, COMPLETIONS, INVOCATIONS = "/v1/chat/completions", "/v1/completions", "/invocations"
GENERATE = "/inference/v1/generate"


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


# Parsers: sizes at which quadratic work would take minutes


def test_names_without_their_arrays_end_are_passed_over() -> None:
    for piece in (b'"prompt":[', b'"prompt":[1,1,', b'"prompt"' + b" " * 90, b'"prompt" :\n['):
        body = b'{"a":' + piece * (4_000_000 // len(piece)) + b"]}"
        assert shorten(body, (b'"prompt"',)) == (body, None)


def test_a_long_array_after_decoys_is_still_found() -> None:
    ids = b",".join([b"17"] * 40_000)
    body = b'{"x":[{"prompt":[1,2]},{"prompt":["a"]}],"prompt": [' + ids + b"]}"
    short, span = shorten(body, (b'"prompt"',))
    assert span is not None and span.count == 40_000 and len(short) < 100


def test_a_number_is_set_in_every_one_of_many_duplicates() -> None:
    count = 200_000
    body = b"{" + b",".join([b'"max_tokens":null'] * count) + b"}"
    assert with_number(body, "max_tokens", 7) == b"{" + b",".join([b'"max_tokens":7'] * count) + b"}"


def test_a_body_nested_too_deep_has_no_place_for_a_number() -> None:
    with pytest.raises(ValueError, match="nested"):
        with_number(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "max_tokens", 7)


BATCH = "/v1/chat/completions/batch"
ONE = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (BATCH, {"messages": [[{}]] * 8000}),
        (BATCH, {"messages": [ONE] * 1000, "tools": [{"type": "function", "function": {"name": "f", "description": "x" * 800_000}}]}),
        (BATCH, {"messages": [ONE] * 1000, "chat_template_kwargs": {"a": "x" * 800_000}}),
        (COMPLETIONS, {"prompt": ["a"] * 1000, "model": "x" * 800_000}),
        (COMPLETIONS, {"prompt": ["a"] * 8000, "suffix": "x" * 800_000}),
    ],
)  # fmt: skip
def test_what_prompts_share_is_read_and_asked_for_a_bounded_number_of_times(route: str, body: Any) -> None:
    """Each of these took seconds to minutes, or gigabytes: what all prompts share was done again for every one."""
    raw = json.dumps(body).encode()
    (reading,) = read_body(route, raw, False)
    asked = [len(prompt.query) for prompt in reading.prompts if prompt.query]
    assert sum(asked) <= 4 * max(len(raw), 2**20) + max(asked, default=0)
    # Who is not asked for is bounded by the bytes: never by nothing.
    assert all(prompt.query or prompt.bound for prompt in reading.prompts)
    assert len(reading.prompts) == len(body.get("messages") or body["prompt"])


def test_embeddings_without_number_are_refused() -> None:
    with pytest.raises(Refusal, match="9000 prompts"):
        read_body(COMPLETIONS, b'{"prompt_embeds":[' + b"1," * 8999 + b"1]}", False)
    assert read_body(CHAT, json.dumps({"messages": ONE * 9000}).encode(), False)[0].sequences == 1


@pytest.mark.parametrize(
    ("route", "body", "name"),
    [
        (CHAT, {"messages": ONE, "tools": [{"type": "function", "function": {"parameters": {"prompt": [1] * 60_000}}}]}, "tools"),
        (CHAT, {"messages": ONE, "documents": [{"prompt": [1] * 60_000}]}, "documents"),
        (INVOCATIONS, {"messages": ONE, "prompt": "a", "chat_template_kwargs": {"prompt": [1] * 60_000}}, "prompt"),
        (CHAT, {"messages": [{"role": "assistant", "content": "", "x": {"prompt": [1] * 60_000}}]}, "messages"),
    ],
)  # fmt: skip
def test_a_long_array_of_another_member_is_counted_whole(route: str, body: Any, name: str) -> None:
    """Under the name of the prompt, but a tool's schema: the template writes it out."""
    readings = read_body(route, json.dumps(body).encode(), False)
    assert max(len(prompt.query or b"") for reading in readings for prompt in reading.prompts) > 120_000


@pytest.mark.parametrize("mark", ["-1099511627776", "-1099511627776.0", "-1.099511627776e12", '"-1099511627776"'])
def test_a_client_cannot_write_the_marker(mark: str) -> None:
    tools = json.dumps([{"type": "function", "function": {"parameters": {"prompt": [1] * 60_000}}}])
    body = f'{{"tools":{tools},"messages":{json.dumps(ONE)},"prompt":[{mark}]}}'.encode()
    chat = next(reading for reading in read_body(INVOCATIONS, body, False) if reading.kind == "chat")
    assert len(chat.prompts[0].query or b"") > 120_000
    assert all(prompt.ids in (None, 1) for reading in read_body(INVOCATIONS, body, False) for prompt in reading.prompts)


def test_a_long_array_of_another_member_through_the_guard() -> None:
    async def scenario() -> None:
        engine = SlowTokenizer()
        engine.let.set()
        guard = make_guard(engine)
        for items in (60_000, 200_000):  # read here, and in the other process
            engine.asked.clear()
            tools = [{"type": "function", "function": {"name": "f", "parameters": {"prompt": [1] * items}}}]
            call = await ask(guard, CHAT, {"messages": ONE, "tools": tools, "max_tokens": 5})
            assert call.status == 200 and engine.asked[0] > 2 * items
        guard.aside.close()

    run(scenario())


def test_a_body_in_a_piece_a_byte_is_handed_on_as_one() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine)
        body = json.dumps(completion(5)).encode() + b" " * 3000
        for pieces in ([body[at : at + 1] for at in range(len(body))], [body[:9], body[9:]]):
            call = await ask(guard, COMPLETIONS, pieces)
            assert call.status == 200 and engine.bodies.pop() == body
        messages = [{"type": "http.request", "body": b"a", "more_body": True} for _ in range(200_000)]

        async def receive() -> Any:
            return messages.pop() if messages else {"type": "http.request", "body": b"", "more_body": False}

        inbox = Inbox(receive, 10**6)
        assert await inbox.read() == b"a" * 200_000
        assert await inbox.receive() == {"type": "http.request", "body": b"a" * 200_000, "more_body": False}

    run(scenario())


@pytest.mark.parametrize("length", ["9" * 19, "9" * 5000, "33554433"])
def test_a_content_length_of_any_number_of_digits_is_413(length: str) -> None:
    async def scenario() -> None:
        call = await ask(make_guard(FakeEngine()), COMPLETIONS, completion(5), headers={"content-length": length})
        assert call.status == 413 and call.error is None

    run(scenario())


@pytest.mark.parametrize(
    ("prefix", "path", "guarded"),
    [("/v", "/v1/completions", True), ("/api", "/api/v1/completions", True), ("", "/v1/completions/", True),
     ("/api", "/v1/completions", True), ("/v1", "/v1/completions", False)],
)  # fmt: skip
def test_a_path_is_what_the_application_takes_it_for(prefix: str, path: str, guarded: bool) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        call = await ask(make_guard(engine), path, completion(600), scope={"root_path": prefix})
        assert (call.status == 400 and not engine.bodies) == guarded

    run(scenario())


# The other process


def large(**members: Any) -> bytes:
    return json.dumps({"x": ["a"] * (ASIDE_BYTES // 4), **members}).encode()


def test_the_other_process_reads_as_this_one_and_raises_as_this_one() -> None:
    async def scenario() -> None:
        aside = Aside()
        try:
            body = large(prompt="a b", n=3, max_tokens=None)
            assert await aside.run(read_body, COMPLETIONS, body, True) == read_body(COMPLETIONS, body, True)
            with pytest.raises(Unreadable):
                await aside.run(read_body, COMPLETIONS, body[:-1], True)
            with pytest.raises(Refusal) as refused:
                await aside.run(read_body, COMPLETIONS, large(prompt="a", max_tokens=-5), True)
            assert (refused.value.status, refused.value.param, refused.value.reason) == (400, "max_tokens", "invalid")
            assert aside._process is not None
            os.kill(aside._process.pid, signal.SIGKILL)
            assert (await aside.run(read_body, COMPLETIONS, body, False))[0].copies == 3
        finally:
            aside.close()

    run(scenario())


def test_a_body_that_takes_too_long_to_read_is_refused() -> None:
    async def scenario() -> None:
        aside = Aside(limit_s=0.0)
        with pytest.raises(Refusal, match="seconds to read"):
            await aside.run(read_body, COMPLETIONS, large(prompt="a"), False)
        assert aside._process is None

    run(scenario())


def test_a_process_that_is_stopped_is_replaced() -> None:
    """Larger than what a pipe holds: sending it waits for the process, which nobody lets go on."""

    async def scenario() -> None:
        aside = Aside()
        body = large(prompt="a", max_tokens=5)
        await aside.run(read_body, COMPLETIONS, b"{}", False)
        aside.limit_s = 0.5
        assert aside._process is not None
        os.kill(aside._process.pid, signal.SIGSTOP)
        with pytest.raises(Refusal, match="seconds to read"):
            await asyncio.wait_for(aside.run(read_body, COMPLETIONS, body * 20, False), 10)
        aside.limit_s = 60
        try:
            assert (await aside.run(read_body, COMPLETIONS, body, False))[0].output == 5
        finally:
            aside.close()

    run(scenario())


def test_a_large_body_is_guarded_as_a_small_one() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, default_max_tokens=12)
        engine.go.clear()
        body = large(messages=[{"role": "user", "content": "a b c"}])
        call = start(guard, CHAT, body)
        while not engine.bodies:
            await asyncio.sleep(0.005)
        assert guard.admission.ledger.reserved == 16
        assert json.loads(engine.bodies[0]) == {**json.loads(body), "max_completion_tokens": 12}
        engine.go.set()
        await call.task  # type: ignore[misc]
        assert call.status == 200
        refused = await ask(guard, CHAT, large(messages=[{"role": "user", "content": "a"}], max_tokens=600))
        assert refused.status == 400 and "max_tokens=600" in refused.json["error"]["message"]
        guard.aside.close()

    run(scenario())


# What the engine reads


async def reserved(path: str, body: Any, guard: Guard, engine: FakeEngine) -> int:
    engine.go.clear()
    call = start(guard, path, body)
    await settle(400)
    tokens = guard.admission.ledger.reserved
    engine.go.set()
    assert call.task is not None
    await asyncio.wait_for(call.task, 10)
    assert call.status == 200, call.body
    return tokens


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        (INVOCATIONS, {"messages": 5, "prompt": ["a"] * 64, "max_tokens": 500}, 64 * 512),
        (INVOCATIONS, {"messages": None, "prompt": "a", "max_completion_tokens": 5, "max_tokens": 500}, 512),
        (INVOCATIONS, {"messages": [{"role": "user", "content": "a"}], "prompt": ["a"] * 4, "max_tokens": 15}, 4 * 16),
        (INVOCATIONS, {"messages": [{"role": "user", "content": "a"}], "prompt": "a", "max_tokens": None}, 512),
        (INVOCATIONS, {"prompt": [5] * 600, "max_tokens": 12, "truncate_prompt_tokens": 20}, 32),
        (COMPLETIONS, {"prompt": "a b", "max_tokens": None}, 512),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 0, "max_tokens": 0}, 512),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 0, "max_tokens": 15}, 16),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 12, "kv_transfer_params": {"prompt_token_ids": [1] * 100}}, 112),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 12, "truncate_prompt_tokens": 5, "kv_transfer_params": {"prompt_token_ids": [1] * 100}}, 112),
        (COMPLETIONS, {"prompt": "a " * 50, "max_tokens": 12, "truncate_prompt_tokens": "4", "kv_transfer_params": {"prompt_token_ids": [1] * 3}}, 16),
        (COMPLETIONS, {"prompt": "a", "suffix": "b" * 40, "max_tokens": 7}, 48),
        ("/v1/responses", {"input": "a", "tools": [{"type": "web_search_preview"}], "max_output_tokens": 5}, 512),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "thinking": {"type": "enabled"}}, 512),
        (GENERATE, {"token_ids": [1] * 10, "sampling_params": {"max_tokens": None}}, 512),
        (GENERATE, {"token_ids": [1] * 10, "sampling_params": {"n": 2, "max_tokens": 6}}, 32),
    ],
)  # fmt: skip
def test_every_reading_counts_and_the_largest_is_reserved(path: str, body: Any, tokens: int) -> None:
    engine = FakeEngine()
    assert run(reserved(path, body, make_guard(engine, pool_tokens=65536), engine)) == tokens


def test_a_ceiling_of_the_server_lowers_only_what_it_lowers_in_every_release() -> None:
    """`--override-generation-config`: /inference/v1/generate takes what it is given, and null there is the rest of the context."""
    model = SimpleNamespace(
        max_model_len=512,
        generation_config="auto",
        override_generation_config={"max_new_tokens": 20},
        get_diff_sampling_param=lambda: {"max_tokens": 20},
    )
    cache = SimpleNamespace(kv_cache_size_tokens=65536, block_size=16, enable_prefix_caching=True)
    state = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache, model_config=model))
    message = {"messages": [{"role": "user", "content": "a"}]}

    async def scenario() -> None:
        for path, body, tokens in (
            (CHAT, {**message, "max_tokens": 400}, 32),
            (CHAT, message, 32),
            (COMPLETIONS, {"prompt": "a", "max_tokens": 400}, 416),
            (GENERATE, {"token_ids": [1], "sampling_params": {"max_tokens": 400}}, 416),
            (GENERATE, {"token_ids": [1], "sampling_params": {"max_tokens": None}}, 512),
            (GENERATE, {"token_ids": [1], "sampling_params": {}}, 32),
            # Bounded by its bytes, so by the context less the output that the ceiling leaves, not less what was asked for.
            ("/v1/messages", {**message, "max_tokens": 511, "thinking": {"type": "enabled"}}, 512),
        ):
            engine = FakeEngine()
            guard = Guard(engine, GuardSettings())
            scope = {"app": SimpleNamespace(state=state)}
            engine.go.clear()
            call = start(guard, path, body, scope=scope)
            await settle()
            assert guard.admission.ledger.reserved == tokens, (path, body)
            engine.go.set()
            await call.task  # type: ignore[misc]

    run(scenario())


# What is certain is refused


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "n": 128, "max_tokens": 1},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "a " * 300}]}], "n": 4, "max_tokens": 1},
        {"messages": [{"role": "user", "content": "a"}], "n": 10, "max_tokens": 100},
    ],
)  # fmt: skip
def test_a_bound_refuses_what_is_certain(body: Any) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine)
        call = await ask(guard, CHAT, body)
        assert call.status == 400 and "need" in call.json["error"]["message"] and call.json["error"]["param"] == "n"
        assert not engine.bodies and guard.admission.ledger.reserved == 0

    run(scenario())


def test_prompts_without_number_are_refused_before_they_are_counted() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine)
        for body in ({"prompt": ["a"] * 100_000}, {"prompt": [[]] * 100_000}, {"prompt": ["a"] * 60, "max_tokens": 17}):
            call = await ask(guard, COMPLETIONS, body)
            assert call.status == 400 and not engine.bodies
        assert guard.counter.has_tokenize
        guard.aside.close()

    run(scenario())


@pytest.mark.parametrize("name", ["n", "max_tokens", "best_of", "truncate_prompt_tokens"])
@pytest.mark.parametrize("digits", [20, 4299, 4300, 5000])
def test_numbers_of_thousands_of_digits_are_400(name: str, digits: int) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine)
        for number in ("9" * digits, '"' + "9" * digits + '"'):
            call = await ask(guard, COMPLETIONS, f'{{"prompt":"a","{name}":{number}}}'.encode())
            assert call.error is None
            # A literal that Python's own parser refuses is no JSON to vLLM either, and passed on for it to say so.
            assert call.status == 400 or (digits > 4299 and number[0] != '"' and len(engine.bodies) == 1)

    run(scenario())


# Counting is shared


class SlowTokenizer(FakeEngine):
    """Counts one prompt after another, each when it is let; remembers the texts."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.let = asyncio.Event()

    async def answer_tokenize(self, body: bytes, send: Any) -> None:
        self.asked.append(len(body))
        if len(body) > 65536:
            await self.let.wait()
        await super().answer_tokenize(body, send)


def test_large_prompts_of_one_key_do_not_keep_another_key_from_being_counted() -> None:
    async def scenario() -> None:
        engine = SlowTokenizer()
        guard = make_guard(engine, api_keys="hog,guest", max_model_len=100_000, pool_tokens=2**20)
        big = {"prompt": "word " * 20_000, "max_tokens": 5}
        hogs = [start(guard, COMPLETIONS, big, headers={"x-api-key": "hog"}) for _ in range(32)]
        await settle()
        for hog in hogs:
            hog.hang_up()
        await settle()
        assert len(engine.asked) == 1  # the others were never begun
        guest = await ask(guard, COMPLETIONS, completion(3), headers={"x-api-key": "guest"})
        assert guest.status == 200
        second = start(guard, COMPLETIONS, big, headers={"x-api-key": "guest"})
        await settle()
        engine.let.set()
        await asyncio.wait_for(second.task, 5)  # type: ignore[arg-type]
        assert second.status == 200 and len([size for size in engine.asked if size > 65536]) == 2
        assert guard.counter.large.inside == guard.counter.small.inside == 0 and not guard.counter.large.lines

    run(scenario())


def test_many_prompts_of_a_client_that_left_are_not_counted_on() -> None:
    async def scenario() -> None:
        engine = SlowTokenizer()
        guard = make_guard(engine, max_model_len=100_000, pool_tokens=2**20)
        body = {"prompt": ["word " * 100] * 500, "max_tokens": 5}
        call = start(guard, COMPLETIONS, body)
        while len(engine.asked) < 10:
            await asyncio.sleep(0)
        call.hang_up()
        await asyncio.wait_for(call.task, 10)  # type: ignore[arg-type]
        assert len(engine.asked) < 30 and not engine.bodies and guard.admission.ledger.reserved == 0

    run(scenario())


def test_a_burst_of_one_key_leaves_every_place_free() -> None:
    """More at once than a key has places: those that wait for one take it once. Seen on an H200: after 64 at once, 16 waited for 30 s."""

    class Slow(FakeEngine):
        async def answer_tokenize(self, body: bytes, send: Any) -> None:
            await asyncio.sleep(0.01)
            await super().answer_tokenize(body, send)

    async def scenario() -> None:
        guard = make_guard(Slow(), max_model_len=4096, pool_tokens=2**22)
        places, counted = guard.settings.tokenize_concurrency, guard.metrics.count_of("tokenize")._value
        before = counted.get()
        for _ in range(3):
            body = {"prompt": "word " * 10, "max_tokens": 5}
            calls = await asyncio.gather(*(ask(guard, COMPLETIONS, body) for _ in range(3 * places)))
            assert {call.status for call in calls} == {200}
        assert guard.counter.small.inside == 0 and not guard.counter.small.lines
        assert counted.get() - before == 9 * places

    run(scenario())


def test_nothing_is_counted_after_the_longest_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 prompts of a tokenizer that takes its time: the rest is bounded by its bytes, not given a second each."""
    monkeypatch.setattr("m3quant.runtime.guard.counting.LEAST_S", 0.2)

    class Slow(FakeEngine):
        async def answer_tokenize(self, body: bytes, send: Any) -> None:
            await asyncio.sleep(0.02)
            await super().answer_tokenize(body, send)

    async def scenario() -> None:
        guard = make_guard(Slow(), max_model_len=4096, pool_tokens=2**22, queue_timeout_s=0.0)
        began = asyncio.get_running_loop().time()
        call = await ask(guard, COMPLETIONS, {"prompt": ["word"] * 500, "max_tokens": 5})
        assert call.status == 200 and asyncio.get_running_loop().time() - began < 5

    run(scenario())


def test_keys_that_are_made_up_are_forgotten() -> None:
    async def scenario() -> None:
        turns = Turns(2)
        assert turns.enter("busy", 1)
        for number in range(5000):
            key = f"made-up-{number}"
            assert turns.enter(key, 10)
            turns.leave(key)
        assert len(turns.lines) <= 1100
        turns.leave("busy")
        assert not turns.lines

    run(scenario())


def test_a_prompt_whose_turn_does_not_come_is_bounded_by_its_bytes() -> None:
    async def scenario() -> None:
        engine = SlowTokenizer()
        guard = make_guard(engine, max_model_len=500_000, pool_tokens=2**20, queue_timeout_s=0.05)
        first = start(guard, COMPLETIONS, {"prompt": "word " * 20_000, "max_tokens": 5})
        await settle()
        second = await ask(guard, COMPLETIONS, {"prompt": "word " * 20_001, "max_tokens": 5})
        assert second.status == 200 and len(engine.asked) == 1
        engine.let.set()
        await asyncio.wait_for(first.task, 5)  # type: ignore[arg-type]

    run(scenario())


def test_turns_are_shared_by_size_and_at_most_half_go_to_one_key() -> None:
    async def scenario() -> None:
        turns = Turns(4)
        assert [turns.enter("hog", 100) for _ in range(6)] == [True, True, False, False, False, False]
        waiting = [turns.queue("hog", 100) for _ in range(4)]
        assert [turns.enter("guest", 10) for _ in range(3)] == [True, True, False] and turns.inside == 4
        guest = turns.queue("guest", 10)
        turns.leave("hog")
        await settle()
        assert waiting[0].done()  # its share is free again, the guest has had its own
        turns.leave("guest")
        assert guest.done()
        for turn in waiting[1:]:
            turn.cancel()
        for key in ("hog", "hog", "guest", "guest"):
            turns.leave(key)
        assert not turns.inside and not turns.lines and turns.virtual == 0

    run(scenario())


def test_work_that_nobody_waits_for_keeps_its_place_until_it_is_done() -> None:
    async def scenario() -> None:
        turns, done, gone = Turns(1), asyncio.Event(), asyncio.Event()

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def work() -> int:
            await done.wait()
            return 5

        running = asyncio.ensure_future(turns.run("a", 1, Inbox(receive, 10), 1e9, work))
        await settle()
        gone.set()
        with pytest.raises(ClientGone):
            await running
        assert turns.inside == 1
        with pytest.raises(TimeoutError):
            await turns.run("b", 1, Inbox(lambda: asyncio.Future(), 10), 0.0, work)
        done.set()
        await settle()
        assert turns.inside == 0
        assert await turns.run("b", 1, Inbox(lambda: asyncio.Future(), 10), 0.0, work) == 5

    run(scenario())


def test_a_coroutine_begun_goes_on_where_it_stopped() -> None:
    async def scenario() -> None:
        async def waits(seconds: float) -> str:
            try:
                await asyncio.sleep(0)
                await asyncio.sleep(seconds)
            finally:
                await asyncio.sleep(0)
            return "done"

        async def fails() -> None:
            await asyncio.sleep(0)
            raise KeyError("x")

        assert await within(waits(0.001), 5) == "done"
        with pytest.raises(TimeoutError):
            await within(waits(60), 0.01)
        with pytest.raises(KeyError):
            await within(fails(), 5)
        task = asyncio.ensure_future(within(waits(60), 60))
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())


# The queue is shared


def test_a_request_of_the_whole_pool_lets_others_pass_after_a_while() -> None:
    """`queue_timeout_s` of 2 s: it may hold its room back for half a second. Another key's request, which fits, starts then, in time."""

    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, api_keys="hog,guest,third", max_model_len=1024, queue_timeout_s=2)
        engine.go.clear()
        third = start(guard, COMPLETIONS, completion(200, 56), headers={"x-api-key": "third"})
        await settle()
        hog = start(guard, COMPLETIONS, completion(1000, 24), headers={"x-api-key": "hog"})
        await settle()
        guest = start(guard, COMPLETIONS, completion(200, 56), headers={"x-api-key": "guest"})
        await settle()
        ledger = guard.admission.ledger
        assert (ledger.admitted, ledger.waiting) == (1, 2)
        while ledger.admitted == 1:
            await asyncio.sleep(0.01)
        assert ledger.waiting == 1 and guest.status == 0  # inside, and not refused
        while not hog.status:
            await asyncio.sleep(0.01)
        assert hog.status == 429
        engine.go.set()
        await asyncio.gather(third.task, guest.task)  # type: ignore[arg-type]
        assert (third.status, guest.status) == (200, 200)

    run(asyncio.wait_for(scenario(), 20))


def test_what_its_own_key_holds_gives_no_right_to_block() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, api_keys="hog,guest", max_model_len=1024)
        engine.go.clear()
        own = [start(guard, COMPLETIONS, completion(200, 56), headers={"x-api-key": "hog"})]
        await settle()
        whole = start(guard, COMPLETIONS, completion(1000, 24), headers={"x-api-key": "hog"})
        await settle()
        guest = start(guard, COMPLETIONS, completion(200, 56), headers={"x-api-key": "guest"})
        await settle()
        assert guard.admission.ledger.admitted == 2 and guard.admission.ledger.block is None
        engine.go.set()
        await asyncio.gather(*(call.task for call in (*own, whole, guest)))  # type: ignore[arg-type]
        assert {call.status for call in (*own, whole, guest)} == {200}
        assert not guard.admission._waiters

    run(scenario())
