"""The prompts in a request, by kind of route: token ids, text, or messages for the chat template.

What is None in all three is bounded by the size of the body. Nothing is counted here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .idspan import IdSpan

TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking")


@dataclass
class Prompt:
    """One prompt: token ids known, or text, or messages for the chat template; none of them where only the body's size is a bound."""

    ids: int | None = None
    token_ids: list[int] | IdSpan | None = None
    text: str | None = None
    messages: list[Any] | None = None
    media: int = 0
    extra: int = 0  # tokens that may be added to the counted ones
    at_least: int = 0  # token ids that may replace the messages
    whole_context: bool = (
        False  # length cannot be known here (a stored conversation, embeddings): the context is the bound
    )


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
    return isinstance(part, str) or (isinstance(part, dict) and part.get("type") in TEXT_PARTS)


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
    if isinstance(suffix := request.get("suffix"), str):  # models that fill in the middle render it into the prompt
        extra = len(suffix.encode("utf-8", "surrogatepass"))
        for one in found:
            one.extra = extra
    return found


def token_prompts(request: dict[str, Any]) -> list[Prompt]:
    ids = request.get("token_ids")
    if not isinstance(ids, list):
        return []
    parts = request.get("content_parts")
    return [Prompt(ids=len(ids), token_ids=ids, media=len(parts) if isinstance(parts, list) else 0)]


def responses_prompts(request: dict[str, Any]) -> list[Prompt]:
    if request.get("previous_response_id") or request.get("previous_input_messages") or calls_tools(request):
        return [Prompt(whole_context=True)]
    given = request.get("input")
    system = request.get("instructions")
    if has(request, "chat_template_kwargs", "reasoning", "tools"):  # what they add is the engine's own affair
        return [Prompt()]
    messages: list[Any] = [{"role": "system", "content": system}] if isinstance(system, str) else []
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
        return [Prompt(messages=messages)]
    if not isinstance(given, list):
        return []
    plain = [item for item in given if isinstance(item, dict) and item.get("type", "message") == "message"]
    if len(plain) != len(given):  # tool calls, reasoning, files: their rendering is the engine's own; bytes bound them
        return [Prompt(media=parts_of_media(given))]
    prompt = conversation([{"role": item.get("role"), "content": item.get("content")} for item in plain])
    return [Prompt(messages=messages + as_chat(prompt.messages or []), media=prompt.media)]


def calls_tools(request: dict[str, Any]) -> bool:
    """Tools that the server runs itself: each call and its result is one more turn, up to the context."""
    tools = request.get("tools")
    return isinstance(tools, list) and any(not isinstance(t, dict) or t.get("type") != "function" for t in tools)


def has(request: dict[str, Any], *names: str) -> bool:
    return any(request.get(name) for name in names)


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
    plain = not has(request, "tools", "chat_template_kwargs", "thinking", "output_config")
    if simple and plain and (system is None or isinstance(system, str)):
        before = [{"role": "system", "content": system}] if system else []
        return [Prompt(messages=[*before, *messages])]
    return [Prompt(media=parts_of_media(messages))]


def parts_of_media(value: Any) -> int:
    """Objects of a type that is not text, at any depth: an image in a tool's result counts as one in a message."""
    found, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            kind = item.get("type")
            found += isinstance(kind, str) and any(
                word in kind for word in ("image", "document", "audio", "video", "file")
            )
            left += item.values()
        elif isinstance(item, list):
            left += item
    return found
