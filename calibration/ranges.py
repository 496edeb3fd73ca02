"""Activation-weighted range search: per group, the scale with the least error in the layer's output.

For y = x W^T the expected squared output error of a rounded weight is about sum_k E[x_k^2] (w_k - q(w_k))^2 when
input channels are uncorrelated (the importance matrix of llama.cpp, `imatrix_mse` of llm-compressor). It changes no
tensor of the graph, only the position of the rounding grid, so it is exact for any activation function.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from m3quant.quant.integer import dequantize, int_qparams, quantize
from m3quant.schemes import Scheme

# Factors of the group's full-range scale, the full range first: it stays wherever nothing is strictly better.
# Measured on 512 x 1024 weights (Gaussian and Student-t, 4 degrees of freedom) and inputs with salient channels,
# held-out output error of int4 against going from 1.0 down to 0.5 in the same steps of 0.025: factors up to 1.15 gain
# another 1 % (flat inputs) to 5 % (salient channels) at g128 and 8-19 % at g32, because a salient weight may want
# another grid, and the symmetric grid's positive end clips at 7/7.5. Stopping at 0.6 instead of 0.5 costs up to 36 %
# on heavy-tailed weights; steps of 0.0125 gain under 2 %.
FACTORS: tuple[float, ...] = (1.0, *(round(1.15 - 0.025 * i, 3) for i in range(27) if i != 6))

# Enough to choose a fold scale that suits searched ranges: with them the best ratio is lower than for plain rounding
# (0.15 against 0.25 on planted salient channels), because a range can also be given up for the sake of a salient
# channel.
COARSE_FACTORS: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7)

# Elements of weight searched at once; each costs about 24 bytes of scratch.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 25}


def qparams(
    weight: torch.Tensor, scheme: Scheme, shrink: float | torch.Tensor = 1.0, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`quant.integer.int_qparams` for any factor: weight [..., N, K], shrink [..., N, G] or a number.

    Returns scale [..., N, G] float32, exact in scale_dtype, and zero point int8 or None. A negative factor (symmetric
    schemes only) gives a negative scale of the same magnitude.
    """
    return _ends_qparams(_ends(weight, scheme), scheme, shrink, scale_dtype)


def fake_quantize(
    weight: torch.Tensor, scheme: Scheme, shrink: float | torch.Tensor = 1.0, scale_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """The float32 weight [..., N, K] that an engine sees after `weight` is stored with `qparams(...)`."""
    if fused(weight, scheme, scale_dtype) and (isinstance(shrink, torch.Tensor) or shrink == 1.0):
        from m3quant.calibration.kernels import round_groups

        given = shrink.reshape(-1, *shrink.shape[-2:]) if isinstance(shrink, torch.Tensor) else None
        rounded = round_groups(weight.reshape(-1, *weight.shape[-2:]), scheme, shrink=given)[0]
        assert rounded is not None
        return rounded.view(weight.shape)
    scale, zero_point = qparams(weight, scheme, shrink, scale_dtype)
    return dequantize(quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme)


def fused(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> bool:
    """Whether the Triton kernel, which gives the same numbers, takes this weight."""
    if not weight.is_cuda:
        return False
    from m3quant.calibration.kernels import supports

    return supports(weight, scheme, scale_dtype)


def _ends(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The smallest and largest weight of every group, side by side: [..., N, K] -> [..., N, 2 G] float32."""
    groups = torch.unflatten(weight, -1, (-1, scheme.group_size or weight.shape[-1]))
    return torch.stack(torch.aminmax(groups, dim=-1), dim=-1).float().flatten(-2)


def _ends_qparams(
    ends: torch.Tensor, scheme: Scheme, shrink: float | torch.Tensor, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A group's parameters depend on its two ends only: each group is handed over as two scaled numbers."""
    factor = torch.as_tensor(shrink, dtype=torch.float32, device=ends.device)
    size = factor.abs()
    scaled = ends * (size.repeat_interleave(2, dim=-1) if size.dim() else size)
    scale, zero_point = int_qparams(scaled, replace(scheme, group_size=2), scale_dtype=scale_dtype)
    return torch.where(factor < 0, -scale, scale), zero_point


def search_range(
    weight: torch.Tensor,
    scheme: Scheme,
    second_moment: torch.Tensor,
    factors: tuple[float, ...] = FACTORS,
    scale_dtype: torch.dtype = torch.bfloat16,
    signed: bool = True,
) -> torch.Tensor:
    """The best factor of the full-range scale for every group.

    weight: [..., N, K] (any float dtype, searched in float32); second_moment: [..., K] float32, E[x^2] per input
    channel, with the same leading dimensions; scheme: an integer scheme, grouped along K or one group per row
    ("channel"). With `signed`, a symmetric grid, which has one more step below zero than above (-8..7), is turned by a negative scale for a group whose largest
    weight is positive, which puts that weight on the longer side (llama.cpp's Q4_0 does so for
    every block). On trained weights that takes another 9 % off the squared error. Returns shrink [..., N, G] float32 for `qparams`; 1.0 where no factor is strictly better. The scale
    is rounded to scale_dtype, as it will be stored, before it is evaluated. Ties go to the earlier factor: same input,
    same result.
    """
    lead, (rows, columns) = weight.shape[:-2], weight.shape[-2:]
    flat, moment = weight.reshape(-1, rows, columns), second_moment.reshape(-1, 1, columns)
    if fused(weight, scheme, scale_dtype):
        from m3quant.calibration.kernels import round_groups

        found = round_groups(flat, scheme, moment=moment[:, 0].float(), factors=factors, signed=signed, acting=False)[1]
        assert found is not None
        return found.view(*lead, rows, -1)
    shrink = torch.empty(flat.shape[0], rows, group_count(columns, scheme), dtype=torch.float32, device=weight.device)
    for batch, span in _chunks(flat.shape, _CHUNK["cuda" if weight.is_cuda else "cpu"]):
        part = flat[batch, span].float()
        shrink[batch, span] = _search(part, scheme, moment[batch].float(), factors, scale_dtype, signed)
    return shrink.reshape(*lead, rows, -1)


def group_count(columns: int, scheme: Scheme) -> int:
    """Groups along K of a weight with `columns` input channels."""
    return columns // scheme.group_size if scheme.group_size else 1


def weighted_error(
    weight: torch.Tensor, rounded: torch.Tensor, second_moment: torch.Tensor, scheme: Scheme
) -> torch.Tensor:
    """sum_k m_k (w_k - q_k)^2 per group: all three broadcast to [..., N, K]; result [..., N, G]."""
    error = (weight - rounded).square_().mul_(second_moment)
    return torch.unflatten(error, -1, (-1, scheme.group_size or weight.shape[-1])).sum(-1)


def blend(own: torch.Tensor, prior: torch.Tensor, tokens: float | torch.Tensor, prior_tokens: float) -> torch.Tensor:
    """A second moment estimated from few tokens, pulled towards a prior [K] as if that were `prior_tokens` more tokens.

    Keeps an expert that saw ten tokens from trusting channels that happened to be silent in them.
    """
    return (own * tokens + prior * prior_tokens) / (tokens + prior_tokens)


def _search(
    weight: torch.Tensor,
    scheme: Scheme,
    moment: torch.Tensor,
    factors: tuple[float, ...],
    scale_dtype: torch.dtype,
    signed: bool,
) -> torch.Tensor:
    ends = _ends(weight, scheme)
    low, high = torch.unflatten(ends, -1, (-1, 2)).unbind(-1)
    sign = torch.where((high > -low) & (signed and scheme.symmetric), -1.0, 1.0)
    best = torch.full((), torch.inf, device=weight.device)
    shrink = torch.ones((), device=weight.device)
    for factor in (torch.ones_like(sign), *(sign * f for f in factors)):
        scale, zero_point = _ends_qparams(ends, scheme, factor, scale_dtype)
        rounded = dequantize(quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme)
        error = weighted_error(weight, rounded, moment, scheme)
        better = error < best
        best = torch.where(better, error, best)
        shrink = torch.where(better, factor, shrink)
    return shrink


def _chunks(shape: torch.Size, limit: int) -> Iterator[tuple[slice, slice]]:
    """Cut [B, N, K] into (batch, row) slices of at most `limit` elements (at least one row)."""
    batches, rows, columns = shape
    if rows * columns <= limit:
        step = max(1, limit // (rows * columns))
        for start in range(0, batches, step):
            yield slice(start, start + step), slice(None)
        return
    step = max(1, limit // columns)
    for batch in range(batches):
        for start in range(0, rows, step):
            yield slice(batch, batch + 1), slice(start, start + step)
