"""The grid of a scheme's codes, and the scales and zero points to start from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from m3quant.calibration.quantized_layer import StoredWeight
from m3quant.calibration.ranges import FACTORS, qparams, search_range
from m3quant.quant import fp8
from m3quant.quant.integer import int_qparams, int_range
from m3quant.schemes import FP8_BLOCK, Scheme

# A grid of four or eight points may have to leave much of a group's range outside it: with 128 normally distributed weights the
# best step of four points is 0.55 of the full range's.
_LOW_BIT = 3
LOW_BIT_FACTORS: tuple[float, ...] = (1.0, *(round(1.15 - 0.025 * i, 3) for i in range(36) if i != 6))
_SIDE_FACTORS = ((0.5, 0.7, 0.85, 1.15, 1.35), (0.85, 0.93, 1.07, 1.15))  # of one end, where the other stays


@dataclass
class Levels:
    """Scale and zero point of every group, groups first: [E, G, N] float32; zero None for symmetric grids."""

    scale: torch.Tensor
    zero: torch.Tensor | None = None

    def at(self, column: int) -> Levels:
        """Those of one column of what `columns` gave: [E, N]."""
        return Levels(self.scale[:, column], None if self.zero is None else self.zero[:, column])

    def columns(self, groups: torch.Tensor) -> Levels:
        """Those of every column, groups [E, K] int64: [E, K, N]."""
        pick = torch.arange(len(groups), device=groups.device)[:, None]
        return Levels(self.scale[pick, groups], None if self.zero is None else self.zero[pick, groups])


@dataclass(frozen=True)
class Grid:
    """Codes of one scheme; arithmetic as `quant.integer` and `quant.fp8`, in float32."""

    scheme: Scheme

    def codes(self, values: torch.Tensor, levels: Levels) -> torch.Tensor:
        """The nearest codes, as float32, halves to even: values and levels of one shape."""
        codes = values / levels.scale
        if self.scheme.kind == "fp8":
            return codes.clamp_(-fp8.E4M3_MAX, fp8.E4M3_MAX).to(torch.float8_e4m3fn).to(values.dtype)
        if levels.zero is not None:
            codes.add_(levels.zero)
        return codes.clamp_(*int_range(self.scheme)).round_()

    def values(self, codes: torch.Tensor, levels: Levels) -> torch.Tensor:
        """What an engine computes with: (code - zero) * scale."""
        return (codes if levels.zero is None else codes - levels.zero) * levels.scale

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.scheme.kind == "fp8" else torch.int8

    @property
    def limits(self) -> tuple[int, int] | None:
        """The smallest and the largest code; None for E4M3."""
        return None if self.scheme.kind == "fp8" else int_range(self.scheme)

    def size(self, columns: int) -> int:
        """Columns of a group."""
        return FP8_BLOCK if self.scheme.block else self.scheme.group_size or columns

    def groups(self, columns: int) -> torch.Tensor:
        """[K] int64: the group of every column."""
        return torch.arange(columns) // self.size(columns)

    def start(self, weight: torch.Tensor, importance: torch.Tensor, dtype: torch.dtype, signed: bool) -> Levels:
        """Levels of weight [E, N, K] by the range search with the importance [E, K] of its columns."""
        scheme = self.scheme
        if scheme.kind == "fp8":
            scale = fp8.block_scale(weight) if scheme.block else fp8.channel_scale(weight)
            if scheme.block:
                scale = scale.repeat_interleave(FP8_BLOCK, dim=1)[:, : weight.shape[1]]
            return Levels(scale.transpose(1, 2).contiguous())
        if scheme.bits > _LOW_BIT or scheme.symmetric:
            factors = FACTORS if scheme.bits > _LOW_BIT else LOW_BIT_FACTORS
            shrink = search_range(weight, scheme, importance, factors, dtype, signed)
            scale, zero = qparams(weight, scheme, shrink, dtype)
        else:
            scale, zero = _search_sides(weight, scheme, importance, dtype)
        scale = scale.transpose(1, 2).contiguous()
        return Levels(scale, None if zero is None else zero.transpose(1, 2).to(torch.float32).contiguous())

    def stored(self, codes: torch.Tensor, levels: Levels) -> StoredWeight:
        """codes [E, K, N] and levels as they will be stored, [E, N, K] and [E, N, G] contiguous."""
        scale = levels.scale.transpose(1, 2).contiguous()
        if self.scheme.block:
            scale = scale[:, ::FP8_BLOCK].contiguous()
        zero = None if levels.zero is None else levels.zero.transpose(1, 2).to(torch.int8).contiguous()
        return StoredWeight(codes.transpose(1, 2).to(self.code_dtype).contiguous(), scale, zero)


def _search_sides(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [E, N, G] of an asymmetric grid of few points: one factor for both ends of the range first,
    then each end on its own, in steps that grow finer.

    One factor, as in `ranges`, keeps the zero point of the full range; with four points there are but four to choose from.
    """
    size = scheme.group_size or weight.shape[-1]
    grouped = torch.unflatten(weight.float(), -1, (-1, size))
    wanted = torch.unflatten(importance[:, None, :], -1, (-1, size))
    ends = Scheme("int", scheme.bits, 2, symmetric=False)

    def tried(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale, zero = int_qparams(torch.stack((low, high), -1).flatten(-2), ends, scale_dtype=dtype)
        assert zero is not None
        step, shift = scale[..., None], zero[..., None].float()
        rounded = (grouped / step).add_(shift).clamp_(*int_range(scheme)).round_().sub_(shift).mul_(step)
        return rounded.sub_(grouped).square_().mul_(wanted).sum(-1), scale, zero, low, high

    factor = search_range(weight, scheme, importance, LOW_BIT_FACTORS, dtype)
    best = tried(grouped.amin(-1).clamp_(max=0.0) * factor, grouped.amax(-1).clamp_(min=0.0) * factor)
    for factors in _SIDE_FACTORS:
        for side in (4, 3):
            start = best[3:]
            for one in factors:
                low, high = start
                found = tried(low * one, high) if side == 3 else tried(low, high * one)
                better = found[0] < best[0]
                best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    return best[1], best[2]
