"""Conversions that stop half way, and weights that are edited so that only reading them shows it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from m3quant.checkpoint import Checkpoint
from m3quant.checkpoint.content import BLOCK_BYTES, SAMPLED_BLOCKS
from m3quant.errors import StoppedError
from m3quant.running import stopping
from m3quant.running.progress import Silent
from tests.support.convert.common import run_convert


class StopsAfter(Silent):
    """Stops the run when this layer is done."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.line = f"layer {layer};"

    def say(self, line: str) -> None:
        super().say(line)
        if line.startswith(self.line):
            raise StoppedError("stopped by the test")


class SaidLines(Silent):
    """Keeps the lines that are printed."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


def interrupt(source: Path, out: Path, to: str = "int4", units: int = 2, **options: Any) -> None:
    """A conversion that stopped when `units` shards were finished. options: as of `run_convert`."""

    def check(self: stopping.StopFlag) -> None:
        records = out / ".m3quant" / "units.jsonl"
        if records.exists() and records.read_bytes().count(b"\n") >= units:
            raise stopping.InterruptedRun(2, "stopped")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(stopping.InterruptedRun):
        patch.setattr(stopping.StopFlag, "check", check)
        run_convert(source, out, to, **options)


def edit_unsampled(folder: Path, shard: str, tensor: str | None = None) -> None:
    """Flip bits of some weight that no sampled block holds, in place; size and mtime stay."""
    checkpoint, path = Checkpoint.open(folder), folder / shard
    header = checkpoint.shards[shard].header_bytes
    span = path.stat().st_size - header
    blocks = [header + (span - BLOCK_BYTES) * n // (SAMPLED_BLOCKS - 1) for n in range(SAMPLED_BLOCKS)]
    infos = [i for i in checkpoint.tensors.values() if i.shard == shard and tensor in (None, i.name)]
    at = next(
        place
        for info in infos
        for place in range(info.start, info.end)
        if all(not block <= place < block + BLOCK_BYTES for block in blocks)
    )
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1  # the lowest bit of a mantissa: no check of values sees it
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(path: Path, at: int) -> None:
    """Flip a bit; size and mtime stay."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
