"""The guard around a fake application: admission, refusals, queue, disconnects, pass-through."""

from __future__ import annotations

import asyncio
import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3quant.runtime.guard import Guard
from m3quant.runtime.guard.idspan import MARKER, shorten
from m3quant.runtime.guard.reading import read_body
from tests.support.runtime.guard_app import Call, FakeEngine, ask, completion, make_guard, settle, start

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def clean(guard: Guard) -> bool:
    ledger = guard.admission.ledger
    return (ledger.reserved, ledger.admitted, ledger.queued, ledger.waiting) == (0, 0, 0, 0)


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


async def overload(engine: FakeEngine, guard: Guard, count: int, key: str | None = None) -> list[Call]:
    """`count` requests of 256 tokens, of which the pool holds four, at an engine that stands still."""
    engine.go.clear()
    headers = {"Authorization": f"Bearer {key}"} if key else None
    calls = [start(guard, COMPLETIONS, completion(200, 56), headers=headers) for _ in range(count)]
    await settle()
    return calls


def test_a_stream_passes_byte_for_byte_and_gives_its_tokens_back() -> None:
    async def scenario() -> None:
        engine = FakeEngine(stream=[b"data: \xff\x00\n\n", b"", b"data: [DONE]\n\n"])
        guard = make_guard(engine)
        body = b'{ "prompt" : "one two\\u00e9" ,"max_tokens":3, "unknown": 1e400, "x":[1,\n2] }'
        call = await ask(guard, COMPLETIONS, [body[:10], body[10:]])
        assert call.status == 200 and call.chunks == [b"data: \xff\x00\n\n", b"", b"data: [DONE]\n\n", b""]
        assert engine.bodies == [body]
        assert clean(guard)

    run(scenario())


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        (COMPLETIONS, completion(20, 12), 32),
        (COMPLETIONS, completion(20, 13), 48),  # 33 tokens are three blocks of 16
        (COMPLETIONS, {"prompt": "a b"}, 32),  # OpenAI's default of 16 output tokens
        (COMPLETIONS, {"prompt": [5] * 30, "max_tokens": 2}, 32),
        (COMPLETIONS, {"prompt": [[5] * 30, [6] * 40], "max_tokens": 2}, 32 + 48),
        (COMPLETIONS, {"prompt": ["a b", "a"], "max_tokens": 14, "n": 3}, 3 * (16 + 16)),
        (COMPLETIONS, completion(8, 8, best_of=2), 32),
        (COMPLETIONS, completion(8, True), 16),  # what pydantic reads as 1, vLLM does too
        (COMPLETIONS, completion(8, "8"), 16),
        (COMPLETIONS, completion(8, 8.0), 16),
        (COMPLETIONS, {"prompt_embeds": "AAAA", "max_tokens": 100}, 512),
        (COMPLETIONS, {"prompt": [5.0] * 30, "max_tokens": 2}, 32),
        (COMPLETIONS, {"prompt": ["5"] + [5] * 29, "max_tokens": 2}, 32),
        (CHAT, {"messages": ["?"], "max_tokens": 2}, 512),
        (COMPLETIONS, {"max_tokens": 2}, 512),
        (CHAT, {"messages": [{"role": "user", "content": "a b c"}], "max_tokens": 13}, 16),
        (CHAT, {"messages": [{"role": "user", "content": "a b c"}], "max_tokens": 1, "max_completion_tokens": 14}, 32),
        (CHAT, {"messages": [{"role": "user", "content": "a b c"}]}, 512),  # silent: vLLM takes the rest of the context
        ("/v1/responses", {"input": "a b c", "instructions": "d", "max_output_tokens": 12}, 16),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a b"}]}], "max_output_tokens": 14}, 16),
        ("/v1/responses", {"input": "a", "previous_response_id": "r", "max_output_tokens": 100}, 512),
        (COMPLETIONS, {"prompt": [5] * 600, "max_tokens": 12, "truncate_prompt_tokens": 20}, 32),
        ("/inference/v1/generate", {"token_ids": [1] * 100, "sampling_params": {"max_tokens": 6}, "truncate_prompt_tokens": 1}, 112),
        ("/v1/responses", {"input": [{"type": "reasoning"}] * 8, "n": 9, "max_output_tokens": 6}, 1024),
        ("/cohere/v2/chat", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 6}, 512),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a b c"}], "system": "d", "max_tokens": 12}, 16),
        ("/inference/v1/generate", {"token_ids": [1] * 10, "sampling_params": {"max_tokens": 6}}, 16),
        ("/invocations", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 15}, 16),
        ("/invocations", completion(8, 8), 16),
    ],
)  # fmt: skip
def test_what_a_request_reserves(path: str, body: Any, tokens: int) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine)
        engine.go.clear()
        call = start(guard, path, body)
        await settle()
        assert guard.admission.ledger.reserved == tokens
        engine.go.set()
        await asyncio.wait_for(call.task, 5)
        assert call.status == 200 and clean(guard)

    run(scenario())


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        (completion(513), "input_tokens", "This model's maximum context length is 512 tokens. However, your prompt contains 513 input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input prompt. (parameter=input_tokens, value=513)"),
        (completion(500, 13), "input_tokens", "This model's maximum context length is 512 tokens. However, you requested 13 output tokens and your prompt contains 500 input tokens, for a total of 513 tokens."),
        (completion(512, 1), "input_tokens", "This model's maximum context length is 512 tokens."),
        (completion(5, 513), "max_tokens", "max_tokens=513 cannot be greater than max_model_len=512. Please request fewer output tokens. (parameter=max_tokens, value=513)"),
        (completion(5, -5), "max_tokens", "max_tokens must be at least 1, got -5. (parameter=max_tokens, value=-5)"),
        (completion(5, 1.5), "max_tokens", "max_tokens: Input should be a valid integer"),
        (completion(5, "many"), "max_tokens", "max_tokens: Input should be a valid integer"),
        (completion(5, [5]), "max_tokens", "max_tokens: Input should be a valid integer"),
        (completion(300, 100, n=3), "n", "The 3 sequences of this request need 1200 tokens of KV cache together, and this server has 1024."),
        (completion(5, 5, n=10**30), "n", ""),
    ],
)  # fmt: skip
def test_what_can_never_fit_is_refused_in_vllms_words(body: Any, param: str, text: str) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine)
        call = await ask(guard, COMPLETIONS, body)
        assert call.status == 400
        error = call.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"].startswith(text)
        assert (error["type"], error["param"], error["code"]) == ("BadRequestError", param, 400)
        assert not engine.bodies and clean(guard)

    run(scenario())


def test_a_pool_smaller_than_the_context_is_the_limit() -> None:
    """vLLM with num_gpu_blocks_override: a request of 112 to 512 tokens would wait there for ever."""

    async def scenario() -> None:
        guard = make_guard(FakeEngine(), pool_tokens=128)
        call = await ask(guard, COMPLETIONS, completion(100, 13))
        assert call.status == 400 and "maximum context length is 112 tokens" in call.json["error"]["message"]
        assert (await ask(guard, COMPLETIONS, completion(100, 12))).status == 200
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        assert (await ask(guard, CHAT, chat)).status == 400  # it would run to 512 tokens

    run(scenario())


def test_clamping_is_announced_and_changes_nothing_else() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, oversize="clamp")
        call = await ask(
            guard, COMPLETIONS, b'{"prompt":[' + b",".join([b"7"] * 500) + b'], "max_tokens" : 99 ,"a":1.10}'
        )
        assert call.headers["x-m3quant-guard-max-tokens"] == "12; clamped"
        assert engine.bodies[0].endswith(b'], "max_tokens" : 12 ,"a":1.10}')
        headers = dict(engine.scopes[0]["headers"])
        assert headers[b"content-length"] == str(len(engine.bodies[0])).encode()
        untouched = await ask(guard, COMPLETIONS, completion(500, 12))
        assert "x-m3quant-guard-max-tokens" not in untouched.headers
        assert (await ask(guard, COMPLETIONS, completion(512, 12))).status == 400  # no room for one output token
        assert clean(guard)

    run(scenario())


def test_a_default_for_requests_that_do_not_say() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, default_max_tokens=30)
        call = await ask(guard, CHAT, {"messages": [{"role": "user", "content": "a b"}]})
        assert call.headers["x-m3quant-guard-max-tokens"] == "30; default"
        assert json.loads(engine.bodies[0])["max_completion_tokens"] == 30
        await ask(guard, CHAT, {"messages": [{"role": "user", "content": "a b"}], "max_tokens": 3})
        assert "max_completion_tokens" not in json.loads(engine.bodies[1])

    run(scenario())


def test_what_does_not_fit_now_waits_and_then_runs() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine)
        calls = await overload(engine, guard, 8)
        assert engine.running == 4 and guard.admission.ledger.waiting == 4
        assert guard.admission.ledger.reserved == 1024
        engine.go.set()
        await asyncio.wait_for(asyncio.gather(*(call.task for call in calls)), 5)
        assert [call.status for call in calls] == [200] * 8 and engine.most == 4 and clean(guard)

    run(scenario())


def test_a_full_queue_and_a_deadline_say_when_to_come_back() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, queue_tokens=256, queue_timeout_s=0.05, retry_after_s=7)
        calls = await overload(engine, guard, 6)
        assert (
            calls[5].status == 429 and calls[5].headers["retry-after"] == "7"
        )  # nothing observed yet: the configured guess
        assert calls[5].json["error"]["code"] == 429
        await asyncio.sleep(0.1)
        assert calls[4].status == 429 and "within 0.05 seconds" in calls[4].json["error"]["message"]
        engine.go.set()
        await asyncio.gather(*(call.task for call in calls))
        assert [call.status for call in calls] == [200] * 4 + [429] * 2 and clean(guard)

    run(scenario())


def test_retry_after_follows_the_observed_release_rate() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, queue_tokens=0)
        now = [1000.0]
        guard.admission.clock = lambda: now[0]
        calls = await overload(engine, guard, 4)
        now[0] += 20  # one request of 256 tokens ends after 20 seconds: 12.8 tokens per second
        calls[0].hang_up()
        await settle()
        refill = start(guard, COMPLETIONS, completion(200, 56))
        await settle()
        call = await ask(guard, COMPLETIONS, {"prompt": [1] * 200, "max_tokens": 56})
        assert call.headers["retry-after"] == "20"
        call = await ask(guard, COMPLETIONS, {"prompt": [1] * 450, "max_tokens": 62})
        assert call.headers["retry-after"] == "40"
        for open_call in [*calls, refill]:
            open_call.hang_up()
        await settle()
        assert clean(guard)

    run(scenario())


def test_the_rate_is_kept_between_requests_that_each_fill_the_pool() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, queue_tokens=2048, max_model_len=1024, retry_after_s=7)
        now = [1000.0]
        guard.admission.clock = lambda: now[0]
        engine.go.clear()
        calls = [start(guard, COMPLETIONS, completion(1000, 24)) for _ in range(3)]
        await settle()
        now[0] += 20  # 1024 tokens end after 20 seconds, and the next request takes their place at once
        calls[0].hang_up()
        await settle()
        calls.append(start(guard, COMPLETIONS, completion(1000, 24)))
        await settle()
        refused = await ask(guard, COMPLETIONS, {"prompt": [1] * 1000, "max_tokens": 24})
        assert refused.status == 429 and refused.headers["retry-after"] == "60"  # two waiting and itself
        for call in calls:
            call.hang_up()
        await settle()
        assert clean(guard)

    run(scenario())


def test_hanging_up_while_waiting_and_while_running_frees_the_tokens() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine)
        calls = await overload(engine, guard, 6)
        calls[4].hang_up()
        await settle()
        assert guard.admission.ledger.waiting == 1 and engine.running == 4
        calls[0].hang_up()
        await settle()
        assert engine.aborted == 1 and engine.running == 4 and guard.admission.ledger.waiting == 0
        engine.go.set()
        await asyncio.wait_for(asyncio.gather(*(call.task for call in calls)), 5)
        assert clean(guard) and calls[4].status == 0

    run(scenario())


def test_a_failing_application_frees_the_tokens_and_the_error_passes() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        engine.fail = RuntimeError("engine died")
        guard = make_guard(engine)
        call = await ask(guard, COMPLETIONS, completion(5))
        assert call.error is engine.fail and clean(guard)

    run(scenario())


def test_cancelling_the_server_task_frees_the_tokens() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine)
        calls = await overload(engine, guard, 6)
        for call in calls:
            call.task.cancel()
        await asyncio.gather(*(call.task for call in calls), return_exceptions=True)
        assert clean(guard)

    run(scenario())


def test_a_client_that_stops_reading_is_given_up() -> None:
    async def scenario() -> None:
        guard = make_guard(FakeEngine(), send_timeout_s=0.02)
        call = await ask(guard, COMPLETIONS, completion(5), read_s=0.2)
        assert call.error is None and not call.done and clean(guard)

    run(scenario())


def test_a_slow_client_gets_everything() -> None:
    async def scenario() -> None:
        guard = make_guard(FakeEngine(), send_timeout_s=5)
        call = await ask(guard, COMPLETIONS, completion(5), read_s=0.01)
        assert call.body == b"data: {}\n\ndata: [DONE]\n\n" and clean(guard)

    run(scenario())


def test_keys_share_the_cache_by_tokens() -> None:
    """One key with twenty waiting requests, another with two: the second key's come next but one."""

    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, api_keys="hog,guest", queue_tokens=100_000, max_model_len=1024)
        engine.go.clear()
        order: list[str] = []

        async def call(key: str) -> None:
            answer = await ask(guard, COMPLETIONS, completion(900, 100), headers={"Authorization": f"Bearer {key}"})
            order.append(key if answer.status == 200 else f"{key} {answer.status}")

        hogs = [asyncio.ensure_future(call("hog")) for _ in range(8)]
        await settle()
        guests = [asyncio.ensure_future(call("guest")) for _ in range(2)]
        await settle()
        engine.go.set()
        await asyncio.wait_for(asyncio.gather(*hogs, *guests), 5)
        assert order.index("guest") <= 2 and order[:5].count("guest") == 2, order
        assert len(order) == 10 and clean(guard)

    run(scenario())


def test_a_burst_cannot_fill_the_queue_against_another_key() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, api_keys="hog,guest", queue_tokens=1024)
        hogs = await overload(engine, guard, 8, key="hog")
        guest = start(guard, COMPLETIONS, completion(200, 56), headers={"Authorization": "Bearer guest"})
        await settle()
        assert hogs[7].status == 429 and guest.status == 0  # the hog's newest made room
        engine.go.set()
        await asyncio.gather(guest.task, *(call.task for call in hogs))
        assert guest.status == 200 and [call.status for call in hogs] == [200] * 7 + [429] and clean(guard)

    run(scenario())


def test_keys_are_needed_everywhere_but_on_open_paths() -> None:
    async def scenario() -> None:
        guard = make_guard(FakeEngine(), api_keys="secret", open_paths="/health")
        for path in (COMPLETIONS, "/tokenize", "/metrics", "/v1/models", "/anything"):
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "Basic secret"},
                {"x-api-key": "sécret"},
            ):
                call = await ask(guard, path, completion(1), headers=headers)
                assert call.status == 401 and call.headers["www-authenticate"] == "Bearer", path
                assert "secret" not in call.body.decode()
        assert (await ask(guard, "/health", b"", method="GET")).status == 200
        assert (await ask(guard, COMPLETIONS, b"", method="OPTIONS")).status == 200
        for headers in (
            {"Authorization": "Bearer secret"},
            {"authorization": "bearer secret"},
            {"x-api-key": "secret"},
        ):
            assert (await ask(guard, COMPLETIONS, completion(1), headers=headers)).status == 200

    run(scenario())


def test_the_limit_of_the_body_holds_whatever_content_length_says() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, max_body_bytes=1000)
        big = b'{"prompt":"' + b"x" * 1000 + b'"}'
        for path in (COMPLETIONS, "/tokenize", "/v1/embeddings"):
            for headers in ({"content-length": str(len(big))}, {"content-length": "5"}, {}, {"content-length": "-1"}):
                call = await ask(guard, path, [big[:500], big[500:]], headers=headers)
                assert call.status == 413, (path, headers)
        assert not engine.bodies and clean(guard)

    run(scenario())


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe{", b'{"prompt":"a"', b"[" * 100_000],
)  # fmt: skip
def test_what_vllm_refuses_itself_is_passed_on_without_a_reservation(body: bytes) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine)
        await ask(guard, COMPLETIONS, body)
        assert engine.bodies == [body] and clean(guard)

    run(scenario())


@pytest.mark.parametrize(
    "text", ["{}", '{"prompt":null}', '{"prompt":[]}', '{"prompt":{}}', '{"messages":5}', '{"prompt":[["a"],"b",5]}']
)
@pytest.mark.parametrize(
    "path", [COMPLETIONS, CHAT, "/v1/responses", "/v1/messages", "/inference/v1/generate", "/invocations"]
)
def test_objects_of_no_known_shape_are_bounded_and_passed_on(path: str, text: str) -> None:
    """Should vLLM accept what the guard cannot read, it is still admitted by its bound, and never refused by it."""

    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine)
        engine.go.clear()
        call = start(guard, path, text.encode())
        await settle()
        assert guard.admission.ledger.reserved > 0
        engine.go.set()
        await call.task
        assert engine.bodies == [text.encode()] and clean(guard)

    run(scenario())


def test_a_bound_never_refuses() -> None:
    """500 bytes may be 125 tokens: without a tokenizer the whole context is reserved, and vLLM says if it is too long."""

    async def scenario() -> None:
        engine = FakeEngine(tokenize=False)
        guard = make_guard(engine)
        engine.go.clear()
        call = start(guard, COMPLETIONS, {"prompt": "word " * 200, "max_tokens": 100})
        await settle()
        assert guard.admission.ledger.reserved == 512
        engine.go.set()
        await call.task
        assert call.status == 200

    run(scenario())


def test_everything_that_vllm_gives_the_template_is_counted() -> None:
    body = {
        "model": "m", "messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}], "continue_final_message": True,
        "chat_template_kwargs": {"x": 1}, "reasoning_effort": "high", "documents": [{"text": "d"}], "temperature": 0.5,
    }  # fmt: skip
    query = read_body(CHAT, json.dumps(body).encode(), keep_ids=False)[0].prompts[0].query
    assert query is not None and json.loads(query) == {
        "model": "m", "messages": body["messages"], "tools": body["tools"], "continue_final_message": True,
        "chat_template_kwargs": {"x": 1, "enable_thinking": True, "reasoning_effort": "high", "documents": [{"text": "d"}]},
    }  # fmt: skip


def test_an_application_that_hides_the_limit_is_overruled() -> None:
    """FastAPI turns any error while it reads a body into a 400 of its own."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            while (await receive()).get("more_body"):
                pass
        except Exception:
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": b"error parsing the body"})

    async def scenario() -> None:
        call = await ask(make_guard(app, max_body_bytes=10), "/v1/embeddings", [b"12345", b"67890", b"1"])
        assert call.status == 413

    run(scenario())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig"])
def test_bodies_that_only_pythons_parser_reads_are_still_counted(encoding: str) -> None:
    """A reading of its own would let these past the guard: json.loads takes UTF-16, a byte order mark, lone surrogates and NaN."""

    async def scenario() -> None:
        guard = make_guard(FakeEngine())
        body = ('{"prompt": "\\ud800 ' + "w " * 600 + '", "temperature": NaN, "max_tokens": 5}').encode(encoding)
        assert (await ask(guard, COMPLETIONS, body)).status == 400
        assert clean(guard)

    run(scenario())


def test_duplicate_members_count_as_vllm_reads_them() -> None:
    async def scenario() -> None:
        guard = make_guard(FakeEngine())
        assert (await ask(guard, COMPLETIONS, b'{"prompt":"a","max_tokens":1,"max_tokens":600}')).status == 400
        assert (await ask(guard, COMPLETIONS, b'{"prompt":"a","max_tokens":600,"max_tokens":1}')).status == 200

    run(scenario())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    name=st.sampled_from(["prompt", "token_ids"]),
    hidden=st.sampled_from(['"prompt":[1,2]', '\\"prompt":[', "[", '"token_ids" : [5']),
    spaced=st.booleans(),
)
def test_a_long_array_of_ids_is_counted_as_the_parser_counts_it(
    seed: int, name: str, hidden: str, spaced: bool
) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(200_000) for _ in range(rng.randrange(8_000, 14_000))]
    body = json.dumps(
        {"user": hidden, name: ids, "other": {name: [1]}, "z": [hidden]}, indent=1 if spaced else None
    ).encode()
    short, span = shorten(body, (f'"{name}"'.encode(),))
    assert len(body) < 65536 or (span is not None and span.ids() == ids and span.count == len(ids))
    if span is not None:
        assert json.loads(short) == {"user": hidden, name: [MARKER], "other": {name: [1]}, "z": [hidden]}


def test_a_text_that_looks_like_an_array_of_ids_stays_text() -> None:
    """The whole text is counted, wherever it says "prompt":[1,1,...]."""
    text = 'see "prompt":[' + "1, " * 30_000 + "1]"
    body = json.dumps({"prompt": text, "max_tokens": 1}).encode()
    assert shorten(body, (b'"prompt"',)) == (body, None)
    nested = json.dumps({"prompt": "a b", "x": {"prompt": [1] * 40_000}, "max_tokens": 1}).encode()
    assert b'"a b"' in (read_body(COMPLETIONS, nested, False)[0].prompts[0].query or b"")
    twice = b'{"prompt":[' + b"1," * 40_000 + b'1],"prompt":[1,2,3]}'
    assert read_body(COMPLETIONS, twice, False)[0].prompts[0].ids == 3


def prefix_caching_scope() -> dict[str, Any]:
    config = SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=True), model_config=None)
    return {"app": SimpleNamespace(state=SimpleNamespace(vllm_config=config))}


def test_a_shared_beginning_is_counted_once_when_the_settings_say_so() -> None:
    async def scenario(prefix_hits: str) -> int:
        engine = FakeEngine(stream=[b": still alive\n\n", b"data: token\n\n"])
        scope = prefix_caching_scope()
        guard = make_guard(engine, prefix_hits=prefix_hits)
        first = start(guard, COMPLETIONS, completion(160, 16), scope=scope, read_s=0.3)
        while not first.first.is_set():
            await asyncio.sleep(0.001)
        second = start(guard, COMPLETIONS, completion(160, 16), scope=scope, read_s=1)
        await settle()
        early = guard.admission.ledger.reserved
        while len(first.chunks) < 2:  # the first has had its first token, not only vLLM's sign of life
            await asyncio.sleep(0.001)
        await settle()
        third = start(guard, COMPLETIONS, completion(160, 16), scope=scope, read_s=1)
        await settle()
        late = guard.admission.ledger.reserved
        for call in (first, second, third):
            call.task.cancel()
        await asyncio.gather(first.task, second.task, third.task, return_exceptions=True)
        assert clean(guard) and not guard.admission.ledger.held
        return late - early

    assert run(scenario("ignore")) == 176
    assert run(scenario("count")) == 176 - 144  # nine blocks of 16, the tenth holds the last token


def test_a_shared_beginning_fits_although_the_whole_would_not() -> None:
    async def scenario() -> None:
        engine = FakeEngine(stream=[b"data: token\n\n"])
        scope = prefix_caching_scope()
        guard = make_guard(engine, prefix_hits="count", queue_tokens=0, max_model_len=1024)
        first = start(guard, COMPLETIONS, completion(600, 16), scope=scope, read_s=0.2)
        while not first.chunks:
            await asyncio.sleep(0.001)
        second = await ask(
            guard, COMPLETIONS, completion(600, 16), scope=scope
        )  # 32 of its 624 tokens are new, 400 are free
        assert second.status == 200
        await first.task
        assert clean(guard)

    run(scenario())


def test_who_waits_starts_once_a_shared_beginning_is_computed() -> None:
    """Its 624 tokens do not fit beside another's 624 of 1,024; once that one has its first token 32 of them are new."""

    async def scenario() -> None:
        engine = FakeEngine(stream=[b"data: token\n\n", b"data: end\n\n"])
        engine.go.clear()
        scope = prefix_caching_scope()
        guard = make_guard(engine, prefix_hits="count", max_model_len=1024)
        calls = [start(guard, COMPLETIONS, completion(600, 16), scope=scope, read_s=0.5) for _ in range(2)]
        await settle(200)
        assert (engine.running, guard.admission.ledger.waiting) == (1, 1)
        engine.go.set()
        while not calls[0].chunks:
            await asyncio.sleep(0.001)
        await settle(200)
        assert (guard.admission.ledger.admitted, guard.admission.ledger.waiting) == (2, 0)
        for call in calls:
            call.task.cancel()
        await asyncio.gather(*(call.task for call in calls), return_exceptions=True)
        assert clean(guard)

    run(scenario())


@pytest.mark.parametrize("inside", ["1 2", "1,,2", "01"])
def test_a_long_array_that_is_no_json_is_left_to_the_server(inside: str) -> None:
    """Its ids are counted by their commas, so only reading them for the shared blocks finds out."""

    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, prefix_hits="count", max_model_len=512)
        body = b'{"prompt":[%b%b],"max_tokens":1}' % (inside.encode(), b" " * 70_000)
        call = await ask(guard, COMPLETIONS, body, scope=prefix_caching_scope())
        assert call.error is None and engine.bodies == [body] and clean(guard)

    run(scenario())


def test_without_tokenize_bytes_are_the_bound() -> None:
    async def scenario() -> None:
        engine = FakeEngine(tokenize=False)
        guard = make_guard(engine, template_tokens=0)
        engine.go.clear()
        call = start(guard, COMPLETIONS, {"prompt": "é" * 20, "max_tokens": 8})
        await settle()
        assert guard.admission.ledger.reserved == 48  # 40 bytes and 8 tokens
        engine.go.set()
        await call.task
        assert not guard.counter.has_tokenize and clean(guard)

    run(scenario())


def test_media_are_counted_by_their_bound_and_not_sent_to_the_tokenizer() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, media_tokens=100)
        engine.go.clear()
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}
        content = [{"type": "text", "text": "what is this"}, image]
        call = start(guard, CHAT, {"messages": [{"role": "user", "content": content}], "max_tokens": 9})
        await settle()
        assert guard.admission.ledger.reserved == 112
        call.hang_up()
        await call.task
        assert clean(guard)

    run(scenario())


def test_an_unknown_model_is_answered_in_the_servers_words() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine)
        call = await ask(guard, COMPLETIONS, completion(5, model="unknown"))
        assert call.status == 404 and call.json["error"]["message"] == "The model `unknown` does not exist."
        assert not engine.bodies and clean(guard)

    run(scenario())


def test_background_responses_are_refused() -> None:
    async def scenario() -> None:
        call = await ask(make_guard(FakeEngine()), "/v1/responses", {"input": "a", "background": True})
        assert call.status == 400 and call.json["error"]["param"] == "background"

    run(scenario())


def test_other_routes_pass_and_a_mounted_application_is_guarded_too() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine)
        for path in ("/v1/embeddings", "/v1/models", "/whatever"):
            call = await ask(guard, path, b"\x00 not json")
            assert call.status == 200
        assert engine.bodies == [b"\x00 not json"] * 3
        call = await ask(guard, "/api" + COMPLETIONS, completion(600), scope={"root_path": "/api"})
        assert call.status == 400

    run(scenario())


def test_a_storm_ends_with_every_request_answered_and_nothing_held() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        guard = make_guard(engine, queue_tokens=2048, queue_timeout_s=0.5)
        calls = []
        for index in range(300):
            call = start(
                guard,
                COMPLETIONS,
                completion(1 + index * 7 % 520, 1 + index * 13 % 100),
                headers={"Authorization": f"Bearer {index % 5}"},
            )
            calls.append(call)
            if index % 11 == 0:
                call.hang_up()
            if index % 30 == 0:
                await asyncio.sleep(0)
            assert guard.admission.ledger.reserved <= 1024
        await asyncio.wait_for(asyncio.gather(*(call.task for call in calls)), 20)
        statuses = {call.status for call in calls}
        assert statuses <= {0, 200, 400, 429} and {200, 400, 429} <= statuses
        assert all(call.status or index % 11 == 0 for index, call in enumerate(calls))
        assert all(call.error is None for call in calls) and clean(guard)

    run(scenario())
