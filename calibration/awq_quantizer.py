"""AWQ as a layer quantizer: folds and ranges from `awq.calibrate_layer`, codes by rounding to nearest under them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from m3quant.calibration.awq import CalibratedLayer, calibrate_layer
from m3quant.calibration.awq_settings import AwqSettings
from m3quant.calibration.head import Windows
from m3quant.calibration.layers import Layer, LayerTensors
from m3quant.calibration.quantized_layer import QuantizedLayer, StoredWeight
from m3quant.calibration.ranges import qparams
from m3quant.families.spec import LayerSpec, MoeSpec
from m3quant.quant import fp8
from m3quant.quant.integer import quantize
from m3quant.schemes import KEEP, Scheme

_ELEMENTS = 1 << 26  # weights of a stack rounded at once; each costs about 12 bytes of scratch


class AwqQuantizer:
    """`quantized_layer.LayerQuantizer`. The source stream is not read: AWQ aims at the weights' own outputs."""

    def quantize(
        self,
        spec: LayerSpec,
        tensors: Mapping[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        quantized_stream: Windows,
        source_stream: Windows,
        settings: AwqSettings,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        layer: Layer | None = None,
    ) -> QuantizedLayer:
        layer = layer or Layer(spec, tensors, device, dtype)
        found = calibrate_layer(spec, tensors, schemes, quantized_stream, settings, device, dtype, layer)
        found.device = device
        for name, scheme in schemes.items():  # the search left attention rounded
            if scheme.quantizes and name.startswith("self_attn."):
                layer.set_weight(name, tensors[name])
        stacks = _stacks(found, tensors) if isinstance(tensors, LayerTensors) else {}
        return QuantizedLayer(_Codes(found, stacks, spec.moe), found.other, found.log, found.ledger, stacks)


class _Codes(Mapping[str, StoredWeight]):
    """Codes made when they are asked for, one weight at a time: on a CPU the layer's codes are never in memory together."""

    def __init__(self, layer: CalibratedLayer, stacks: Mapping[str, StoredWeight], moe: MoeSpec | None) -> None:
        self._layer = layer
        self._names = [name for name, scheme in layer.schemes.items() if scheme.quantizes]
        self._stacked = {
            moe.expert_name(expert, which): (stack, expert)
            for which, stack in stacks.items()
            for expert in range(len(stack.codes))
            if moe is not None
        }

    def __getitem__(self, name: str) -> StoredWeight:
        if name in self._stacked:
            stack, expert = self._stacked[name]
            return stack[expert]
        scheme = self._layer.schemes.get(name, KEEP)
        if not scheme.quantizes:
            raise KeyError(name)
        return round_to_nearest(self._layer, name, scheme)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def round_to_nearest(layer: CalibratedLayer, name: str, scheme: Scheme) -> StoredWeight:
    """The folded weight [N, K] under its searched ranges (integers), or its largest values (FP8)."""
    weight = layer.weight(name)
    if scheme.kind == "fp8":
        scale = (fp8.block_scale if scheme.block else fp8.channel_scale)(weight, name=name)
        return StoredWeight(
            (fp8.quantize_block if scheme.block else fp8.quantize_channel)(weight, scale, name=name), scale
        )
    scale, zero_point = layer.qparams(name, weight)
    return StoredWeight(quantize(weight, scale, zero_point, scheme, name=name), scale, zero_point)


def _stacks(layer: CalibratedLayer, tensors: LayerTensors) -> dict[str, StoredWeight]:
    """Codes of the routed experts [E, N, K] of every stack whose experts share one integer scheme."""
    out = {}
    for which, stack in tensors.stacks.items():
        names = tensors.names(which)
        schemes = {layer.schemes.get(name, KEEP) for name in names}
        if len(schemes) > 1 or next(iter(schemes)).kind != "int":
            continue
        (scheme,) = schemes
        most = max(1, _ELEMENTS // stack[0].numel())
        parts = [
            _round_part(layer, names[i : i + most], stack[i : i + most], scheme) for i in range(0, len(names), most)
        ]
        zeros = [part.zero_point for part in parts if part.zero_point is not None]
        out[which] = StoredWeight(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zeros) if zeros else None,
        )
    return out


def _round_part(layer: CalibratedLayer, names: list[str], weights: torch.Tensor, scheme: Scheme) -> StoredWeight:
    folded = weights.float()
    column, row, shrink = (_stacked(of, names, weights) for of in (layer.column, layer.row, layer.shrink))
    if column is not None:
        folded = folded * column[:, None, :]
    if row is not None:
        folded = folded / row[..., None]
    scale, zero_point = qparams(folded, scheme, 1.0 if shrink is None else shrink, layer.scale_dtype)
    return StoredWeight(
        quantize(folded, scale, zero_point, scheme, name=f"{names[0]} .. {names[-1]}"), scale, zero_point
    )


def _stacked(values: Mapping[str, torch.Tensor], names: list[str], like: torch.Tensor) -> torch.Tensor | None:
    """[e, ...] on the device of `like`, ones for names without an entry; None if none has one."""
    own = [values.get(name) for name in names]
    known = next((value for value in own if value is not None), None)
    if known is None:
        return None
    parts = [torch.ones_like(known) if value is None else value for value in own]
    return torch.stack(parts).to(like.device)
