"""The guard's answers, in the shape and the words of vLLM.

Clients and routers recognise an over-long prompt by vLLM's text ("This model's maximum context length is ..."), so it is kept.
Texts as vLLM 0.32 and 0.33 send them; `over_context` is what its releases up to 0.2x said instead of clamping.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Header = tuple[bytes, bytes]


@dataclass
class Refusal(Exception):
    """An answer instead of the application's. `reason` is the label in the metrics."""

    status: int
    message: str
    kind: str
    reason: str
    param: str | None = None
    headers: list[Header] = field(default_factory=list)

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return json.dumps({"error": error}, separators=(",", ":")).encode()


def bad_request(message: str, param: str | None, reason: str = "invalid") -> Refusal:
    return Refusal(400, message, "BadRequestError", reason, param)


def never_fits(message: str, param: str, value: int) -> Refusal:
    """What no wait would help. Ends as vLLM's messages do, with the parameter that is at fault."""
    return bad_request(f"{message} (parameter={param}, value={value})", param, "never_fits")


def prompt_too_long(limit: int, prompt: int) -> Refusal:
    return never_fits(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains {prompt} input tokens, which "
        f"exceeds this limit even without any output tokens. Please reduce the length of the input prompt.",
        "input_tokens",
        prompt,
    )


def too_many_output_tokens(name: str, asked: int, limit: int) -> Refusal:
    message = f"{name}={asked} cannot be greater than max_model_len={limit}. Please request fewer output tokens."
    return never_fits(message, name, asked)


def over_context(limit: int, prompt: int, output: int) -> Refusal:
    return never_fits(
        f"This model's maximum context length is {limit} tokens. However, you requested {output} output tokens and your prompt "
        f"contains {prompt} input tokens, for a total of {prompt + output} tokens. Please reduce the length of the input prompt "
        "or the number of requested output tokens.",
        "input_tokens",
        prompt,
    )


def too_many_sequences(sequences: int, tokens: int, pool: int) -> Refusal:
    return bad_request(
        f"The {sequences} sequences of this request need {tokens} tokens of KV cache together, and this server has {pool}. "
        f"Please send fewer prompts or a smaller n in one request.",
        "n",
        "never_fits",
    )


def too_many_prompts(prompts: int, most: int) -> Refusal:
    return bad_request(
        f"This request has {prompts} prompts, and this server takes {most} in one: each needs a block of KV cache of its own. "
        f"Please send fewer prompts in one request.",
        "prompt",
        "never_fits",
    )


def unauthorized() -> Refusal:
    return Refusal(
        401, "Unauthorized", "AuthenticationError", "unauthorized", headers=[(b"www-authenticate", b"Bearer")]
    )


def body_too_large(limit: int) -> Refusal:
    return Refusal(
        413, f"The request body is larger than {limit} bytes.", "RequestEntityTooLargeError", "body_too_large"
    )


def busy(message: str, reason: str, retry_after: int) -> Refusal:
    return Refusal(429, message, "TooManyRequestsError", reason, headers=[retry(retry_after)])


def unavailable(message: str, reason: str, retry_after: int) -> Refusal:
    return Refusal(503, message, "ServiceUnavailableError", reason, headers=[retry(retry_after)])


def retry(seconds: int) -> Header:
    return (b"retry-after", str(seconds).encode())


async def send_json(send: Any, status: int, body: bytes, headers: Sequence[Header] = ()) -> None:
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


async def send_refusal(send: Any, refusal: Refusal) -> None:
    await send_json(send, refusal.status, refusal.body(), refusal.headers)
