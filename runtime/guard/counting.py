"""How many tokens a prompt has, by the server's own tokenizer and chat template.

The count comes from the application's `/tokenize` route, called in the same process: no network, vLLM's own renderer and templates, and an
interface that is public. Where there is none (another server, a body that route cannot express), the bound is the number of UTF-8 bytes:
a byte-level BPE token covers at least one byte of text, so the prompt has at most that many tokens, plus an allowance for what the
template adds. Which of the two was used is a label in the metrics.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pydantic_core

from .demand import CHAT, Demand, Prompt
from .idspan import IdSpan, shorten
from .inbox import Message
from .pool import Pool
from .replies import Refusal
from .settings import GuardSettings

logger = logging.getLogger("vllm.m3quant.guard")

PER_MESSAGE = 16  # tokens a template may put around one message: role names and separators

# What the chat route and /tokenize both take, with one meaning.
SHARED_FIELDS = (
    "model",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "tools",
)

App = Callable[..., Awaitable[None]]


@dataclass
class Count:
    """`exact` counts can be refused; a bound only reserves, at most what the context holds, and leaves the refusal to the engine."""

    tokens: int
    method: str  # "ids", "tokenize", "bytes" or "context"
    exact: bool
    token_ids: list[int] | IdSpan | None = None


class Counter:
    def __init__(self, app: App, settings: GuardSettings) -> None:
        self.app = app
        self.settings = settings
        self.has_tokenize = settings.count == "tokenize"
        self._slots = asyncio.Semaphore(settings.tokenize_concurrency)

    async def count(self, demand: Demand, prompt: Prompt, scope: dict[str, Any], size: int, pool: Pool) -> Count:
        """Tokens of one prompt. `size` is the body's length in bytes. Raises the server's own 404 (unknown model) as a Refusal."""
        found = await self._count(demand, prompt, scope, size, pool)
        if prompt.media:
            found.tokens += prompt.media * self.settings.media_tokens
            found.exact = False
        if demand.truncate is not None:
            limit = demand.truncate if demand.truncate >= 0 else pool.max_model_len - 1
            found.tokens = min(found.tokens, limit)
        return found

    async def _count(self, demand: Demand, prompt: Prompt, scope: dict[str, Any], size: int, pool: Pool) -> Count:
        if prompt.whole_context:
            return Count(pool.longest, "context", False)
        if prompt.ids is not None:
            return Count(prompt.ids, "ids", True, prompt.token_ids)
        if self.has_tokenize and (query := tokenize_query(demand, prompt)) is not None:
            async with self._slots:
                if (counted := await self._tokenize(query, scope)) is not None:
                    return counted
        return Count(byte_bound(prompt, demand, size, self.settings.template_tokens), "bytes", False)

    async def _tokenize(self, query: dict[str, Any], scope: dict[str, Any]) -> Count | None:
        try:
            async with asyncio.timeout(self.settings.tokenize_timeout_s):
                status, answer = await self._ask(to_bytes(query), scope)
        except Exception:  # whatever went wrong inside the application, the byte bound is still right
            return None
        try:
            short, span = shorten(answer, (b'"tokens"',))
            parsed = pydantic_core.from_json(short)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            return None
        if status == 200 and isinstance(parsed.get("count"), int):
            tokens = span if span is not None else parsed.get("tokens")
            return Count(parsed["count"], "tokenize", True, tokens if isinstance(tokens, list | IdSpan) else None)
        error = parsed.get("error")
        if status == 404 and isinstance(error, dict) and error.get("param") == "model":
            kind = str(error.get("type", "NotFoundError"))
            raise Refusal(404, str(error.get("message", "")), kind, "unknown_model", param="model")
        if status == 404:
            self.has_tokenize = False  # it will not appear later
            logger.warning(
                "m3quant guard: the server has no /tokenize; prompts are counted by their UTF-8 bytes, an upper bound."
            )
        return None

    async def _ask(self, body: bytes, scope: dict[str, Any]) -> tuple[int, bytes]:
        path = scope.get("root_path", "") + "/tokenize"
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [
            (name, value) for name, value in scope["headers"] if name in (b"authorization", b"host", b"x-api-key")
        ]
        inner = {**scope, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
        status, chunks, sent = 500, [], False

        async def receive() -> Message:
            nonlocal sent
            if sent:
                await asyncio.get_running_loop().create_future()  # the asker never hangs up
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                chunks.append(message.get("body", b""))

        await self.app(inner, receive, send)
        return status, b"".join(chunks)


def to_bytes(query: dict[str, Any]) -> bytes:
    try:
        return pydantic_core.to_json(query)
    except ValueError:  # lone surrogates
        return json.dumps(query).encode()


def tokenize_query(demand: Demand, prompt: Prompt) -> dict[str, Any] | None:
    body = demand.body
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
    if demand.tools:  # other routes write their tools in another shape
        return None
    return {"model": body.get("model"), "messages": prompt.messages}


def template_arguments(body: dict[str, Any]) -> dict[str, Any]:
    """What vLLM's chat route gives the template beside the messages (`ChatCompletionRequest.build_chat_params`)."""
    given = body.get("chat_template_kwargs")
    arguments = dict(given) if isinstance(given, dict) else {}
    effort = body.get("reasoning_effort")
    if effort is not None:
        arguments.setdefault("enable_thinking", effort != "none")
        arguments["reasoning_effort"] = effort
    if body.get("documents") is not None:
        arguments["documents"] = body["documents"]
    return {"chat_template_kwargs": arguments} if arguments else {}


def byte_bound(prompt: Prompt, demand: Demand, size: int, template_tokens: int) -> int:
    """UTF-8 bytes of what is rendered, and the template's allowance.

    JSON text is never shorter than the string it stands for, so serialised messages bound their contents.
    """
    if prompt.text is not None:
        return len(prompt.text.encode("utf-8", "surrogatepass")) + template_tokens
    if prompt.messages is None:
        return size + template_tokens
    parts = [prompt.messages, demand.tools, demand.body.get("chat_template_kwargs"), demand.body.get("documents")]
    text = "".join(json.dumps(part, ensure_ascii=False) for part in parts if part)
    return len(text.encode("utf-8", "surrogatepass")) + template_tokens + PER_MESSAGE * len(prompt.messages)
