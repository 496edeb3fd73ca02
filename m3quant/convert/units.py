"""One unit of a data-free conversion: read, quantize, write, with the next tensors read while this one is written."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import ShardRecord, ShardWriter
from ..plan import PASSED_THROUGH, SHARD_METADATA, PlannedTensor, Unit
from ..quant.formats import compress
from ..quant.integer import ensure_finite
from ..reading import SourceReader, densify
from .stopping import StopFlag

# Tensors in flight beside the one being written: enough to keep disk and cores busy, a fraction of a layer in memory.
MAX_WORKERS = 8
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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

    def close(self) -> ShardRecord:
        return self._shard.close()

    def abort(self) -> None:
        self._shard.abort()


def quantize_tensor(reader: SourceReader, planned: PlannedTensor, fmt: str, device: torch.device) -> dict[str, Tensor]:
    """The output tensors of one source tensor, rounded to nearest, on the CPU. Raises CheckpointError on NaN/Inf."""
    source = planned.source
    raw = reader.checkpoint.read_many(source.names)
    if planned.action == "copy":
        _check_copied(planned, raw)
        return raw
    dense = densify(source, raw)
    if planned.action == "dequantize":
        return {planned.name: dense}
    return store(planned, dense.to(device), fmt)


def store(
    planned: PlannedTensor, weight: Tensor, fmt: str, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> dict[str, Tensor]:
    """Compress one weight [N, K] under the plan's output names, on the CPU. scale, zero_point: searched ranges, or min-max."""
    parts = compress(weight, planned.scheme, fmt, scale, zero_point, name=planned.name)
    return {f"{planned.module}.{suffix}": tensor.cpu() for suffix, tensor in parts.items()}


def _check_copied(planned: PlannedTensor, raw: dict[str, Tensor]) -> None:
    """A NaN in a tensor whose meaning we know is a broken download; unknown ones are passed through as they are."""
    if planned.role.kind in PASSED_THROUGH:
        return
    for name, tensor in raw.items():
        if tensor.dtype in _FLOATS:
            ensure_finite(tensor, name)


def shard_facts(record: ShardRecord) -> dict[str, Any]:
    """What the journal keeps of a finished shard."""
    return {"shard": record.name, "size": record.size, "sha256": record.sha256}


def convert_unit(
    output: Path,
    unit: Unit,
    reader: SourceReader,
    fmt: str,
    device: torch.device,
    stop: StopFlag,
    on_bytes: Callable[[int], None],
) -> ShardRecord:
    """Write one unit's shard. on_bytes is told the source bytes of every finished tensor. Aborts the shard on any error."""
    writer = UnitWriter(output, unit)
    workers = min(MAX_WORKERS, os.cpu_count() or 1)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="quantize") as pool:
            jobs = ((t, pool.submit(quantize_tensor, reader, t, fmt, device)) for t in unit.tensors)
            for planned, tensors in _in_order(jobs, workers + 1):
                stop.check()
                writer.add(tensors)
                on_bytes(planned.source.stored_bytes)
        return writer.close()
    except BaseException:
        writer.abort()
        raise


def _in_order(
    jobs: Iterable[tuple[PlannedTensor, Future[dict[str, Tensor]]]], ahead: int
) -> Iterable[tuple[PlannedTensor, dict[str, Tensor]]]:
    """Results in order, with at most `ahead` jobs submitted and not yet consumed."""
    waiting: deque[tuple[PlannedTensor, Future[dict[str, Tensor]]]] = deque()
    try:
        for job in jobs:
            waiting.append(job)
            if len(waiting) >= ahead:
                planned, future = waiting.popleft()
                yield planned, future.result()
        while waiting:
            planned, future = waiting.popleft()
            yield planned, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
