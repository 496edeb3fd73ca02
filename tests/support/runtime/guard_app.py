"""A small ASGI server side and client side for the guard's tests: an application that generates, and a client that can misbehave."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from m3quant.runtime.guard import Guard, GuardSettings

POOL = {"pool_tokens": 1040, "block_size": 16, "max_model_len": 512}  # 1024 usable tokens


def make_guard(app: Any, **settings: Any) -> Guard:
    return Guard(app, GuardSettings(**{**POOL, **settings}))


class FakeEngine:
    """Counts words on /tokenize, answers the other routes when asked to continue; remembers what it got."""

    def __init__(self, stream: list[bytes] | None = None, tokenize: bool = True) -> None:
        self.stream = stream or [b"data: {}\n\n", b"data: [DONE]\n\n"]
        self.tokenize = tokenize
        self.go = asyncio.Event()
        self.go.set()
        self.bodies: list[bytes] = []
        self.scopes: list[dict[str, Any]] = []
        self.running = 0
        self.most = 0
        self.aborted = 0
        self.fail: Exception | None = None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["path"].endswith("/tokenize"):
            await self.answer_tokenize(body, send)
            return
        self.bodies.append(body)
        self.scopes.append(scope)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.generate(receive, send)
        finally:
            self.running -= 1

    async def generate(self, receive: Any, send: Any) -> None:
        waits = [asyncio.ensure_future(self.go.wait()), asyncio.ensure_future(receive())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not waits[0].done():
            waits[0].cancel()
            self.aborted += 1
            return
        waits[1].cancel()
        if self.fail is not None:
            raise self.fail
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for chunk in self.stream:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def answer_tokenize(self, body: bytes, send: Any) -> None:
        asked = json.loads(body)
        status, answer = 200, {}
        if not self.tokenize:
            status, answer = 404, {"detail": "Not Found"}
        elif asked.get("model") == "unknown":
            error = {
                "message": "The model `unknown` does not exist.",
                "type": "NotFoundError",
                "param": "model",
                "code": 404,
            }
            status, answer = 404, {"error": error}
        else:
            text = asked.get("prompt") or " ".join(as_text(m["content"]) for m in asked["messages"])
            answer = {"count": len(text.split()), "tokens": [hash(word) % 1000 for word in text.split()]}
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


def as_text(content: Any) -> str:
    return content if isinstance(content, str) else " ".join(part["text"] for part in content)


@dataclass
class Call:
    """One request and what came back of it. `hang_up` ends the connection."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    done: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    first: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None
    task: asyncio.Task[None] | None = None

    def hang_up(self) -> None:
        self.gone.set()

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def start(
    app: Any,
    path: str,
    body: bytes | list[bytes] | Any,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    read_s: float = 0.0,
    scope: dict[str, Any] | None = None,
) -> Call:
    """Sends a request in a task of its own. `body` is bytes, a list of chunks, or something to send as JSON; `read_s` per message read."""
    call = Call()
    chunks = body if isinstance(body, list) and all(isinstance(c, bytes) for c in body) and body else [to_bytes(body)]
    messages = [
        {"type": "http.request", "body": chunk, "more_body": at < len(chunks) - 1} for at, chunk in enumerate(chunks)
    ]

    async def receive() -> dict[str, Any]:
        if messages:
            await asyncio.sleep(0)
            return messages.pop(0)
        await call.gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if read_s:
            await asyncio.sleep(read_s)
        if call.gone.is_set():
            return  # as uvicorn: what is sent after the client has gone is dropped
        if message["type"] == "http.response.start":
            call.status = message["status"]
            call.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            call.chunks.append(message.get("body", b""))
            call.first.set()
            if not message.get("more_body"):
                call.done = True
                call.gone.set()

    sent = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    base = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "headers": sent,
        "query_string": b"",
    }

    async def run() -> None:
        try:
            await app({**base, **(scope or {})}, receive, send)
        except Exception as error:
            call.error = error

    call.task = asyncio.ensure_future(run())
    return call


def to_bytes(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


async def ask(app: Any, path: str, body: Any, **options: Any) -> Call:
    call = start(app, path, body, **options)
    assert call.task is not None
    await asyncio.wait_for(call.task, 10)
    return call


def completion(words: int, output: int | None = 16, **more: Any) -> dict[str, Any]:
    return {"prompt": " ".join(["word"] * words), "max_tokens": output, **more}


async def settle(turns: int = 20) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)
