"""What a data-free conversion moves at a time: runs of neighbouring output tensors, laid out as in the shard.

Pure planning, which imports no torch: which source bytes go where in a read buffer, and where each output is in a write buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from ..checkpoint import DTYPE_BYTES, TensorInfo, torch_dtype
from .layout import one_pass
from .source_layouts import PLAIN
from .unit import OutputTensor, PlannedTensor, Unit, nbytes

if TYPE_CHECKING:
    from torch import Tensor

# A batch on a CPU is one tensor or a few small ones; on a GPU enough to make copies and launches cheap.
CPU_BATCH_BYTES = 4 * 2**20
GPU_BATCH_BYTES = 32 * 2**20
MAX_WORKERS = 8
# Batches that may be finished, or in progress, ahead of the one being written, beyond one for each worker.
AHEAD = 2
SCRATCH_BYTES = 8 * 2**20  # blocks of rows that `quant.fused` works on
ALIGNMENT = 64  # of inputs in a read buffer; outputs keep the alignment that they have in the file

COPY, FUSED, WHOLE = "copy", "fused", "whole"


@dataclass(frozen=True)
class Item:
    """One source tensor's way through a batch, or a stretch of a copied one.

    kind: "copy" (bytes first..last of one stored tensor), "fused" (rounded from buffer to buffer; a quantized source
    becomes BF16 first, or only that), or "whole" (read and converted by the general path). outputs: what it writes, whole or for
    a copy the tensor it is part of.
    """

    planned: PlannedTensor
    kind: str
    stored: TensorInfo
    first: int
    last: int
    outputs: tuple[OutputTensor, ...]

    @property
    def bytes_in(self) -> int:
        return self.last - self.first if self.kind == COPY else self.planned.source.stored_bytes

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """What is read of the tensor: itself or, of a quantized one, codes and scales."""
        return self.planned.source.parts

    @property
    def staged_bytes(self) -> int:
        """Of a fused item in the read buffer: its parts one after the other, each aligned."""
        return sum(aligned(part.nbytes) for part in self.parts)

    @property
    def part_starts(self) -> tuple[int, ...]:
        """Where in the read buffer each part of a fused item begins, from the item's own beginning on."""
        ends = accumulate(aligned(part.nbytes) for part in self.parts)
        return (0, *ends)[: len(self.parts)]

    @property
    def dense_bytes(self) -> int:
        """Of the BF16 weight that a fused item of a quantized source passes through; 0 where it is read as that."""
        passes = self.kind == FUSED and len(self.parts) > 1 and self.planned.action == "quantize"
        return aligned(self.elements * 2) if passes else 0

    @property
    def elements(self) -> int:
        return self.planned.source.numel

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the model, whatever its codes are packed in."""
        return self.planned.source.shape

    @property
    def bytes_out(self) -> int:
        return self.last - self.first if self.kind == COPY else sum(nbytes(o) for o in self.outputs)

    @property
    def ends(self) -> int:
        """Output tensors whose last byte is in this item."""
        return int(self.last == self.stored.nbytes) if self.kind == COPY else len(self.outputs)


@dataclass(frozen=True)
class Batch:
    """Neighbours in the output. offset: of its first byte from the beginning of the shard's data."""

    items: tuple[Item, ...]
    offset: int

    @property
    def bytes_in(self) -> int:
        return sum(item.bytes_in for item in self.items)

    @property
    def bytes_out(self) -> int:
        return sum(item.bytes_out for item in self.items)

    @property
    def buffered_bytes(self) -> int:
        """Size of the write buffer: everything but what the general path makes in memory of its own."""
        return sum(item.bytes_out for item in self.items if item.kind != WHOLE)

    @property
    def staged_bytes(self) -> int:
        """Size of the read buffer: the inputs of fused items, aligned. Copies are read where they are written from."""
        return sum(item.staged_bytes for item in self.items if item.kind == FUSED)

    @property
    def dense_bytes(self) -> int:
        """Of all BF16 weights that the batch's quantized ones become."""
        return sum(item.dense_bytes for item in self.items)


def aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def in_source_order(unit: Unit) -> bool:
    """Whether the shard lists its tensors as the plan does; an odd size may have forced another order."""
    return [name for name, _, _ in unit.entries] == [o.name for t in unit.tensors for o in t.outputs]


def make_batches(unit: Unit, limit: int, fmt: str) -> Iterator[Batch]:
    """Batches of a unit in the order of its plan, each at most `limit` bytes in or out, or a single item.

    An item on the general path is alone in its batch.
    """
    waiting: list[Item] = []
    offset = taken = 0
    for item in _items(unit, limit, fmt):
        size = max(item.bytes_in, item.bytes_out)
        alone = WHOLE in (item.kind, waiting[-1].kind if waiting else item.kind)
        if waiting and (alone or taken + size > limit):
            batch = Batch(tuple(waiting), offset)
            yield batch
            offset += batch.bytes_out
            waiting, taken = [], 0
        waiting.append(item)
        taken += size
    if waiting:
        yield Batch(tuple(waiting), offset)


def _items(unit: Unit, limit: int, fmt: str) -> Iterator[Item]:
    ordered = in_source_order(unit)
    for planned in unit.tensors:
        source = planned.source
        if planned.action == "copy" and ordered:
            for stored, output in zip(source.stored, planned.outputs, strict=True):
                yield from _stretches(planned, stored, output, limit)
        elif planned.action != "copy" and ordered and _fusable(planned, fmt):
            yield Item(planned, FUSED, source.info, 0, source.info.nbytes, planned.outputs)
        else:
            yield Item(planned, WHOLE, source.info, 0, source.info.nbytes, planned.outputs)


def _fusable(planned: PlannedTensor, fmt: str) -> bool:
    source = planned.source
    readable = source.kind != PLAIN or source.info.dtype == "BF16"
    return readable and (planned.action == "dequantize" or one_pass(planned.scheme, fmt))


def _stretches(planned: PlannedTensor, stored: TensorInfo, output: OutputTensor, limit: int) -> Iterator[Item]:
    """A large embedding table goes through in stretches of whole elements."""
    step = max(DTYPE_BYTES[stored.dtype], limit // ALIGNMENT * ALIGNMENT)
    for first in range(0, max(stored.nbytes, 1), step):
        yield Item(planned, COPY, stored, first, min(first + step, stored.nbytes), (output,))


@dataclass(frozen=True)
class Working:
    """Most bytes that buffers take while units are converted."""

    host: int
    device: int


def working_bytes(units: Iterable[Unit], on_gpu: bool, fmt: str, workers: int) -> Working:
    """One read buffer a worker and one write buffer a batch in flight, pinned where there is a GPU, which has its own of
    both. Quantized weights become BF16 one after the other on a CPU, a batch at a time on a GPU. Tensors on the general path
    exist as stored, as a float32 copy with one temporary, and as outputs instead.
    """
    limit = GPU_BATCH_BYTES if on_gpu else CPU_BATCH_BYTES
    staged = written = whole = dense = 0
    for unit in units:
        for batch in make_batches(unit, limit, fmt):
            staged, written = max(staged, batch.staged_bytes), max(written, batch.buffered_bytes)
            dense = max(dense, batch.dense_bytes if on_gpu else max(item.dense_bytes for item in batch.items))
            whole = max(whole, sum(i.bytes_in + i.bytes_out + i.elements * 8 for i in batch.items if i.kind == WHOLE))
    written += ALIGNMENT
    flying = workers + AHEAD
    if not on_gpu:
        return Working(workers * (staged + dense + SCRATCH_BYTES) + flying * (written + whole), 0)
    host = workers * pinned_bytes(staged) + flying * (pinned_bytes(written) + whole)
    return Working(host, workers * (staged + dense) + flying * (written + whole))


def pinned_bytes(size: int) -> int:
    """What torch pins for a buffer: a whole power of two (c10/core: CachingHostAllocator)."""
    return 1 << (size - 1).bit_length() if size else 0


def output_ranges(item: Item, offset: int) -> list[tuple[int, int]]:
    """Begin and end of each output of an item whose bytes begin at `offset`."""
    ranges = []
    for output in item.outputs:
        ranges.append((offset, offset + nbytes(output)))
        offset += nbytes(output)
    return ranges


def output_views(item: Item, buffer: Tensor, offset: int) -> dict[str, Tensor]:
    """The outputs of a fused item by suffix, as views of a uint8 buffer's bytes from `offset` on."""
    stem = f"{item.planned.module}."
    return {
        o.name.removeprefix(stem): buffer[start:end].view(torch_dtype(o.dtype)).view(o.shape)
        for o, (start, end) in zip(item.outputs, output_ranges(item, offset), strict=True)
    }


def staged_parts(item: Item, staged: Tensor, start: int) -> dict[str, Tensor]:
    """The stored parts of a fused item by name, as views of a uint8 buffer that holds them from `start` on."""
    views = {}
    for part in item.parts:
        views[part.name] = staged[start : start + part.nbytes].view(torch_dtype(part.dtype)).view(part.shape)
        start += aligned(part.nbytes)
    return views
