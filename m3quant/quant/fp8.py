"""FP8 E4M3 of a weight [..., N, K]: one float32 scale per output row, or per 128x128 block with ragged edges.

    scale = max|w| / 448        code = e4m3(clamp(w / scale, -448, 448))        w' = code * scale

E4M3 here is the finite kind (`float8_e4m3fn`): largest value 448, no infinity, NaN at 0x7F and 0xFF. Torch's cast
rounds to nearest even; above 464 it has given NaN or 448 depending on its version, hence the clamp.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..schemes import FP8_BLOCK
from .integer import ZERO_GROUP_SCALE, ensure_finite

E4M3_MAX = 448.0
_SCALE_FLOOR = torch.finfo(torch.float32).tiny
Block = tuple[int, int]
SQUARE: Block = (FP8_BLOCK, FP8_BLOCK)


def _largest(weight: Tensor, size: int, dim: int) -> tuple[Tensor, Tensor]:
    """(min, max) over consecutive runs of `size` along `dim` (-1 or -2), the last possibly shorter; no copies."""
    whole = weight.shape[dim] // size * size
    parts = []
    if whole:
        parts.append(torch.aminmax(torch.unflatten(weight.narrow(dim, 0, whole), dim, (-1, size)), dim=dim))
    if whole < weight.shape[dim]:
        parts.append(torch.aminmax(weight.narrow(dim, whole, weight.shape[dim] - whole), dim=dim, keepdim=True))
    return torch.cat([p[0] for p in parts], dim), torch.cat([p[1] for p in parts], dim)


def _scale_of(largest: Tensor, weight: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(largest).all()):
        ensure_finite(weight, name)
    # A tensor divisor: CUDA turns division by a Python number into a product with its reciprocal, one bit off the CPU's.
    scale = largest.float() / torch.full((), E4M3_MAX, device=largest.device)
    return torch.where(scale == 0, ZERO_GROUP_SCALE, scale).clamp_min_(_SCALE_FLOOR)


def channel_scale(weight: Tensor, *, name: str = "weight") -> Tensor:
    """float32 [..., N, 1] = max|w| of each row / 448, positive for zeros too. Raises CheckpointError on NaN or Inf."""
    low, high = torch.aminmax(weight, dim=-1, keepdim=True)
    return _scale_of(torch.maximum(-low, high), weight, name)


def block_scale(weight: Tensor, *, name: str = "weight", block: Block = SQUARE) -> Tensor:
    """float32 [..., ceil(N/128), ceil(K/128)] = max|w| of each block / 448. Raises CheckpointError on NaN or Inf."""
    low, high = _largest(weight, block[1], -1)
    _, largest = _largest(torch.maximum(-low, high), block[0], -2)
    return _scale_of(largest, weight, name)


def check_block_scale(shape: tuple[int, ...], scale: Tensor, block: Block, name: str) -> None:
    """Raises CheckpointError unless `scale` has one entry for each block of a weight of `shape` [..., N, K]."""
    expected = (*shape[:-2], ceil(shape[-2] / block[0]), ceil(shape[-1] / block[1]))
    if tuple(scale.shape) != expected:
        raise CheckpointError(
            f"the scale of {name} has shape {list(scale.shape)}, but a weight of shape {list(shape)} in blocks of "
            f"{block[0]}x{block[1]} needs {list(expected)}: the shard is damaged, or config.json is wrong."
        )


def _each_block(work: Tensor, scale: Tensor, block: Block, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Runs in-place `operation(view of work, broadcastable scale)` so that each block is combined with its scale.

    The only temporary is the scale widened along K, 1/block[0] of the weight's size.
    """
    rows, columns = work.shape[-2:]
    if block[0] == 1:
        whole = columns // block[1] * block[1]
        if whole:
            operation(
                torch.unflatten(work[..., :whole], -1, (-1, block[1])), scale[..., : whole // block[1]].unsqueeze(-1)
            )
        if whole < columns:
            operation(work[..., whole:], scale[..., -1:])
        return
    wide = scale.repeat_interleave(block[1], dim=-1)[..., :columns]
    whole = rows // block[0] * block[0]
    if whole:
        operation(
            torch.unflatten(work[..., :whole, :], -2, (-1, block[0])), wide[..., : whole // block[0], :].unsqueeze(-2)
        )
    if whole < rows:
        operation(work[..., whole:, :], wide[..., -1:, :])


def multiply_blocks_(work: Tensor, scale: Tensor, block: Block = SQUARE) -> Tensor:
    """Multiplies float32 `work` [..., N, K] in place by the scale of each block; returns it."""
    _each_block(work, scale, block, Tensor.mul_)
    return work


def _cast(work: Tensor) -> Tensor:
    return work.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_channel(weight: Tensor, scale: Tensor, *, name: str = "weight") -> Tensor:
    """float8_e4m3fn [..., N, K] of weight / scale [..., N, 1], saturating. Raises CheckpointError on NaN or Inf."""
    ensure_finite(weight, name)
    return _cast(weight.to(torch.float32, copy=True).div_(scale))


def quantize_block(weight: Tensor, scale: Tensor, *, name: str = "weight") -> Tensor:
    """float8_e4m3fn [..., N, K] of weight / scale [..., ceil(N/128), ceil(K/128)] as above."""
    check_block_scale(tuple(weight.shape), scale, SQUARE, name)
    ensure_finite(weight, name)
    work = weight.to(torch.float32, copy=True)
    _each_block(work, scale, SQUARE, Tensor.div_)
    return _cast(work)


def dequantize_channel(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [..., N, K] = code * scale [..., N, 1]."""
    return codes.to(torch.float32).mul_(scale)


def dequantize_block(codes: Tensor, scale: Tensor, *, name: str = "weight") -> Tensor:
    """float32 [..., N, K] = code * scale of its 128x128 block."""
    check_block_scale(tuple(codes.shape), scale, SQUARE, name)
    return multiply_blocks_(codes.to(torch.float32), scale)
