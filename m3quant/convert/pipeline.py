"""Data-free conversion of units at the disk's speed: reading, rounding and writing at once, in bounded memory.

Each worker takes a batch from the disk to the bytes of its shard: it reads into its own buffer (pinned where there is a
GPU), rounds from buffer to buffer (on a GPU through a stream of its own), and hands the result to the calling thread,
which appends and hashes results in file order. Workers run ahead over the end of a unit, but a unit is on the disk
and in the journal before the first byte of the next is written: a kill costs one unit.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint import ShardRecord, torch_dtype
from ..checkpoint.reader import bytes_view
from ..planning.batches import (
    AHEAD,
    ALIGNMENT,
    COPY,
    CPU_BATCH_BYTES,
    FUSED,
    GPU_BATCH_BYTES,
    MAX_WORKERS,
    WHOLE,
    Batch,
    Item,
    aligned,
    in_source_order,
    make_batches,
    output_ranges,
    output_views,
    staged_parts,
)
from ..planning.engine_kept import PASSED_THROUGH
from ..planning.unit import Unit
from ..quant.dead_experts import without_dead
from ..quant.fused import compress_into
from ..quant.integer import ensure_finite
from ..quant.reading import SourceReader, densify
from ..running.stopping import StopFlag
from ..running.timing import span
from .units import FLOATS, UnitWriter, quantize_tensor

if TYPE_CHECKING:
    from .gpu_stage import GpuStage


@dataclass
class Filled:
    """A batch whose bytes are ready. views: of every output, in the plan's order; buffer: the memory of some of them."""

    batch: Batch
    buffer: Tensor
    views: list[memoryview] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)  # of items on the general path


class Buffers:
    """Write buffers that go round: taken by a worker, given back when their bytes are in the file."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """uint8 of at least `size` bytes: the smallest free one that fits, or a new one in place of a free one."""
        with self._lock:
            self._free.sort(key=Tensor.numel)
            for number, buffer in enumerate(self._free):
                if buffer.numel() >= size:
                    return self._free.pop(number)
            if self._free:
                self._free.pop()
        return host_buffer(size, self._pinned)

    def give(self, buffer: Tensor) -> None:
        with self._lock:
            self._free.append(buffer)


def host_buffer(size: int, pinned: bool) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


class Worker(threading.local):
    """What one thread of the pool keeps from batch to batch: its read buffer and, for a GPU, its stream and memory."""

    staged: Tensor | None = None
    dense: Tensor | None = None  # the BF16 weight that an FP8 one becomes, on a CPU
    gpu: GpuStage | None = None


class Pipeline:
    """Fills batches on worker threads. One for a run; close it, or use it as a context manager."""

    def __init__(self, reader: SourceReader, fmt: str, device: torch.device) -> None:
        self.reader, self.fmt, self.device = reader, fmt, device
        self.on_gpu = device.type == "cuda"
        self.limit = GPU_BATCH_BYTES if self.on_gpu else CPU_BATCH_BYTES
        self.workers = min(MAX_WORKERS, os.cpu_count() or 1)
        self.buffers = Buffers(self.on_gpu)
        self._worker = Worker()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="quantize")

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # or a worker might wait for ever for what is not fetched any more
            self.reader.checkpoint.abandon()
        self._pool.shutdown(cancel_futures=True)

    def filled(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Filled | None]]:
        """Batches in order, with at most `workers` + AHEAD submitted and not yet consumed; None ends a unit."""
        waiting: deque[tuple[Unit, Future[Filled] | None]] = deque()
        for job in self._jobs(units):
            waiting.append(job)
            while sum(future is not None for _, future in waiting) > self.workers + AHEAD - 1:
                yield self._result(waiting.popleft())
        while waiting:
            yield self._result(waiting.popleft())

    def _jobs(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Future[Filled] | None]]:
        for unit in units:
            for batch in make_batches(unit, self.limit, self.fmt):
                yield unit, self._pool.submit(self.fill, batch)
            yield unit, None

    @staticmethod
    def _result(job: tuple[Unit, Future[Filled] | None]) -> tuple[Unit, Filled | None]:
        unit, future = job
        return unit, None if future is None else future.result()

    def fill(self, batch: Batch) -> Filled:
        """Read, round and lay out one batch. Raises CheckpointError on NaN/Inf, naming the tensor."""
        self.reader.look([item.planned.source for item in batch.items])
        base = batch.offset % ALIGNMENT  # so that outputs keep the alignment that they have in the file
        buffer = self.buffers.take(ALIGNMENT + batch.buffered_bytes)
        done = Filled(batch, buffer)
        places = self._read(batch, buffer, base)
        self._round([place for place in places if place[0].kind == FUSED], buffer, batch.staged_bytes)
        for item, _, output in places:
            if item.kind == WHOLE:
                with span("pack", item.bytes_in):
                    done.tensors.update(quantize_tensor(self.reader, item.planned, self.fmt, self.device))
                done.views += [bytes_view(done.tensors[o.name].contiguous()) for o in item.outputs]
                continue
            if item.kind == COPY:
                self._check_copied(item, buffer[output : output + item.bytes_out])
            done.views += [bytes_view(buffer[start:end]) for start, end in item_ranges(item, output)]
        return done

    def _round(self, places: list[tuple[Item, int, int]], buffer: Tensor, staged_bytes: int) -> None:
        """Fused items from the read buffer to the write buffer. places: item, offset in the one, offset in the other."""
        if not places:
            return
        staged = self._staged(staged_bytes)
        if self.on_gpu:
            self._gpu().round(places, staged, buffer, self.fmt)
            return
        for item, start, output in places:
            with span("pack", item.bytes_in):
                outputs = output_views(item, buffer, output)
                parts = staged_parts(item, staged, start)
                if item.planned.action == "dequantize":
                    densify(item.planned.source, parts, next(iter(outputs.values())))
                    continue
                weight = densify(item.planned.source, parts, self._dense(item))
                compress_into(weight, item.planned.scheme, self.fmt, outputs, name=item.planned.name)

    def _read(self, batch: Batch, buffer: Tensor, base: int) -> list[tuple[Item, int, int]]:
        """Read what a batch needs; returns each item with its offsets in the read and in the write buffer."""
        places, ranges = [], []
        staged, output = 0, base
        read_buffer = self._staged(batch.staged_bytes)
        for item in batch.items:
            places.append((item, staged, output))
            if item.kind == FUSED:
                for part in item.parts:
                    ranges.append((part, 0, bytes_view(read_buffer[staged : staged + part.nbytes])))
                    staged += aligned(part.nbytes)
            elif item.kind == COPY:
                ranges.append((item.stored, item.first, bytes_view(buffer[output : output + item.bytes_out])))
            output += 0 if item.kind == WHOLE else item.bytes_out
        with span("read", sum(view.nbytes for _, _, view in ranges)):
            self.reader.checkpoint.read_ranges(ranges)
        return places

    def _staged(self, size: int) -> Tensor:
        if self._worker.staged is None or self._worker.staged.numel() < size:
            self._worker.staged = None
            self._worker.staged = host_buffer(size, self.on_gpu)
        return self._worker.staged

    def _dense(self, item: Item) -> Tensor | None:
        """BF16 of the shape of an FP8 item, None of a BF16 one; it holds until the next call of this thread."""
        if not item.dense_bytes:
            return None
        if self._worker.dense is None or self._worker.dense.numel() < item.elements:
            self._worker.dense = torch.empty(item.elements, dtype=torch.bfloat16)
        return self._worker.dense[: item.elements].view(item.shape)

    def _gpu(self) -> GpuStage:
        if self._worker.gpu is None:
            from .gpu_stage import GpuStage

            self._worker.gpu = GpuStage(self.device)
        return self._worker.gpu

    def _check_copied(self, item: Item, raw: Tensor) -> None:
        """As `units._check_copied`, on a stretch; the message names the whole tensor."""
        dtype = torch_dtype(item.stored.dtype)
        if item.planned.role.kind in PASSED_THROUGH or dtype not in FLOATS:
            return
        low, high = torch.aminmax(raw.view(dtype)) if raw.numel() else (torch.zeros(()), torch.zeros(()))
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            whole = self.reader.checkpoint.read(item.stored.name)
            bias = item.planned.role.kind == "router_bias"
            ensure_finite(without_dead(whole) if bias else whole, item.stored.name)


def item_ranges(item: Item, offset: int) -> list[tuple[int, int]]:
    return [(offset, offset + item.bytes_out)] if item.kind == COPY else output_ranges(item, offset)


@contextmanager
def one_thread_an_operation(on_gpu: bool) -> Iterator[None]:
    """The workers are the parallelism: operations inside them that start threads too would only fight for the cores."""
    before = torch.get_num_threads()
    if on_gpu or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def convert_units(
    output: Path,
    units: Iterable[Unit],
    reader: SourceReader,
    fmt: str,
    device: torch.device,
    stop: StopFlag,
    on_bytes: Callable[[int], None],
    finished: Callable[[Unit, ShardRecord], None],
) -> None:
    """Write the shards of `units` in order. finished: called for each when its shard is in place, before the next begins.

    on_bytes: called with the source bytes of what has been written. The shard in progress is dropped on any error or stop.
    """
    writer: UnitWriter | None = None
    pipeline = Pipeline(reader, fmt, device)
    try:
        with pipeline, one_thread_an_operation(pipeline.on_gpu):
            for unit, filled in pipeline.filled(units):
                stop.check()
                if writer is None:
                    writer = UnitWriter(output, unit)
                if filled is not None:
                    if in_source_order(unit):
                        writer.append(filled.views, sum(item.ends for item in filled.batch.items))
                    else:
                        writer.add(filled.tensors)
                    pipeline.buffers.give(filled.buffer)
                    for item in filled.batch.items:
                        on_bytes(item.bytes_in)
                else:
                    record = writer.close()
                    writer = None
                    finished(unit, record)
    except BaseException:
        if writer is not None:
            writer.abort()
        raise


def convert_unit(
    output: Path,
    unit: Unit,
    reader: SourceReader,
    fmt: str,
    device: torch.device,
    stop: StopFlag,
    on_bytes: Callable[[int], None],
) -> ShardRecord:
    """Write one unit's shard; arguments and errors as `convert_units`."""
    records: list[ShardRecord] = []
    convert_units(output, [unit], reader, fmt, device, stop, on_bytes, lambda _, record: records.append(record))
    return records[0]
