"""What a request asks for: its sequences, its output tokens, and what has to be counted of its prompt.

The guard reads a request as vLLM does: JSON with duplicate members resolved to the last, integers in pydantic's lax mode (true is 1, 5.0
is 5, "5" is 5). What vLLM would refuse is either refused here with its words or passed on for vLLM to refuse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .idspan import MARKER, IdSpan, shorten
from .replies import bad_request

CHAT, COMPLETION, RESPONSES, MESSAGES, COHERE, TOKENS = (
    "chat",
    "completion",
    "responses",
    "messages",
    "cohere",
    "tokens",
)

TOKEN_ROUTE = "/inference/v1/generate"
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
    "/invocations": None,
}

# Where each kind says how many tokens it wants, in order of precedence.
OUTPUT_FIELDS = {
    CHAT: ("max_completion_tokens", "max_tokens"),
    COMPLETION: ("max_tokens",),
    RESPONSES: ("max_output_tokens",),
    MESSAGES: ("max_tokens",),
    COHERE: ("max_tokens",),
    TOKENS: ("max_tokens",),
}
# The routes on which vLLM cuts a prompt to `truncate_prompt_tokens`; on others the member would only talk the guard into too little.
TRUNCATING = ("/v1/chat/completions", "/v1/completions")
COMPLETION_DEFAULT = 16  # OpenAI's and vLLM's default of `max_tokens` for /v1/completions

INTEGER = TypeAdapter(int | None)


class Unreadable(Exception):
    """Not even a JSON object, so nothing that vLLM could accept either: passed on, so that vLLM answers it."""


@dataclass
class Prompt:
    """One prompt: token ids known, or text, or messages for the chat template; none of them where only the body's size is a bound."""

    ids: int | None = None
    token_ids: list[int] | IdSpan | None = None
    text: str | None = None
    messages: list[Any] | None = None
    media: int = 0
    whole_context: bool = (
        False  # length cannot be known here (a stored conversation, embeddings): the context is the bound
    )


@dataclass
class Demand:
    kind: str
    body: dict[str, Any]
    prompts: list[Prompt]
    output: int | None  # tokens asked for each sequence, None when the request does not say
    output_field: str
    copies: int = 1  # sequences generated for each prompt
    truncate: int | None = None
    tools: list[Any] | None = field(default=None)


def parse_json(body: bytes) -> Any:
    """As Starlette and so vLLM parse it: UTF-16, a byte order mark, lone surrogates and NaN included."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Unreadable from None


def read_demand(route: str, body: bytes) -> Demand:
    """Raises Unreadable for what vLLM refuses itself, Refusal for numbers it refuses with words of its own."""
    short, span = shorten(body, ID_NAMES[route == TOKEN_ROUTE])
    request = parse_json(short)
    if not isinstance(request, dict):
        raise Unreadable
    kind = ROUTES[route] or kind_of(request)
    numbers = request
    if kind == TOKENS:
        given = request.get("sampling_params")
        numbers = given if isinstance(given, dict) else {}
    if kind == RESPONSES and request.get("background"):
        raise bad_request(
            "background responses run on after their answer, where the KV cache guard cannot follow them; send background=false.",
            "background",
        )
    output, output_field = read_output(kind, numbers)
    copies = max(1, integer(numbers, "n") or 1, integer(numbers, "best_of") or 1)
    truncate = integer(request, "truncate_prompt_tokens") if route in TRUNCATING else None
    prompts = PROMPTS[kind](request) or [Prompt()]
    for prompt in prompts:
        if span is not None and prompt.token_ids == [MARKER]:
            prompt.ids, prompt.token_ids = span.count, span
    tools = request.get("tools") if isinstance(request.get("tools"), list) else None
    return Demand(kind, request, prompts, output, output_field, copies, truncate, tools)


def kind_of(request: dict[str, Any]) -> str:
    if "messages" in request:
        return CHAT
    if "prompt" in request or "prompt_embeds" in request:
        return COMPLETION
    if "input" in request:
        return RESPONSES
    return COMPLETION  # vLLM refuses it; until then its bytes bound it


def integer(request: dict[str, Any], name: str) -> int | None:
    try:
        value = INTEGER.validate_python(request.get(name))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]["msg"]
        raise bad_request(f"{name}: {detail}", param=name) from None
    return value


def read_output(kind: str, request: dict[str, Any]) -> tuple[int | None, str]:
    fields = OUTPUT_FIELDS[kind]
    for name in fields:
        value = integer(request, name)
        if value is None:
            continue
        if value < 0 or (value == 0 and kind not in (COMPLETION, CHAT)):
            raise bad_request(f"{name} must be at least 1, got {value}. (parameter={name}, value={value})", param=name)
        return max(value, 1), name  # echo with max_tokens 0 still runs one decoding step
    return (COMPLETION_DEFAULT if kind == COMPLETION else None), fields[0]


def chat_prompts(request: dict[str, Any]) -> list[Prompt]:
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        return []
    if all(isinstance(item, list) for item in messages):  # the batch route: one conversation each
        return [conversation(item) for item in messages]
    return [conversation(messages)]


def conversation(messages: list[Any]) -> Prompt:
    """Text messages for the template; media parts are taken out and counted by their bound."""
    kept, media = [], 0
    for message in messages:
        if not isinstance(message, dict):
            return Prompt()
        content = message.get("content")
        if isinstance(content, list):
            parts = [part for part in content if is_text(part)]
            media += len(content) - len(parts)
            message = {**message, "content": parts}
        kept.append(message)
    return Prompt(messages=kept, media=media)


def is_text(part: Any) -> bool:
    return isinstance(part, str) or (
        isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text", "refusal", "thinking")
    )


def completion_prompts(request: dict[str, Any]) -> list[Prompt]:
    found = []
    if embeds := request.get("prompt_embeds"):
        found += [Prompt(whole_context=True) for _ in (embeds if isinstance(embeds, list) else [embeds])]
    prompt = request.get("prompt")
    if isinstance(prompt, str):
        found.append(Prompt(text=prompt))
    elif isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) for item in prompt):
            found += [Prompt(text=item) for item in prompt]
        elif all(isinstance(item, list) for item in prompt):
            found += [Prompt(ids=len(item), token_ids=item) for item in prompt]
        else:  # numbers, also written as 1.0 or "1" among them: pydantic takes those for token ids
            found.append(Prompt(ids=len(prompt), token_ids=prompt))
    return found


def token_prompts(request: dict[str, Any]) -> list[Prompt]:
    ids = request.get("token_ids")
    if not isinstance(ids, list):
        return []
    parts = request.get("content_parts")
    return [Prompt(ids=len(ids), token_ids=ids, media=len(parts) if isinstance(parts, list) else 0)]


def responses_prompts(request: dict[str, Any]) -> list[Prompt]:
    if request.get("previous_response_id") or request.get("previous_input_messages"):
        return [Prompt(whole_context=True)]
    given = request.get("input")
    system = request.get("instructions")
    messages: list[Any] = [{"role": "system", "content": system}] if isinstance(system, str) else []
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
        return [Prompt(messages=messages)]
    if not isinstance(given, list):
        return []
    plain = [item for item in given if isinstance(item, dict) and item.get("type", "message") == "message"]
    if len(plain) != len(given):  # tool calls, reasoning, files: their rendering is the engine's own; bytes bound them
        return [Prompt()]
    prompt = conversation([{"role": item.get("role"), "content": item.get("content")} for item in plain])
    return [Prompt(messages=messages + as_chat(prompt.messages or []), media=prompt.media)]


def as_chat(messages: list[Any]) -> list[Any]:
    """Responses name their text parts input_text and output_text, chat names them text."""
    renamed = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            texts = [
                part if isinstance(part, str) else part.get("text") or part.get("refusal") or "" for part in content
            ]
            message = {**message, "content": "".join(str(text) for text in texts)}
        renamed.append(message)
    return renamed


def messages_prompts(request: dict[str, Any]) -> list[Prompt]:
    """Anthropic's route: its blocks (tool_use, tool_result, thinking) are rendered by the engine in its own way; bytes bound them."""
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        return []
    simple = all(isinstance(item, dict) and isinstance(item.get("content"), str) for item in messages)
    system = request.get("system")
    if simple and (system is None or isinstance(system, str)) and not request.get("tools"):
        before = [{"role": "system", "content": system}] if system else []
        return [Prompt(messages=[*before, *messages])]
    media = sum(
        1
        for item in messages
        if isinstance(item, dict) and isinstance(item.get("content"), list)
        for part in item["content"]
        if isinstance(part, dict) and part.get("type") in ("image", "document")
    )
    return [Prompt(media=media)]


PROMPTS = {
    CHAT: chat_prompts,
    COMPLETION: completion_prompts,
    RESPONSES: responses_prompts,
    MESSAGES: messages_prompts,
    COHERE: lambda request: [Prompt()],  # documents and tools in a shape of its own
    TOKENS: token_prompts,
}
