"""Round-to-nearest integers of 2 to 8 bits of a weight [..., N, K], per group of K or per output row.

The formulas are compressed-tensors 0.20's (`quantization/utils/helpers.py`, `quantization/lifecycle/forward*.py`):

    symmetric    scale = max|w| / ((2^b - 1) / 2)                   code = round(clamp(w / scale))
    asymmetric   scale = (max(w, 0) - min(w, 0)) / (2^b - 1)        code = round(clamp(w / scale + zero))
                 zero  = round(clamp(qmin - min(w, 0) / scale))     codes and zero in -2^(b-1) .. 2^(b-1) - 1

m3quant differs in three places. A scale is rounded to the dtype it is stored in before anything is computed from it, the
zero point included, so that the codes belong to the scale that an engine reads. All arithmetic is float32: in bfloat16, as
happens to a bfloat16 model there, the quotient is rounded twice. And a group of zeros gets the scale 2^-23 and the
zero point qmin, where the asymmetric formula divides zero by zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..schemes import Scheme

# Exact in F32, BF16 and F16. Any positive value is right, since all codes of such a group are 0.
ZERO_GROUP_SCALE = 2.0**-23
_F16_STEP = 2.0**-24  # spacing of F16 below its smallest normal, and its smallest positive value
_SCALE_FLOOR = torch.finfo(torch.float32).tiny  # smaller scales are subnormal, which some kernels flush to zero


FINITE_REMEDY = "compare the shard's checksum with the source's and download it again, or mend what wrote it"


def ensure_finite(tensor: Tensor, name: str) -> None:
    """Raises CheckpointError if `tensor` (any floating dtype, FP8 included) holds a NaN or an infinity."""
    if tensor.numel() == 0:
        return
    if tensor.element_size() == 1:  # E4M3 has no infinity, and NaN is all ones below the sign
        bad = int(((tensor.view(torch.uint8) & 0x7F) == 0x7F).sum())
    else:
        low, high = torch.aminmax(tensor)  # propagates NaN; no temporary of the tensor's size
        if bool(torch.isfinite(low) & torch.isfinite(high)):
            return
        bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise CheckpointError(
            f"NaN/Inf in {name}: {bad} of {tensor.numel()} values are not finite, which no recipe mends: {FINITE_REMEDY}."
        )


def int_range(scheme: Scheme) -> tuple[int, int]:
    """(qmin, qmax) of the signed codes: (-2, 1) for 2 bits, (-8, 7) for 4, (-128, 127) for 8."""
    if scheme.kind != "int":
        raise ValueError(f"{scheme} is not an integer scheme")
    half = 1 << (scheme.bits - 1)
    return -half, half - 1


def round_scale(scale: Tensor, dtype: torch.dtype, name: str = "weight") -> Tensor:
    """float32 scales as `dtype` stores them, returned in float32. The sign is kept and the magnitude rounded.

    BF16 and F16 round to nearest; an F16 subnormal rounds up, since down would clip by up to half the range.
    Raises CheckpointError where F16, the only dtype here with less range than the weights, would overflow or underflow.
    """
    negative = scale < 0
    if bool(negative.any()):
        return torch.where(negative, -1.0, 1.0) * round_scale(scale.abs(), dtype, name)
    if dtype != torch.float16:
        return scale.to(dtype).float().clamp_min(_SCALE_FLOOR)
    low, high = (float(v) for v in torch.aminmax(scale))
    overflow = high > torch.finfo(torch.float16).max
    if overflow or low < _F16_STEP:
        worst, why = (high, "exceeds F16 (largest 65504)") if overflow else (low, "underflows F16 (smallest 6e-8)")
        raise CheckpointError(
            f"a group of {name} needs the scale {worst:.3g}, which {why}, the dtype of AutoAWQ's scales: "
            "use --format compressed-tensors, whose scales are BF16, or keep this tensor."
        )
    rounded = scale.to(torch.float16).float()
    subnormal = scale < torch.finfo(torch.float16).tiny
    return torch.where(subnormal, torch.ceil(scale / _F16_STEP) * _F16_STEP, rounded)


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """View [..., N, G, K/G]; splitting a dimension never copies."""
    columns = weight.shape[-1]
    size = scheme.group_size or columns
    if columns % size:
        raise ValueError(f"group size {size} does not divide the {columns} columns of {tuple(weight.shape)}")
    return torch.unflatten(weight, -1, (columns // size, size))


def int_qparams(
    weight: Tensor,
    scheme: Scheme,
    shrink: float | Tensor = 1.0,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    name: str = "weight",
) -> tuple[Tensor, Tensor | None]:
    """Min-max scale and zero point of every group.

    weight: [..., N, K] BF16, F16 or F32. shrink: factor in (0, 1] on the range of each group (both ends where
    asymmetric), a number or a tensor that broadcasts to [..., N, G]. scale_dtype: what the scale will be stored as.

    Returns the scale [..., N, G] in float32, exact in `scale_dtype` and never zero, and the zero point [..., N, G] int8
    in the range of the codes, or None for a symmetric scheme. Raises CheckpointError on NaN or Inf, naming the weight.
    """
    low, high = torch.aminmax(_grouped(weight, scheme), dim=-1)  # propagates NaN and Inf: the whole weight is checked
    low, high = low.float(), high.float()
    if isinstance(shrink, Tensor) or shrink != 1.0:
        _check_shrink(shrink)
        low, high = low * shrink, high * shrink
    found = range_qparams(low, high, scheme, scale_dtype=scale_dtype, name=name)
    if found is None:
        ensure_finite(weight, name)
        raise CheckpointError(f"the range of a group of {name} exceeds float32: keep this tensor or repair the source.")
    return found


def range_qparams(
    low: Tensor, high: Tensor, scheme: Scheme, *, scale_dtype: torch.dtype = torch.bfloat16, name: str = "weight"
) -> tuple[Tensor, Tensor | None] | None:
    """`int_qparams` of groups whose least and largest values are `low` and `high` [..., N, G], float32.

    None where a scale would not be finite.
    """
    qmin, qmax = int_range(scheme)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = torch.maximum(-low, high) * 2 if scheme.symmetric else high - low
    # A tensor divisor: CUDA turns division by a Python number into a product with its reciprocal, one bit off the CPU's.
    scale /= torch.full((), float(qmax - qmin), device=scale.device)
    if not bool(torch.isfinite(scale).all()):
        return None
    scale = torch.where(scale == 0, ZERO_GROUP_SCALE, scale)
    scale = round_scale(scale, scale_dtype, name)
    if scheme.symmetric:
        return scale, None
    zero_point = torch.round((qmin - low / scale).clamp_(qmin, qmax)).to(torch.int8)
    return scale, zero_point


def _check_shrink(shrink: float | Tensor) -> None:
    low, high = (float(v) for v in torch.aminmax(shrink)) if isinstance(shrink, Tensor) else (shrink, shrink)
    if not (low > 0.0 and high <= 1.0):
        raise ValueError(f"shrink must lie in (0, 1], got {low:g} to {high:g}")


def _round_in_place(work: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """Replaces float32 `work` [..., N, K] by its codes, still float32; returns the view [..., N, G, K/G]."""
    qmin, qmax = int_range(scheme)
    groups = _grouped(work, scheme).div_(scale.unsqueeze(-1))
    if zero_point is not None:
        groups.add_(zero_point.unsqueeze(-1))
    return groups.clamp_(qmin, qmax).round_()


def quantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, *, name: str = "weight"
) -> Tensor:
    """Signed codes int8 [..., N, K] of `weight` under a scale [..., N, G] (not zero, used as given; a
    negative one turns a symmetric grid) and zero point.

    Ties round to even. Extra memory: one float32 copy of the weight. Raises CheckpointError on NaN or Inf.
    """
    ensure_finite(weight, name)
    work = weight.to(torch.float32, copy=True)
    _round_in_place(work, scale, zero_point, scheme)
    return work.to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """(code - zero) * scale in float32 [..., N, K]; exact when the scale is a BF16 value."""
    work = codes.to(torch.float32)
    groups = _grouped(work, scheme)
    if zero_point is not None:
        groups.sub_(zero_point.unsqueeze(-1))
    groups.mul_(scale.unsqueeze(-1))
    return work


def fake_quantize(
    weight: Tensor,
    scheme: Scheme,
    shrink: float | Tensor = 1.0,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    name: str = "weight",
) -> Tensor:
    """The float32 weight [..., N, K] that an engine sees after storing `weight` as an integer `scheme`.

    Arguments and errors as `int_qparams`. Extra memory: the result itself.
    """
    scale, zero_point = int_qparams(weight, scheme, shrink, scale_dtype=scale_dtype, name=name)
    work = weight.to(torch.float32, copy=True)
    groups = _round_in_place(work, scale, zero_point, scheme)
    if zero_point is not None:
        groups.sub_(zero_point.unsqueeze(-1))
    groups.mul_(scale.unsqueeze(-1))
    return work
