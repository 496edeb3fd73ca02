"""One tensor, one shard: what is stored of a source tensor, and the shard that takes tensors in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import ShardRecord, ShardWriter
from ..planning.engine_kept import PASSED_THROUGH
from ..planning.unit import SHARD_METADATA, PlannedTensor, Unit
from ..quant.dead_experts import without_dead
from ..quant.formats import compress
from ..quant.integer import ensure_finite
from ..quant.reading import SourceReader, densify

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class UnitWriter:
    """A shard whose tensors may come in any order: they wait until it is their turn in the file."""

    def __init__(self, output: Path, unit: Unit) -> None:
        self._shard = ShardWriter(output, unit.shard, unit.entries, SHARD_METADATA)
        self._names = [name for name, _, _ in unit.entries]
        self._waiting: dict[str, Tensor] = {}
        self._next = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        self._waiting.update(tensors)
        while self._next < len(self._names) and self._names[self._next] in self._waiting:
            name = self._names[self._next]
            self._shard.write(name, self._waiting.pop(name))
            self._next += 1

    def append(self, views: Sequence[memoryview], tensors: int) -> None:
        """The next bytes of the file, in which `tensors` tensors end; only where nothing waits for its turn."""
        assert not self._waiting, "tensors in any order and bytes in file order do not go together"
        self._shard.append(views, tensors)
        self._next += tensors

    def close(self) -> ShardRecord:
        return self._shard.close()

    def abort(self) -> None:
        self._shard.abort()


def quantize_tensor(reader: SourceReader, planned: PlannedTensor, fmt: str, device: torch.device) -> dict[str, Tensor]:
    """The output tensors of one source tensor, rounded to nearest, on the CPU. Raises CheckpointError on NaN/Inf."""
    source = planned.source
    raw = reader.checkpoint.read_many([part.name for part in planned.read])
    if planned.action == "copy":
        _check_copied(planned, raw)
        return raw
    dense = densify(source, {name: tensor.to(device) for name, tensor in raw.items()})
    if planned.action == "dequantize":
        return {planned.name: dense.cpu()}
    return store(planned, dense, fmt)


def store(
    planned: PlannedTensor, weight: Tensor, fmt: str, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> dict[str, Tensor]:
    """Compress one weight [N, K] under the plan's output names, on the CPU. scale, zero_point: searched ranges, or min-max."""
    parts = compress(weight, planned.scheme, fmt, scale, zero_point, name=planned.name)
    return named(planned, parts)


def named(planned: PlannedTensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the plan stores of `parts` by suffix, under its names, on the CPU."""
    return {output.name: parts[output.name.removeprefix(f"{planned.module}.")].cpu() for output in planned.outputs}


def _check_copied(planned: PlannedTensor, raw: dict[str, Tensor]) -> None:
    """A NaN in a tensor whose meaning we know is a broken download; unknown ones are passed through as they are."""
    if planned.role.kind in PASSED_THROUGH:
        return
    for name, tensor in raw.items():
        if tensor.dtype in FLOATS:
            ensure_finite(without_dead(tensor) if planned.role.kind == "router_bias" else tensor, name)


def shard_facts(record: ShardRecord) -> dict[str, Any]:
    """What the journal keeps of a finished shard."""
    return {"shard": record.name, "size": record.size, "sha256": record.sha256}
