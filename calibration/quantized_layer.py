"""What a quantizer returns for one layer: codes, scales and zero points, and everything else that it changed.

Only a quantizer makes codes. What is packed, what the quantized stream computes with and what verify expects all
follow from `StoredWeight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from m3quant.calibration.experts import ExpertLedger
from m3quant.calibration.head import Windows
from m3quant.calibration.layers import Layer
from m3quant.calibration.spec import LayerSpec
from m3quant.quant.fp8 import dequantize_block, dequantize_channel
from m3quant.schemes import FP8_BLOCK, Scheme

_SettingsT = TypeVar("_SettingsT", contravariant=True)


@dataclass
class StoredWeight:
    """One quantized weight [N, K], or a stack of them with a leading dimension.

    codes: int8 [..., N, K] in -2^(b-1) .. 2^(b-1) - 1, or float8_e4m3fn [..., N, K]. scale: float32, exact in the dtype
    it will be stored in; [..., N, G] for integers (G = 1: one a row), [..., N, 1] or one a 128 x 128 block for FP8.
    zero_point: int8 [..., N, G] in the range of the codes, or None.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None

    def dequantized(self) -> torch.Tensor:
        """The float32 [..., N, K] that an engine computes with: (code - zero point) * scale."""
        if self.codes.dtype == torch.float8_e4m3fn:
            rows = self.codes.shape[-2]
            per_row = self.scale.shape[-2:] == (rows, 1)
            return (dequantize_channel if per_row else dequantize_block)(self.codes, self.scale)
        values = self.codes.to(torch.float32)
        groups = torch.unflatten(values, -1, (self.scale.shape[-1], -1))
        if self.zero_point is not None:
            groups.sub_(self.zero_point.unsqueeze(-1))
        groups.mul_(self.scale.unsqueeze(-1))
        return values

    def __getitem__(self, index: int) -> StoredWeight:
        """One weight of a stack, as views."""
        zero_point = None if self.zero_point is None else self.zero_point[index]
        return StoredWeight(self.codes[index], self.scale[index], zero_point)

    @staticmethod
    def joined(stacks: Sequence[StoredWeight]) -> StoredWeight:
        """Stacks behind one another, copied into one."""
        zeros = [stack.zero_point for stack in stacks if stack.zero_point is not None]
        codes, scale = (torch.cat([getattr(stack, name) for stack in stacks]) for name in ("codes", "scale"))
        return StoredWeight(codes, scale, torch.cat(zeros) if zeros else None)

    def rows(self, sizes: Sequence[int]) -> list[StoredWeight]:
        """Cut output rows [..., N, K] into runs, contiguous copies. FP8 blocks are cut where they end."""
        scale_rows = self.scale.shape[-2]
        step = 1 if scale_rows == self.codes.shape[-2] else FP8_BLOCK
        shares = [-(-size // step) for size in sizes]
        codes, scales = torch.split(self.codes, list(sizes), -2), torch.split(self.scale, shares, -2)
        zeros = [None] * len(codes) if self.zero_point is None else torch.split(self.zero_point, shares, -2)
        parts = zip(codes, scales, zeros, strict=True)
        return [StoredWeight(c.contiguous(), s.contiguous(), z if z is None else z.contiguous()) for c, s, z in parts]

    def part(self, experts: slice) -> StoredWeight:
        """Some weights of a stack, as views."""
        zero_point = None if self.zero_point is None else self.zero_point[experts]
        return StoredWeight(self.codes[experts], self.scale[experts], zero_point)


@dataclass
class QuantizedLayer:
    """How to store one layer.

    weights: by tensor name relative to the layer, one for every weight whose scheme quantizes. other: norms, router and
    kept linears that a fold changed, in their stored dtype; a tensor in neither is stored as it was. log: JSON-able.
    ledger: None for a dense layer. stacks: on a GPU, "w1", "w3" and "w2" -> the routed experts' weights in one piece
    with a leading expert dimension, of which `weights` holds views.
    """

    weights: Mapping[str, StoredWeight]
    other: dict[str, torch.Tensor]
    log: dict[str, Any]
    ledger: ExpertLedger | None
    stacks: Mapping[str, StoredWeight] = field(default_factory=dict)


class LayerQuantizer(Protocol[_SettingsT]):
    """Makes the codes of one layer; `_SettingsT` is what a user may set about it."""

    def quantize(
        self,
        spec: LayerSpec,
        tensors: Mapping[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        quantized_stream: Windows,
        source_stream: Windows,
        settings: _SettingsT,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        layer: Layer | None = None,
    ) -> QuantizedLayer:
        """Quantize one decoder layer.

        tensors: the layer's by relative name, dequantized. schemes: by relative weight name; a name without one is
        kept. quantized_stream, source_stream: hidden states [S, L, H] of the same windows as they enter this layer.
        dtype: of activations (float32 on the CPU, bfloat16 elsewhere if None). layer: the tensors where a forward pass
        has already put them; it is left with the source's weights. Same arguments, same device: same bytes.
        Raises CalibrationError for a weight or activation that is not finite.
        """
        ...
