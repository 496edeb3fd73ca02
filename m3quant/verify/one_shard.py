"""verify's checks of one shard by itself, as soon as it is finished: of an output that leaves the disk shard by shard.

What is left for the end needs no weights: that the shards together are the checkpoint that the plan and config.json describe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ..artifact.output import hash_problems, read_manifest
from ..artifact.partly import open_output, recorded_plan
from ..artifact.uploads import read_uploads
from ..checkpoint import Checkpoint, TensorInfo
from ..checkpoint.header import parse_header
from ..checkpoint.reader import read_header, read_ranges
from ..planning.unit import Unit
from .stored import unit_stored_problems
from .structure import structure_problems
from .verification import Check, Report

# What a shard passes here and on the Hub, in the words of the card.
CHECKS = ["its header is the planned one", "every value is finite", "no scale is zero", "the Hub states its sha256"]


class _Shard:
    """A `stored.Stored` of one file. Raises CheckpointError for one that is no shard."""

    def __init__(self, folder: Path, name: str) -> None:
        path = folder / name
        _, raw, stamp = read_header(path)
        header = parse_header(raw, stamp.size, name, str(path))
        self.tensors = {info.name: info for info in header.tensors}
        self._folder, self._stamps = folder, {name: stamp}

    def peek(self, ranges: Iterable[tuple[TensorInfo, int, memoryview]]) -> None:
        read_ranges(self._folder, ranges, self._stamps)


def shard_problems(output: Path, unit: Unit) -> Iterator[str]:
    """What is wrong with a finished shard. Raises CheckpointError for a file that is no shard."""
    shard = _Shard(output, unit.shard)
    if [(info.name, info.dtype, info.shape) for info in shard.tensors.values()] != unit.entries:
        yield f"{unit.shard}: its header is not the one that was planned"
        return
    yield from unit_stored_problems(unit, shard)


def verify_streamed(output: Path, say: Report, converted: Checkpoint | None = None) -> list[Check]:
    """What `verify` looks at of an output whose shards were checked one by one and uploaded: all but their bytes.

    converted: the output, if it is open already; a model of many experts takes seconds to open. Raises VerifyError or CheckpointError where there is nothing to check.
    """
    manifest = read_manifest(output)
    uploads = read_uploads(output)
    uploaded = set(uploads.shards) if uploads else set()
    plan = recorded_plan(output)
    converted = converted or open_output(output, plan)
    checks = []
    for name, looked_at, problems in (
        ("structure", "headers, config.json, engine names", structure_problems(converted, plan, manifest, None)),
        ("hashes", "files beside the shards", hash_problems(output, manifest, but=uploaded)),
    ):
        say(f"{name} ...")
        checks.append(Check(name, looked_at, list(problems)))
    return checks
