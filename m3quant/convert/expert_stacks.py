"""Routed experts of a layer on a GPU, packed several at once, and left on the device as an engine will see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..calibration.awq import CalibratedLayer
from ..calibration.ranges import qparams
from ..planning.plan import PlannedTensor
from ..quant.formats import compress, decompress
from ..schemes import KEEP, Scheme

_ELEMENTS = 1 << 26  # weights packed at once; each costs about 40 bytes of scratch


def pack_experts(
    planned: Mapping[str, PlannedTensor], calibrated: CalibratedLayer, stacks: Mapping[str, Tensor], fmt: str
) -> Iterator[tuple[list[str], dict[str, Tensor], torch.cuda.Event | None]]:
    """What is stored of every integer-quantized expert, as `calibrated.weight` and `compress` give it one by one.

    planned: by relative name; stacks: "w1", "w3", "w2" [E, N, K], overwritten by the dequantized weights. Yields relative
    names, their outputs in pinned host memory, and the event after which those are there.
    """
    for which, stack in stacks.items():
        assert calibrated.moe is not None, "stacks belong to a layer with routed experts"
        names = [calibrated.moe.expert_name(expert, which) for expert in range(len(stack))]
        most = max(1, _ELEMENTS // stack[0].numel())
        start = 0
        while start < len(names):
            scheme = _scheme(calibrated, names[start])
            stop = start + 1
            while stop < len(names) and stop - start < most and _scheme(calibrated, names[stop]) == scheme:
                stop += 1
            run, part = names[start:stop], stack[start:stop]
            start = stop
            if scheme.kind != "int":
                continue
            folded = _folded(calibrated, run, part)
            shrink = _stacked(calibrated.shrink, run, part)
            scale, zero_point = qparams(folded, scheme, 1.0 if shrink is None else shrink, calibrated.scale_dtype)
            stored = compress(folded, scheme, fmt, scale, zero_point, name=f"{run[0]} .. {run[-1]}")
            part.copy_(decompress(stored, scheme, fmt, tuple(folded.shape), name=run[0]))
            host = {suffix: _to_host(tensor) for suffix, tensor in stored.items()}
            ready = torch.cuda.current_stream(stack.device).record_event() if stack.is_cuda else None
            modules = [planned[name].module for name in run]
            outputs = {f"{m}.{suffix}": t[i] for i, m in enumerate(modules) for suffix, t in host.items()}
            yield run, outputs, ready


def _scheme(calibrated: CalibratedLayer, name: str) -> Scheme:
    return calibrated.schemes.get(name, KEEP)


def _folded(calibrated: CalibratedLayer, names: list[str], weights: Tensor) -> Tensor:
    """`calibrated.weight` of several: source * column / row, [e, N, K] float32."""
    folded = weights.float()
    column, row = (_stacked(of, names, weights) for of in (calibrated.column, calibrated.row))
    if column is not None:
        folded = folded * column[:, None, :]
    return folded if row is None else folded / row[..., None]


def _stacked(values: Mapping[str, Tensor], names: list[str], like: Tensor) -> Tensor | None:
    """[e, ...] on the device of `like`, ones for names without an entry; None if none has one."""
    own = [values.get(name) for name in names]
    known = next((value for value in own if value is not None), None)
    if known is None:
        return None
    parts = [torch.ones_like(known) if value is None else value for value in own]
    return torch.stack(parts).to(like.device)


def _to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
