"""Latency that the guard adds in front of an application that answers at once, over real connections (uvicorn, keep-alive).

    python -m tests.benchmarks.guard_latency [--seconds 5] [--rounds 3] [--json FILE]

Two servers, one bare and one guarded, and one client, each a process of its own. Both servers take turns, so that other work on the machine
falls on both. Every request is a chat of its own text (nothing can be cached) and asks for 16 tokens; the application reads its JSON,
as any would, and the guard's question to /tokenize is answered by the same application. Reported:

- closed loop: 1, 50 and 500 connections that ask again as soon as they are answered: p50, p99, requests per second;
- open loop: 200 requests per second over 50 connections, whatever the answers do: p50, p99, measured from the planned instant;
- CPU time of the server process for each request.

Quantiles are of all rounds together, and `added` is guarded less bare.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

POOL = {"pool_tokens": 4_000_000, "block_size": 16, "max_model_len": 100_000}
WORDS = ("the house of a truth universally acknowledged that single man in want " * 12).split()
OPEN_RATE, OPEN_CONNECTIONS = 200, 50
CLOSED = (1, 50, 500)


async def instant(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Reads the body as JSON and answers; /tokenize counts words."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    answer = b"{}"
    if scope["path"] == "/cpu":
        answer = json.dumps(time.process_time()).encode()
    elif parts != [b""]:
        asked = json.loads(b"".join(parts))
        if scope["path"] == "/tokenize":
            ids = list(range(sum(len(message["content"].split()) for message in asked["messages"])))
            answer = json.dumps({"count": len(ids), "max_model_len": 100_000, "tokens": ids}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


def serve(guarded: bool, port: int) -> None:
    import uvicorn

    app: Any = instant
    if guarded:
        from tests.support.runtime.guard_app import make_guard

        app = make_guard(instant, **POOL)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


@dataclass
class Samples:
    """Seconds each request took, the server's CPU seconds, and how long it all lasted."""

    took: list[float] = field(default_factory=list)
    cpu: float = 0.0
    lasted: float = 0.0

    def figures(self) -> dict[str, float]:
        took = sorted(self.took)
        at = {"p50_ms": 0.5, "p99_ms": 0.99}
        found = {name: round(1000 * took[min(len(took) - 1, int(len(took) * share))], 3) for name, share in at.items()}
        cpu = round(1000 * self.cpu / len(took), 3)
        return {**found, "requests": len(took), "requests_s": round(len(took) / self.lasted), "cpu_ms": cpu}


class Connection:
    def __init__(self, port: int) -> None:
        self.port = port
        self.number = 0

    async def open(self) -> Connection:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def ask(self, number: int) -> None:
        words = [*WORDS[number % 97 :], str(number)]
        body = {"model": "m", "messages": [{"role": "user", "content": " ".join(words)}], "max_tokens": 16}
        raw = json.dumps(body).encode()
        answer = await self.exchange(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n", raw)
        if answer != b"{}":
            raise RuntimeError(f"answered {answer!r}")

    async def exchange(self, head: bytes, body: bytes) -> bytes:
        self.writer.write(head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        length = 0
        status = await self.reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"answered {status!r}")
        while (line := await self.reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return await self.reader.readexactly(length)

    async def cpu(self) -> float:
        return float(json.loads(await self.exchange(b"GET /cpu HTTP/1.1\r\nHost: x\r\n", b"")))

    def close(self) -> None:
        self.writer.close()


async def closed_loop(port: int, connections: int, seconds: float, samples: Samples) -> None:
    async def work(connection: Connection, first: int) -> None:
        number = first
        while time.perf_counter() < end:
            began = time.perf_counter()
            await connection.ask(number)
            samples.took.append(time.perf_counter() - began)
            number += connections

    opened = [await Connection(port).open() for _ in range(connections)]
    before, began = await opened[0].cpu(), time.perf_counter()
    end = began + seconds
    await asyncio.gather(*(work(connection, at) for at, connection in enumerate(opened)))
    samples.lasted += time.perf_counter() - began
    samples.cpu += await opened[0].cpu() - before
    for connection in opened:
        connection.close()


async def open_loop(port: int, seconds: float, samples: Samples) -> None:
    """Each connection asks at its own fixed instants; a late answer delays that connection's next one, and the delay counts."""
    step = OPEN_CONNECTIONS / OPEN_RATE

    async def work(connection: Connection, at: int) -> None:
        for turn in range(int(seconds / step)):
            planned = began + (turn + at / OPEN_CONNECTIONS) * step
            await asyncio.sleep(max(0.0, planned - time.perf_counter()))
            await connection.ask(turn * OPEN_CONNECTIONS + at)
            samples.took.append(time.perf_counter() - planned)

    opened = [await Connection(port).open() for _ in range(OPEN_CONNECTIONS)]
    before, began = await opened[0].cpu(), time.perf_counter() + 0.05
    await asyncio.gather(*(work(connection, at) for at, connection in enumerate(opened)))
    samples.lasted += time.perf_counter() - began
    samples.cpu += await opened[0].cpu() - before
    for connection in opened:
        connection.close()


def start(guarded: bool) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.benchmarks.guard_latency",
            "--serve",
            "guarded" if guarded else "bare",
            str(port),
        ],
        cwd=ROOT,
    )
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return process, port
        time.sleep(0.1)
    raise RuntimeError("the server did not start")


async def measure(seconds: float, rounds: int) -> dict[str, dict[str, Any]]:
    servers = {"bare": start(False), "guarded": start(True)}
    plans: dict[str, dict[str, Samples]] = {}
    try:
        for _, port in servers.values():  # start-up and first imports are not measured
            await closed_loop(port, 1, 0.5, Samples())
        for _ in range(rounds):
            for connections in CLOSED:
                for name, (_, port) in servers.items():
                    samples = plans.setdefault(f"closed, {connections}", {}).setdefault(name, Samples())
                    await closed_loop(port, connections, seconds, samples)
            for name, (_, port) in servers.items():
                samples = plans.setdefault(f"open, {OPEN_RATE}/s over {OPEN_CONNECTIONS}", {}).setdefault(
                    name, Samples()
                )
                await open_loop(port, seconds, samples)
    finally:
        for process, _ in servers.values():
            process.terminate()
        for process, _ in servers.values():
            process.wait(10)
    return {plan: compare(found) for plan, found in plans.items()}


def compare(found: dict[str, Samples]) -> dict[str, Any]:
    bare, guarded = found["bare"].figures(), found["guarded"].figures()
    added = {name: round(guarded[name] - bare[name], 3) for name in ("p50_ms", "p99_ms", "cpu_ms")}
    return {"bare": bare, "guarded": guarded, "added": added}


def table(runs: dict[str, dict[str, Any]]) -> str:
    """In Markdown, a row a plan and server; `added` has no rate of its own."""
    columns = list(dict.fromkeys(column for found in runs.values() for figures in found.values() for column in figures))
    lines = [["load", "server", *columns], ["---"] * (len(columns) + 2)]
    for plan, found in runs.items():
        lines += [[plan, name, *(str(figures.get(c, "")) for c in columns)] for name, figures in found.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2] == "guarded", int(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = asyncio.run(measure(options.seconds, options.rounds))
    print(table(runs))
    if options.json:
        versions = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
        options.json.write_text(json.dumps({"versions": versions, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
