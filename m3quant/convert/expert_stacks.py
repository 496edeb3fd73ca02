"""Routed experts of a layer on a GPU, packed several at once, and left on the device as an engine will see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..calibration.layers import LayerTensors
from ..calibration.quantized_layer import QuantizedLayer, StoredWeight
from ..calibration.rounding_errors import RoundingErrors
from ..planning.unit import PlannedTensor
from ..quant.formats import pack

_ELEMENTS = 1 << 26  # weights packed at once; each costs about 20 bytes of scratch


def pack_experts(
    planned: Mapping[str, PlannedTensor],
    quantized: QuantizedLayer,
    tensors: LayerTensors,
    fmt: str,
    errors: RoundingErrors,
) -> Iterator[tuple[list[str], dict[str, Tensor], torch.cuda.Event | None]]:
    """What is stored of the experts that `quantized.stacks` holds, some at a time.

    planned: by relative name; tensors: their stacks are overwritten by the dequantized weights; errors: takes
    what rounding changed. Yields relative
    names, their outputs in pinned host memory, and the event after which those are there.
    """
    for which, codes in quantized.stacks.items():
        stack, names = tensors.stacks[which], tensors.names(which)
        most = max(1, _ELEMENTS // stack[0].numel())
        for start in range(0, len(names), most):
            run = names[start : start + most]
            part = codes.part(slice(start, start + len(run)))
            yield run, *_pack(run, planned, part, fmt)
            values = part.dequantized()
            errors.add([planned[name].name for name in run], stack[start : start + len(run)], values)
            stack[start : start + len(run)].copy_(values)


def _pack(
    names: list[str], planned: Mapping[str, PlannedTensor], part: StoredWeight, fmt: str
) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    stored = pack(part.codes, part.scale, part.zero_point, planned[names[0]].scheme, fmt)
    host = {suffix: _to_host(tensor) for suffix, tensor in stored.items()}
    ready = torch.cuda.current_stream(part.codes.device).record_event() if part.codes.is_cuda else None
    modules = [planned[name].module for name in names]
    return {f"{m}.{suffix}": t[i] for i, m in enumerate(modules) for suffix, t in host.items()}, ready


def _to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
