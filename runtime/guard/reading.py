"""From a body to what the guard needs of it: pure, linear in its bytes, and small enough to be sent between processes.

A reading holds numbers and, for each prompt that has to be counted, the question to the server's /tokenize as bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pydantic_core

from .demand import CHAT, ID_NAMES, MOST_PROMPTS, RULES, TOKEN_ROUTE, Demand, Rules, parse_json, read_demands
from .idspan import IdSpan, is_marked, shorten
from .prompts import Prompt

PER_MEMBER = (
    16  # tokens a template may put around one member of a structure: a message's role, a tool's argument in markup
)
LONGEST_MODEL = 256  # characters of a name by which lengths of answers are remembered
MANY = 1024  # prompts of one request that are counted one by one; more are bounded by their bytes
# Bytes of all questions of one request, for each byte of its body (escapes may double them) and at least. What conversations share, tools
# for instance, is part of every question: a few bytes of body could otherwise ask for gigabytes.
QUERY_BYTES_A_BYTE, QUERY_BYTES = 4, 4 * 2**20

# What the chat route and /tokenize both take, with one meaning.
SHARED_FIELDS = (
    "model",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "tools",
)


@dataclass
class Counted:
    """One prompt as it is counted: `ids` are exact; a `query` asks the server; without an answer, `bound` is used, or the query's own.

    With neither of the three the context is the bound, and so it is for a template of the request's own.
    """

    ids: int | None = None
    query: bytes | None = None
    bound: int | None = None
    token_ids: list[int] | IdSpan | None = None
    media: int = 0
    extra: int = 0
    at_least: int = 0
    any_template: bool = False


@dataclass
class Reading:
    """One way in which the engine may read the body. `salt` distinguishes prompts whose blocks must not be shared."""

    kind: str
    prompts: list[Counted]
    output: int | None
    output_field: str
    copies: int
    certain_copies: int
    truncate: int | None
    uncapped: bool
    salt: str
    model: str

    @property
    def rules(self) -> Rules:
        return RULES[self.kind]

    @property
    def sequences(self) -> int:
        return len(self.prompts) * self.copies


def read_body(route: str, body: bytes, keep_ids: bool, most_prompts: int = MOST_PROMPTS) -> list[Reading]:
    """The readings of a body; raises what `read_demands` raises. `keep_ids`: keep short arrays of ids too, to name their blocks."""
    short, span = shorten(body, ID_NAMES[route == TOKEN_ROUTE])
    found = read_short(route, short, span, len(body), keep_ids, most_prompts)
    return read_whole(route, body, keep_ids, most_prompts) if found is None else found


def read_whole(route: str, body: bytes, keep_ids: bool, most_prompts: int) -> list[Reading]:
    """`read_body` without a look for a long array of ids."""
    found = read_short(route, body, None, len(body), keep_ids, most_prompts)
    assert found is not None
    return found


def read_short(
    route: str, short: bytes, span: IdSpan | None, size: int, keep_ids: bool, most_prompts: int
) -> list[Reading] | None:
    """`read_body` of a body of `size` bytes whose long array of ids was already taken out; None when that array is not its prompt."""
    request = parse_json(short)
    if span is not None and not (
        isinstance(request, dict) and is_marked(request.get(ID_NAMES[route == TOKEN_ROUTE][0].strip(b'"').decode()))
    ):
        return None
    return [digest(demand, request, size, keep_ids) for demand in read_demands(route, request, span, most_prompts)]


def digest(demand: Demand, request: dict[str, Any], size: int, keep_ids: bool) -> Reading:
    left = max(QUERY_BYTES_A_BYTE * size, QUERY_BYTES) if len(demand.prompts) <= MANY else 0
    structure: int | None = None  # the bound of any prompt that is a structure, counted once
    prompts = []
    for prompt in demand.prompts:
        one = Counted(prompt.ids, media=prompt.media, extra=prompt.extra, at_least=prompt.at_least)
        if prompt.ids is not None:
            if keep_ids or isinstance(prompt.token_ids, IdSpan):
                one.token_ids = prompt.token_ids
        elif not prompt.whole_context:
            query = tokenize_query(demand, prompt, request) if left > 0 else None
            one.query = None if query is None else to_bytes(query)
            left -= len(one.query or b"")
            one.any_template = bool(request.get("chat_template"))
            if not one.any_template and prompt.text is not None:
                one.bound = len(prompt.text.encode("utf-8", "surrogatepass"))
            elif not one.any_template and one.query is None:
                if structure is None:
                    structure = structure_bound(request, size)
                one.bound = structure
        prompts.append(one)
    return Reading(
        demand.kind,
        prompts,
        demand.output,
        demand.output_field,
        demand.copies,
        demand.certain_copies,
        demand.truncate,
        demand.uncapped,
        f"{request.get('model')}\0{request.get('cache_salt')}" if keep_ids else "",
        model if isinstance(model := request.get("model"), str) and len(model) <= LONGEST_MODEL else "",
    )


def to_bytes(query: dict[str, Any]) -> bytes | None:
    try:
        return pydantic_core.to_json(query)
    except ValueError:  # lone surrogates
        pass
    try:
        return json.dumps(query).encode()
    except RecursionError:
        return None


def tokenize_query(demand: Demand, prompt: Prompt, body: dict[str, Any]) -> dict[str, Any] | None:
    if prompt.text is not None:
        query = {"model": body.get("model"), "prompt": prompt.text}
        if "add_special_tokens" in body:
            query["add_special_tokens"] = body["add_special_tokens"]
        return query
    if prompt.messages is None:
        return None
    if demand.kind == CHAT:
        shared = {name: body[name] for name in SHARED_FIELDS if body.get(name) is not None}
        return {**shared, "messages": prompt.messages, **template_arguments(body)}
    return {"model": body.get("model"), "messages": prompt.messages}


def template_arguments(body: dict[str, Any]) -> dict[str, Any]:
    """What vLLM's chat route gives the template in addition to the messages (`ChatCompletionRequest.build_chat_params`)."""
    given = body.get("chat_template_kwargs")
    arguments = dict(given) if isinstance(given, dict) else {}
    effort = body.get("reasoning_effort")
    if effort is not None:
        arguments.setdefault("enable_thinking", effort != "none")
        arguments["reasoning_effort"] = effort
    if body.get("documents") is not None:
        arguments["documents"] = body["documents"]
    return {"chat_template_kwargs": arguments} if arguments else {}


def structure_bound(request: dict[str, Any], size: int) -> int:
    """Tokens at most, without the template's own: the UTF-8 bytes, and the markup that may surround the members of a structure.

    JSON text is never shorter than the string it represents, so the body bounds its contents.
    """
    return size + PER_MEMBER * members(request)


def query_bound(query: bytes) -> int:
    """The same bound of messages, from the question that could not be answered: every member's name ends in a quote and a colon."""
    return len(query) + PER_MEMBER * query.count(b'":')


def members(value: Any) -> int:
    """Members of objects and arrays in a JSON value, at every depth."""
    found, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            found += len(item)
            left += item.values()
        elif isinstance(item, list):
            found += len(item)
            left += item
    return found
