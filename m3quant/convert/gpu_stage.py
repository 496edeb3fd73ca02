"""One worker's part of a GPU: its stream and memory there, and the transfer of a batch to it and back."""

from __future__ import annotations

import threading
from functools import cache
from itertools import groupby

import torch
from torch import Tensor

from ..checkpoint import torch_dtype
from ..planning.batches import Item, output_ranges, output_views, staged_parts
from ..planning.integer_kinds import is_integer
from ..quant.formats import compress
from ..quant.integer import ensure_finite, int_qparams
from ..quant.reading import densify
from ..running.timing import device_span

# Building a kernel is not something that two threads should do at once.
LAUNCH = threading.Lock()
Place = tuple[Item, int, int]  # a fused item, its offset in the read buffer and in the write buffer


@cache
def why_plain(device: torch.device) -> str | None:
    """Why batches are rounded by plain torch operations on this GPU, or None where Triton's kernels do it."""
    try:
        from ..quant.gpu_kernels import check_device

        with LAUNCH, torch.cuda.device(device):
            check_device(device)
    except Exception as error:  # Triton raises what its compiler, the C compiler or the driver raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None


class GpuStage:
    """Rounds batches on `device`. For one thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._source = self._out = self._dense = torch.empty(0, dtype=torch.uint8, device=device)

    def round(self, places: list[Place], staged: Tensor, buffer: Tensor, fmt: str) -> None:
        """From the pinned read buffer to the pinned write buffer; returns when the bytes are there.

        Raises CheckpointError on NaN/Inf, naming the tensor.
        """
        taken = max(start + item.staged_bytes for item, start, _ in places)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self._make_room(taken, buffer.numel(), sum(item.dense_bytes for item, _, _ in places))
            with device_span("h2d", taken):
                self._source[:taken].copy_(staged[:taken], non_blocking=True)
            with device_span("pack", sum(item.bytes_in for item, _, _ in places)):
                flags = self._round_there(places, fmt)
            ranges = covered(places)
            with device_span("d2h", sum(end - start for start, end in ranges)):
                for start, end in ranges:
                    buffer[start:end].copy_(self._out[start:end], non_blocking=True)
                refused = None if flags is None else flags.to("cpu", non_blocking=True)
            self.stream.synchronize()
        self._check(places, refused, staged)
        for item, _, output in places:
            for o, (start, end) in zip(item.outputs, output_ranges(item, output), strict=True):
                if o.name.endswith(".weight_shape"):
                    shape = torch.tensor(item.shape, dtype=torch_dtype(o.dtype))
                    buffer[start:end] = shape.view(torch.uint8)

    def _make_room(self, source: int, out: int, dense: int) -> None:
        if self._source.numel() < source:
            self._source = torch.empty(source, dtype=torch.uint8, device=self.device)
        if self._out.numel() < out:
            self._out = torch.empty(out, dtype=torch.uint8, device=self.device)
        if self._dense.numel() < dense:
            self._dense = torch.empty(dense, dtype=torch.uint8, device=self.device)

    def _round_there(self, places: list[Place], fmt: str) -> Tensor | None:
        """Run the kernels, like with like; the flags of refused weights, by place, or None where `compress` looked."""
        if why_plain(self.device) is not None:
            for place in places:
                self._plainly(place, fmt)
            return None
        from ..quant import gpu_kernels

        order = sorted(range(len(places)), key=lambda i: _kind(places[i]))
        flags = torch.zeros(len(places), dtype=torch.int32, device=self.device)
        done = dense = 0
        for _, alike in groupby((places[i] for i in order), key=_kind):
            group = list(alike)
            item = group[0][0]
            scheme, shape = item.planned.scheme, item.shape
            own = flags[done : done + len(group)]
            done += len(group)
            source, begins = self._source, [start for _, start, _ in group]
            if item.planned.source.scale is not None:
                source, begins, dense = self._make_dense(group, own, dense)
                if item.planned.action == "dequantize":
                    continue
            if gpu_kernels.covers(scheme, shape[1]):
                rows = [table_row(place, begin) for place, begin in zip(group, begins, strict=True)]
                table = torch.tensor(rows).to(self.device, non_blocking=True)
                with LAUNCH:
                    gpu_kernels.compress_group(source, self._out, table, own, (shape[0], shape[1]), scheme)
            else:
                for place in group:
                    self._plainly(place, fmt)
        # back into the order of `places`
        return flags[torch.tensor([order.index(i) for i in range(len(places))], device=self.device)]

    def _make_dense(self, group: list[Place], flags: Tensor, begin: int) -> tuple[Tensor, list[int], int]:
        """BF16 of quantized weights of one kind: in the outputs' places if that is all, else in `_dense` from `begin` on.

        Returns where they are: the memory, the offset of each in it, and the first free one after them.
        """
        from ..quant import gpu_source

        item = group[0][0]
        only = item.planned.action == "dequantize"
        places, rows = [], []
        for own, start, output in group:
            places.append(output if only else begin)
            begin += own.dense_bytes
            starts = [start + before for before in own.part_starts]
            rows.append((*starts, places[-1]))
        out = self._out if only else self._dense
        if is_integer(item.planned.source.kind):
            for (one, start, _), place in zip(group, places, strict=True):
                dense = out[place : place + 2 * one.elements].view(torch.bfloat16).view(one.shape)
                densify(one.planned.source, staged_parts(one, self._source, start), dense)
            return out, places, begin
        table = torch.tensor(rows).to(self.device, non_blocking=True)
        with LAUNCH:
            gpu_source.dense_group(self._source, out, table, flags, item.planned.source)
        return out, places, begin

    def _plainly(self, place: Place, fmt: str) -> None:
        item, start, output = place
        weight = densify(item.planned.source, staged_parts(item, self._source, start))
        outputs = output_views(item, self._out, output)
        if item.planned.action == "dequantize":
            next(iter(outputs.values())).copy_(weight)
            return
        parts = compress(weight, item.planned.scheme, fmt, name=item.planned.name)
        for suffix, view in outputs.items():
            view.copy_(parts[suffix])

    @staticmethod
    def _check(places: list[Place], refused: Tensor | None, staged: Tensor) -> None:
        if refused is None or not bool(refused.any()):
            return
        for (item, start, _), flag in zip(places, refused.tolist(), strict=True):
            if flag:
                weight = densify(item.planned.source, staged_parts(item, staged, start))
                ensure_finite(weight, item.planned.name)
                int_qparams(weight, item.planned.scheme, name=item.planned.name)
                raise AssertionError(f"{item.planned.name} was refused on the GPU alone")


def _kind(place: Place) -> tuple[str, str, tuple[int, ...], str, str]:
    """What one launch has in common."""
    planned = place[0].planned
    source = planned.source
    return planned.action, planned.scheme.name, source.shape, source.kind, source.scale.dtype if source.scale else ""


def table_row(place: Place, begin: int) -> tuple[int, int, int, int]:
    """Byte offsets of a BF16 weight, of its codes and its scale, the first two outputs of every one-pass format, and of
    its zero points, 0 where it has none."""
    item, _, output = place
    ranges = output_ranges(item, output)
    zeros = [begin for o, (begin, _) in zip(item.outputs, ranges, strict=True) if o.name.endswith(".weight_zero_point")]
    return begin, ranges[0][0], ranges[1][0], zeros[0] if zeros else 0


def covered(places: list[Place]) -> list[tuple[int, int]]:
    """Stretches of the write buffer that the items fill, neighbours as one."""
    stretches: list[tuple[int, int]] = []
    for item, _, output in places:
        end = output + item.bytes_out
        if stretches and stretches[-1][1] == output:
            stretches[-1] = (stretches[-1][0], end)
        else:
            stretches.append((output, end))
    return stretches
