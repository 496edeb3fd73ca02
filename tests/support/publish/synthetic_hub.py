"""The test Hub in a process of its own, with a synthesized checkpoint on it and a sink for what is uploaded.

    python -m tests.support.publish.synthetic_hub tests/data/minimax-m2.7/config.json --repo base/M2.7 --down 1GB --up 1GB

The first line on stdout is JSON: the address, the repo's commit, its bytes, the token. Then, for every line on stdin, one of what went out
and came in so far (`Stats`). It ends with stdin.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.publish.client import TOKEN
from tests.support.publish.hub_server import running_hub
from tests.support.publish.synthetic import POOL_BYTES, SHARD_BYTES, SyntheticModel

UNITS = {"": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def rate(text: str) -> float:
    """Bytes of 200MB, 1GB, 5e8."""
    number = text.rstrip("kMGB")
    return float(number) * UNITS[text[len(number) :]]


@dataclass(frozen=True)
class Started:
    """A server that runs. commit: of the repo's main; size: of its shards; hashed: seconds that their sha256 took."""

    url: str
    repo: str
    commit: str
    size: int
    hashed: float
    token: str
    process: subprocess.Popen[str]

    def stats(self) -> dict[str, int]:
        """down: bytes of the repo's shards that went out; up: bytes of large files that came in; of all other repos, shards: on their
        mains; public: how many a stranger sees."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: dict[str, int] = json.loads(self.process.stdout.readline())
        return found


@contextmanager
def started(config: Path, repo: str, down: str | None, up: str | None, beside: Path, *more: str) -> Iterator[Started]:
    """beside: a folder of files that lie beside the shards (tokenizer, licence, card)."""
    limits = [*(["--down", down] if down else []), *(["--up", up] if up else [])]
    words = [str(config), "--repo", repo, "--beside", str(beside), *limits, *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.publish.synthetic_hub", *words],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        yield Started(**json.loads(process.stdout.readline()), process=process)
    finally:
        process.stdin.close()
        process.wait(timeout=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--repo", default="base/synthetic")
    parser.add_argument("--beside", type=Path, default=None, help="folder of files beside the shards")
    parser.add_argument("--shard-bytes", type=rate, default=SHARD_BYTES)
    parser.add_argument("--pool-bytes", type=rate, default=POOL_BYTES)
    parser.add_argument("--down", type=rate, default=None, help="bytes a second out")
    parser.add_argument("--up", type=rate, default=None, help="bytes a second in")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    beside = {p.name: p.read_bytes() for p in sorted(asked.beside.iterdir())} if asked.beside else {}
    model = SyntheticModel(asked.config, asked.seed, int(asked.shard_bytes), int(asked.pool_bytes), beside)
    with running_hub() as hub:
        hub.users = {TOKEN: ("someone", "write")}
        hub.discards = True
        hub.part_bytes = 64 * 2**20
        hub.lfs_from = 10_000_000
        begun = time.monotonic()
        repo = model.add_to(hub, asked.repo, os.cpu_count() or 1)
        hub.down.bytes_per_second, hub.up.bytes_per_second = asked.down, asked.up
        facts: dict[str, Any] = {"url": hub.url, "repo": repo.name, "commit": repo.head, "size": model.size}
        print(json.dumps({**facts, "hashed": time.monotonic() - begun, "token": TOKEN}), flush=True)
        for _ in sys.stdin:
            others = [r for r in hub.repos.values() if r is not repo]
            shards = [path for r in others for path in r.tree() if path.endswith(".safetensors")]
            public = sum(hub.public_view(r.name) is not None for r in others)
            stats = {"down": hub.shard_bytes(repo.name), "up": hub.received(), "shards": len(shards), "public": public}
            print(json.dumps(stats), flush=True)


if __name__ == "__main__":
    main()
