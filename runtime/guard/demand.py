"""What a request needs: its sequences, its output tokens, and the parts of its prompt that have to be counted.

The guard reads a request as vLLM does: JSON with duplicate members resolved to the last, integers in pydantic's lax mode (true is 1, 5.0
is 5, "5" is 5). Where releases of vLLM read a body differently, or where the route leaves open which model reads it, every reading
counts and the largest is reserved. What vLLM would refuse is either refused here with its words or passed on for vLLM to refuse.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .idspan import IdSpan, is_marked
from .prompts import (
    Prompt,
    chat_prompts,
    completion_prompts,
    messages_prompts,
    parts_of_media,
    responses_prompts,
    token_prompts,
)
from .replies import Refusal, bad_request, too_many_prompts

CHAT, COMPLETION, RESPONSES, MESSAGES, COHERE, TOKENS = (
    "chat",
    "completion",
    "responses",
    "messages",
    "cohere",
    "tokens",
)

TOKEN_ROUTE, EITHER_ROUTE = "/inference/v1/generate", "/invocations"
ID_NAMES = ((b'"prompt"',), (b'"token_ids"',))  # where a body may hold a long array of ids: others, and TOKEN_ROUTE

# Routes that generate, and how their bodies read. `/invocations` is SageMaker's door to the same handlers: its body decides.
ROUTES = {
    "/v1/chat/completions": CHAT,
    "/v1/chat/completions/batch": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/cohere/v2/chat": COHERE,
    TOKEN_ROUTE: TOKENS,
    EITHER_ROUTE: None,
}
# The routes on which vLLM cuts a prompt to `truncate_prompt_tokens`; on others the member would only talk the guard into too little.
TRUNCATING = ("/v1/chat/completions", "/v1/completions", EITHER_ROUTE)

COMPLETION_DEFAULT = 16  # OpenAI's and vLLM's default of `max_tokens` for /v1/completions
MOST_PROMPTS = 8192  # of one request, whatever the pool; more would only keep the guard busy
MOST = 2**63 - 1  # vLLM's own integers end here or earlier

INTEGER = TypeAdapter(int | None)


def local_path(scope: dict[str, Any]) -> str:
    """The path as the application routes it: without the mount prefix (starlette._utils.get_route_path)."""
    path: str = scope["path"]
    prefix = scope.get("root_path", "")
    inside = path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", "/")
    return (path[len(prefix) :] if inside else path).rstrip("/") or "/"


@dataclass(frozen=True)
class Rules:
    """How one kind of request says how much it wants. Read from vLLM 0.32's request models (`to_sampling_params`, `get_max_tokens`).

    `fields`: where it says how many output tokens, in order of precedence. `absent`: what their absence means, None for what the
    server lets it use. A field that is null always counts as that: releases before 0.32 read null so on /v1/completions too, 0.32 as 16.
    `capped`: whether the server's own ceiling (`--override-generation-config`) lowers what is asked for, in every release.
    `n`: whether the kind has `n`; for other kinds it is reserved too, but nothing is refused for it.
    """

    prompts: Callable[[dict[str, Any]], list[Prompt]]
    fields: tuple[str, ...] = ("max_tokens",)
    absent: int | None = None
    capped: bool = False
    n: bool = False
    zero_is_silence: bool = False  # `max_completion_tokens or max_tokens`, as older releases say


def cohere_prompts(request: dict[str, Any]) -> list[Prompt]:
    return [Prompt(media=parts_of_media(request.get("messages")))]  # documents and tools in a shape of its own


RULES = {
    CHAT: Rules(chat_prompts, ("max_completion_tokens", "max_tokens"), capped=True, n=True, zero_is_silence=True),
    COMPLETION: Rules(completion_prompts, absent=COMPLETION_DEFAULT, n=True),
    RESPONSES: Rules(responses_prompts, ("max_output_tokens",)),
    MESSAGES: Rules(messages_prompts, capped=True),
    COHERE: Rules(cohere_prompts, capped=True, zero_is_silence=True),
    TOKENS: Rules(token_prompts, n=True),
}


class Unreadable(Exception):
    """Not even a JSON object, so nothing that vLLM could accept either: passed on, so that vLLM answers it."""


@dataclass
class Demand:
    """One reading of a request. `output` is None when the request does not say; `copies` are sequences for each prompt."""

    kind: str
    prompts: list[Prompt]
    output: int | None
    output_field: str
    copies: int = 1
    certain_copies: int = 1
    truncate: int | None = None
    uncapped: bool = False  # neither the server's default nor its ceiling lowers the output


def parse_json(body: bytes) -> Any:
    """As Starlette and so vLLM parse it: UTF-16, a byte order mark, lone surrogates and NaN included."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Unreadable from None


def read_demands(
    route: str, request: Any, span: IdSpan | None = None, most_prompts: int = MOST_PROMPTS
) -> list[Demand]:
    """Every way in which vLLM may read the request, at least one.

    `request` is the parsed body, in which a long array of ids may have been replaced by its marker (`span`).
    Raises Unreadable for what vLLM refuses itself, Refusal for numbers it refuses with words of its own.
    """
    if not isinstance(request, dict):
        raise Unreadable
    kind = ROUTES[route]
    kinds = [kind] if kind is not None else kinds_of(request)
    for name in ("prompt", "messages", "prompt_embeds"):
        several = request.get(name)
        if not isinstance(several, list) or len(several) <= most_prompts:
            continue
        if name == "prompt_embeds" or isinstance(several[0], str | list):
            raise too_many_prompts(len(several), most_prompts)
    found, refusals = [], []
    for one in kinds:
        try:
            found.append(read_as(one, route, request, span))
        except Refusal as refusal:  # then the other model reads it
            refusals.append(refusal)
    if not found:
        raise refusals[0]
    return found


def kinds_of(request: dict[str, Any]) -> list[str]:
    """vLLM tries the chat model first and, where it does not validate, the completion model: a wrong value anywhere decides."""
    completion = request.get("prompt") is not None or request.get("prompt_embeds") is not None
    if not isinstance(request.get("messages"), list):
        return [COMPLETION]
    return [CHAT, COMPLETION] if completion else [CHAT]


def read_as(kind: str, route: str, request: dict[str, Any], span: IdSpan | None) -> Demand:
    numbers, rules = request, RULES[kind]
    if kind == TOKENS:
        given = request.get("sampling_params")
        numbers = given if isinstance(given, dict) else {}
    if kind == RESPONSES and request.get("background"):
        raise bad_request(
            "background responses run on after their answer, where the KV cache guard cannot follow them; send background=false.",
            "background",
        )
    output, output_field = read_output(kind, numbers)
    n = max(1, integer(numbers, "n") or 1)
    prompts = rules.prompts(request) or [Prompt(media=parts_of_media(request))]
    reused = request.get("kv_transfer_params")
    ids = reused.get("prompt_token_ids") if isinstance(reused, dict) else None
    for prompt in prompts:
        if span is not None and is_marked(prompt.token_ids):
            prompt.ids, prompt.token_ids = span.count, span
        if isinstance(ids, list):  # a prefill server's ids, in place of the messages
            prompt.at_least = len(ids)
    return Demand(
        kind,
        prompts,
        output,
        output_field,
        copies=max(n, integer(numbers, "best_of") or 1),
        certain_copies=n if rules.n else 1,
        truncate=read_truncation(kind, route, request),
        uncapped=kind == TOKENS and "max_tokens" in numbers,
    )


def read_truncation(kind: str, route: str, request: dict[str, Any]) -> int | None:
    """The length to which vLLM cuts a prompt, -1 for what the context holds, None where it refuses instead."""
    if kind == RESPONSES and "truncation" in request:
        return None if request["truncation"] == "disabled" else -1
    return integer(request, "truncate_prompt_tokens") if route in TRUNCATING else None


def integer(request: dict[str, Any], name: str) -> int | None:
    try:
        value = INTEGER.validate_python(request.get(name))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]["msg"]
        raise bad_request(f"{name}: {detail}", param=name) from None
    if value is not None and abs(value) > MOST:
        raise bad_request(f"{name}: the number has too many digits; it must lie within 64 bits.", param=name)
    return value


def read_output(kind: str, request: dict[str, Any]) -> tuple[int | None, str]:
    """The output tokens asked for and the member that says so."""
    rules = RULES[kind]
    for name in rules.fields:
        value = integer(request, name)
        if value is None or (value == 0 and rules.zero_is_silence):
            continue
        if value < 0 or (value == 0 and kind != COMPLETION):
            raise bad_request(f"{name} must be at least 1, got {value}. (parameter={name}, value={value})", param=name)
        return max(value, 1), name  # echo with max_tokens 0 still runs one decoding step
    absent = not any(name in request for name in rules.fields)
    return (rules.absent if absent else None), rules.fields[0]
