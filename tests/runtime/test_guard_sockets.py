"""The guard behind a real HTTP server (uvicorn, as vLLM uses it): what sockets do that ASGI messages do not show."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from m3quant.runtime.guard import Guard, GuardSettings
from tests.support.runtime.guard_app import FakeEngine, completion, make_guard

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


class Engine(FakeEngine):
    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await super().__call__(scope, receive, send)


def serve(guard: Guard, scenario: Callable[[int], Awaitable[None]]) -> None:
    class Quiet(uvicorn.Server):
        def install_signal_handlers(self) -> None: ...

        def capture_signals(self) -> Any:
            from contextlib import nullcontext

            return nullcontext()

    async def main() -> None:
        guard._chain_signals = lambda: None  # type: ignore[method-assign]  # the signals of this process belong to pytest
        server = Quiet(uvicorn.Config(guard, host="127.0.0.1", port=0, log_level="error", lifespan="on"))
        task = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            await asyncio.wait_for(scenario(server.servers[0].sockets[0].getsockname()[1]), 20)
        finally:
            server.should_exit = True
            await task

    asyncio.run(main())


async def talk(
    port: int, *parts: bytes, pause_s: float = 0.0, close_after: bool = False, leave: asyncio.Event | None = None
) -> bytes:
    """Sends the parts; returns all that comes back, or nothing when it closes right after sending, or at `leave`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(pause_s)
    if leave is not None:
        await leave.wait()
    answer = b"" if close_after or leave else await reader.read()
    writer.close()
    return answer


def request(body: bytes, length: int | None = None) -> bytes:
    return HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


def chunked(*chunks: bytes) -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


async def until(guard: Guard, true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(guard.state())


async def idle(guard: Guard) -> None:
    ledger = guard.admission.ledger
    await until(guard, lambda: (ledger.reserved, ledger.admitted, ledger.waiting, len(guard.inside)) == (0, 0, 0, 0))


BODY = json.dumps(completion(20, 12)).encode()


def test_chunked_slow_and_short_bodies() -> None:
    engine = Engine()
    guard = make_guard(engine, max_body_bytes=4096)

    async def scenario(port: int) -> None:
        assert b" 200 OK" in await talk(port, chunked(BODY[:7], BODY[7:]))
        whole = request(BODY)
        assert b" 200 OK" in await talk(port, *(whole[at : at + 40] for at in range(0, len(whole), 40)), pause_s=0.005)
        assert engine.bodies == [BODY, BODY]
        await talk(
            port, request(BODY, length=len(BODY) + 50), close_after=True
        )  # promises more than it sends, and leaves
        assert b" 413 " in await talk(port, request(BODY, length=5000))
        assert b" 413 " in await talk(port, chunked(*[b" " * 1000] * 5))
        shorter = await talk(port, request(BODY, length=10))  # the rest is no second request
        assert b" 200 OK" in shorter and engine.bodies[-1] == BODY[:10]  # not JSON: passed on as it came
        await idle(guard)
        assert len(engine.bodies) == 3

    serve(guard, scenario)


def test_hanging_up_waiting_running_and_while_streaming() -> None:
    engine = Engine(stream=[b"x" * 1000] * 50)
    guard = make_guard(engine)

    async def scenario(port: int) -> None:
        engine.go.clear()
        body = request(json.dumps(completion(200, 56)).encode())
        leave_running, leave_waiting = asyncio.Event(), asyncio.Event()
        running = [asyncio.ensure_future(talk(port, body, leave=leave_running)) for _ in range(4)]
        await until(guard, lambda: guard.admission.ledger.admitted == 4)
        waiting = [asyncio.ensure_future(talk(port, body, leave=leave_waiting)) for _ in range(3)]
        await until(guard, lambda: guard.admission.ledger.waiting == 3)
        leave_waiting.set()
        await asyncio.gather(*waiting)
        await until(guard, lambda: guard.admission.ledger.waiting == 0)
        leave_running.set()
        await asyncio.gather(*running)
        await idle(guard)
        assert engine.aborted == 4 and engine.most == 4
        engine.go.set()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(body)
        assert b" 200 OK" in await reader.readline()
        writer.close()
        await idle(guard)

    serve(guard, scenario)


def test_a_client_that_reads_nothing_is_given_up() -> None:
    engine = Engine(stream=[b"x" * 2**20] * 64)
    guard = make_guard(engine, send_timeout_s=0.2, send_floor_bytes_s=2**20)

    async def scenario(port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(request(BODY))
        await until(
            guard, lambda: guard.admission.ledger.admitted == 1
        )  # the stream is stuck in the client's full buffer
        await idle(guard)
        writer.close()

    serve(guard, scenario)


async def read_slowly(port: int, bytes_a_turn: int, until_s: float) -> int:
    """Asks, and reads that many bytes every twentieth of a second; the bytes read until the server ends it or the time is over."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.write(request(BODY))
    read, loop = 0, asyncio.get_running_loop()
    end = loop.time() + until_s
    while loop.time() < end and (piece := await reader.read(bytes_a_turn)):
        read += len(piece)
        await asyncio.sleep(0.05)
    writer.close()
    return read


@pytest.mark.parametrize(("floor", "given_up"), [(100 * 2**20, True), (1, False)])
def test_a_client_that_hardly_reads_is_given_up_below_the_floor(floor: int, given_up: bool) -> None:
    """It reads all the time, so no single message waits for long, and the pool is held for the whole stream all the same."""
    engine = Engine(stream=[b"x" * 2**16] * 1024)
    guard = make_guard(engine, send_timeout_s=0.5, send_floor_bytes_s=floor)

    async def scenario(port: int) -> None:
        stalled = guard.metrics.request_of("stalled")._value.get
        before = stalled()
        reading = asyncio.ensure_future(read_slowly(port, 2**17, 15.0 if given_up else 1.5))
        await until(guard, lambda: guard.admission.ledger.admitted == 1)
        await reading  # until the server ends it, or the client has had enough
        await idle(guard)
        assert (stalled() > before) is given_up

    serve(guard, scenario)


def test_a_wrong_start_ends_the_server(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(Engine(), GuardSettings(pool_tokens=16, block_size=16, max_model_len=16))

    async def main() -> None:
        server = uvicorn.Server(uvicorn.Config(guard, host="127.0.0.1", port=0, log_level="error", lifespan="on"))
        try:
            await server.serve()
        except SystemExit as error:  # newer releases leave by themselves
            assert error.code == 3
        assert not server.started

    asyncio.run(main())
    assert "A KV cache of 16 tokens in blocks of 16 leaves nothing to serve from." in caplog.text
