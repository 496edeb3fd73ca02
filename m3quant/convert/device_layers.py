"""A layer from the disk to the GPU: file ranges into a few pinned buffers, and from each of them on while others fill.

The layer exists once, on the device, its routed experts in three stacks; host memory holds THREADS buffers. While one
layer is searched the next one is loaded.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration.layers import LayerTensors
from ..checkpoint.reader import bytes_view, torch_dtype
from ..families import family_of
from ..families.spec import STACKS, LayerSpec, layer_shapes
from ..planning.source_layouts import PLAIN
from ..quant.reading import densify
from ..running.timing import span
from .device_fp8 import Expert, StoredExperts

if TYPE_CHECKING:
    from ..checkpoint.header import TensorInfo
    from ..quant.reading import SourceReader

THREADS = 4
BUFFER_BYTES = 64 * 2**20  # what one thread reads before it copies; a larger tensor has a buffer of its own size


class _Worker(threading.local):
    """A thread's pinned buffer and stream."""

    buffer: Tensor | None = None
    stream: torch.cuda.Stream | None = None


class DeviceLoader:
    """Loads layers of one source to one GPU. Close it, or use it in a `with`."""

    def __init__(self, reader: SourceReader, device: torch.device) -> None:
        self.reader, self.device, self.on_gpu = reader, device, device.type == "cuda"
        self._worker = _Worker()
        self._pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="load")

    def __enter__(self) -> DeviceLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def load(self, spec: LayerSpec) -> LayerTensors:
        """All tensors of one layer, dense, on the device. Raises CheckpointError as `SourceReader.read_many`."""
        with torch.cuda.device(self.device) if self.on_gpu else nullcontext():
            return self._load(spec)

    def _load(self, spec: LayerSpec) -> LayerTensors:
        prefix = family_of(self.reader.config).layer_prefix(spec.index)
        sources = {n.removeprefix(prefix): s for n, s in self.reader.tensors.items() if n.startswith(prefix)}
        self.reader.look(sources.values())
        stacks = self._stacks(spec)
        tensors = LayerTensors({}, stacks, spec.moe)
        raw: dict[str, dict[str, Tensor]] = {}
        targets: list[tuple[TensorInfo, Tensor]] = []
        stored: list[Expert] = []
        for name, source in sources.items():
            if source.kind == PLAIN and not (name in tensors and _dtype(source.info) != tensors[name].dtype):
                if name not in tensors:
                    tensors[name] = self._empty(source.info)
                targets.append((source.info, tensors[name]))
            elif source.scale is not None and name in tensors and spec.moe and (routed := spec.moe.expert_of(name)):
                expert, which = routed
                stored.append((which, expert, source))
            else:
                raw[name] = {info.name: self._empty(info) for info in source.parts}
                targets += [(info, raw[name][info.name]) for info in source.parts]
        experts = StoredExperts(stored, self.device) if stored else None
        if experts:
            targets += experts.targets()
        # What these tensors' memory was used for before may still be running on this stream.
        ready = torch.cuda.current_stream(self.device).record_event() if self.on_gpu else None
        jobs = [self._pool.submit(self._fill, batch, ready) for batch in _batches(targets)]
        for job in jobs:
            job.result()
        if experts:
            experts.dense_into(stacks)
        for name, parts in raw.items():
            dense = densify(sources[name], parts)
            if name in tensors:
                tensors[name].copy_(dense)
            else:
                tensors[name] = dense
        return tensors

    def _empty(self, info: TensorInfo) -> Tensor:
        return torch.empty(info.shape, dtype=torch_dtype(info.dtype), device=self.device)

    def _stacks(self, spec: LayerSpec) -> dict[str, Tensor]:
        if spec.moe is None:
            return {}
        shapes, experts = layer_shapes(spec), spec.moe.num_experts
        return {
            which: torch.empty(
                experts, *shapes[spec.moe.expert_name(0, which)], dtype=torch.bfloat16, device=self.device
            )
            for which in STACKS
        }

    def _fill(self, batch: Sequence[tuple[TensorInfo, Tensor]], ready: torch.cuda.Event | None) -> None:
        """Read neighbours of a file into this thread's buffer and copy them to the device."""
        size = sum(info.nbytes for info, _ in batch)
        if self._worker.buffer is None or self._worker.buffer.numel() < size:
            self._worker.buffer = torch.empty(max(size, BUFFER_BYTES), dtype=torch.uint8, pin_memory=self.on_gpu)
        buffer = self._worker.buffer
        views, start = [], 0
        for info, _ in batch:
            views.append(buffer[start : start + info.nbytes])
            start += info.nbytes
        with span("read", size):
            self.reader.checkpoint.read_ranges(
                [(info, 0, bytes_view(view)) for (info, _), view in zip(batch, views, strict=True)]
            )
        with span("h2d", size), self._stream(ready) as stream:
            for (_, target), view in zip(batch, views, strict=True):
                target.view(-1).view(torch.uint8).copy_(view, non_blocking=True)
            if stream is not None:
                stream.synchronize()

    @contextmanager
    def _stream(self, ready: torch.cuda.Event | None) -> Iterator[torch.cuda.Stream | None]:
        """This thread's stream, after `ready`, as the current one; None on a CPU."""
        if ready is None:
            yield None
            return
        if self._worker.stream is None:
            self._worker.stream = torch.cuda.Stream(self.device)
        stream = self._worker.stream
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            yield stream


def _dtype(info: TensorInfo) -> torch.dtype:
    return torch_dtype(info.dtype)


def _batches(targets: Sequence[tuple[TensorInfo, Tensor]]) -> Iterator[list[tuple[TensorInfo, Tensor]]]:
    """Tensors in file order, as many at once as a buffer holds; none that is empty."""
    batch: list[tuple[TensorInfo, Tensor]] = []
    size = 0
    for info, target in sorted(targets, key=lambda t: (t[0].shard, t[0].start)):
        if batch and (size + info.nbytes > BUFFER_BYTES or info.shard != batch[0][0].shard):
            yield batch
            batch, size = [], 0
        if info.nbytes:
            batch.append((info, target))
            size += info.nbytes
    if batch:
        yield batch
