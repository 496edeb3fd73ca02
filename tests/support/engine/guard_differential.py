"""The guard's computed maximum against what the real vLLM may use, for generated bodies on every guarded route.

    M3QUANT_ENGINE_PYTHON=ENGINE/bin/python python -m tests.support.engine.guard_differential [--bodies 2000] [--seed 0] [--json FILE]

vLLM parses, renders and tokenizes each body as it always does; instead of generating, it records what its engine is asked for
(guard_recorder.py). Half of the bodies meet a server with `--override-generation-config`. Exits with 1 when the guard reserved less than
the engine may use, and prints those bodies.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.support.engine.guard_bodies import Bodies
from tests.support.engine.guarded_server import Server, importable

CONTEXT, VOCABULARY = 1024, 2000
OVERRIDE = ("--override-generation-config", '{"max_new_tokens": 300}')
ARGUMENTS = ("--enable-scale-out", "--enable-auto-tool-choice", "--tool-call-parser", "minimax_m2")


@dataclass
class Seen:
    """One body. `reserved` is -1 and `used` 0 where the engine was never asked, because the guard or vLLM refused."""

    route: str
    status: int
    used: int
    reserved: int

    @property
    def asked(self) -> bool:
        return self.reserved >= 0


@contextlib.contextmanager
def recording(work: Path, override: bool) -> Iterator[Server]:
    path = importable(work / "path-recorder")
    (path / "guard_recorder.py").symlink_to(Path(__file__).with_name("guard_recorder.py"))
    arguments = (*ARGUMENTS, *(OVERRIDE if override else ()), "--middleware", "guard_recorder.Recorder")
    paths = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {"PYTHONPATH": paths, "VLLM_ENABLE_COHERE_API": "1", "M3QUANT_GUARD_POOL_TOKENS": str(2**40)}
    server = Server(work, guard=False, max_model_len=CONTEXT, env=env, arguments=arguments)
    try:
        yield server.wait_ready(600)
    finally:
        server.stop()


def send(server: Server, route: str, body: bytes) -> Seen:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", route, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        with contextlib.suppress(http.client.IncompleteRead):  # a stream that had begun
            answer.read()
    finally:
        connection.close()
    recorded = json.loads(server.get("/recorded")[1])  # after the whole answer: a stream may ask the engine late
    return Seen(route, answer.status, recorded["used"], recorded["reserved"])


def compare(server: Server, bodies: int, seed: int) -> tuple[list[Seen], list[tuple[Seen, bytes]]]:
    """What was seen of every body, and those for which the guard reserved less than the engine may use."""
    source = Bodies(seed, CONTEXT, VOCABULARY)
    seen, short = [], []
    for _ in range(bodies):
        route, body = source.draw()
        found = send(server, route, body)
        seen.append(found)
        if found.asked and found.reserved < found.used:
            short.append((found, body))
    return seen, short


def table(seen: list[Seen]) -> dict[str, dict[str, Any]]:
    """By route: bodies, how many reached the engine, and how much more than needed was reserved for them."""
    found = {}
    for route in dict.fromkeys(one.route for one in sorted(seen, key=lambda one: one.route)):
        mine = [one for one in seen if one.route == route]
        ratios = [one.reserved / one.used for one in mine if one.asked and one.used]
        found[route] = {
            "bodies": len(mine),
            "reached_the_engine": len(ratios),
            "reserved_exactly": sum(ratio == 1 for ratio in ratios),
            "median_reserved_over_used": round(median(ratios), 2) if ratios else None,
            "least_reserved_over_used": round(min(ratios), 2) if ratios else None,
            "statuses": dict(Counter(one.status for one in mine if not one.asked)),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seen: list[Seen] = []
    short: list[tuple[Seen, bytes]] = []
    for number, override in enumerate((False, True)):
        with tempfile.TemporaryDirectory() as work, recording(Path(work), override) as server:
            more, fell_short = compare(server, options.bodies // 2, options.seed + number)
            seen, short = seen + more, short + fell_short
    for one, body in short:
        print(f"reserved {one.reserved}, may use {one.used}: {one.route} {body[:4000].decode()}", file=sys.stderr)
    routes = table(seen)
    for route, figures in routes.items():
        print(f"{route:30} {json.dumps(figures)}")
    print(f"{len(seen)} bodies, {sum(one.asked for one in seen)} reached the engine, {len(short)} reserved too little")
    if options.json:
        record = {"bodies": len(seen), "seed": options.seed, "reserved_too_little": len(short), "routes": routes}
        options.json.write_text(json.dumps(record | {"short": [asdict(one) for one, _ in short]}, indent=1) + "\n")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
