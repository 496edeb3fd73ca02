"""Tokens of an answer, from its bytes."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from m3quant.runtime.guard.tally import Tally


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def chunk(text: str, reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": reason}]})


def seen(*bodies: bytes) -> Tally:
    tally = Tally()
    for body in bodies:
        tally.see(body)
    return tally


def test_events_are_counted_however_they_are_joined() -> None:
    rng = random.Random()
    events = [chunk(f"word {number}") for number in range(50)]
    bodies = []
    while events:
        bodies.append(b"".join(events[: (count := rng.randint(1, 4))]))
        del events[:count]
    assert seen(*bodies).tokens == 50


def test_what_the_engine_says_is_exact() -> None:
    usage = {"prompt_tokens": 7, "total_tokens": 40, "completion_tokens": 33, "completion_tokens_details": {"x": 1}}
    assert seen(chunk("a b c"), event({"choices": [], "usage": usage}), event(b"[DONE]")).tokens == 33
    assert seen(json.dumps({"choices": [], "usage": usage}).encode()).tokens == 33
    assert seen(json.dumps({"usage": {"input_tokens": 3, "output_tokens": 12}}).encode()).tokens == 12
    start = event({"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 0}}})
    assert seen(start, event({"type": "content_block_delta"}), event({"type": "content_block_delta"})).tokens == 3


@pytest.mark.parametrize(
    ("body", "cut"),
    [
        (chunk("x", "length"), True),
        (chunk("x", "stop"), False),
        (event({"delta": {"stop_reason": "max_tokens"}}), True),
        (event({"delta": {"stop_reason": "end_turn"}}), False),
        (event({"response": {"status": "incomplete"}}), True),
        (event({"response": {"status": "completed"}}), False),
        (event({"response": {"status": "failed"}}), True),
        (chunk("x", "abort"), True),
        (event({"error": {"message": "EngineCore died", "code": 500}}), True),
        (b"event: error\n" + event(b'{"type":"error","error":{"type":"internal_error"}}'), True),
        (json.dumps({"output": [], "error": None}).encode(), False),
    ],
)
def test_an_answer_that_was_cut_is_known(body: bytes, cut: bool) -> None:
    assert seen(body).cut is cut


def test_what_the_engine_repeats_of_a_request_is_no_count() -> None:
    tools = [{"type": "function", "name": "f", "parameters": {"output_tokens": 4096}}]
    begun = event({"type": "response.created", "response": {"tools": tools, "usage": None}})
    ended = event({"type": "response.completed", "response": {"tools": tools, "usage": {"output_tokens": 3}}})
    assert seen(begun).tokens == 1 and seen(begun + chunk("x")).tokens == 2
    assert seen(begun, ended).tokens == seen(begun + ended).tokens == 3


@pytest.mark.parametrize(
    "text", ['"completion_tokens": 9', '{"finish_reason":"length"}', '\ndata: {"output_tokens":9}\ndata:']
)
def test_what_a_model_writes_is_no_member_and_no_event(text: str) -> None:
    tally = seen(chunk(text))
    assert (tally.tokens, tally.cut) == (1, False)
