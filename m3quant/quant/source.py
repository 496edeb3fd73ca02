"""Weights of a quantized source back to BF16 or float32: MiniMax-M2's FP8 128x128 blocks and MiniMax-M3's MXFP8.

The product is formed in float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError
from .fp8 import SQUARE, Block, check_block_scale, multiply_blocks_
from .integer import ensure_finite

MX_BLOCK: Block = (1, 32)  # OCP Microscaling v1.0: 32 consecutive values along K share one E8M0 scale
_E8M0_NAN = 255


def dequantize_fp8_block(
    weight: Tensor, scale_inv: Tensor, out_dtype: torch.dtype = torch.bfloat16, *, name: str = "weight"
) -> Tensor:
    """weight * scale_inv per 128x128 block (`_inv` multiplies: DeepSeek-V3, MiniMax-M2).

    weight: float8_e4m3fn [..., N, K]. scale_inv: F32 or BF16 [..., ceil(N/128), ceil(K/128)].
    out_dtype: bfloat16 or float32.
    Raises CheckpointError on a wrong scale shape, a NaN in weight or scale, or a product beyond `out_dtype`.
    """
    _check_codes(weight, name)
    check_block_scale(tuple(weight.shape), scale_inv, SQUARE, name)
    ensure_finite(scale_inv, f"the scale of {name}")
    return _product(weight, scale_inv.float(), SQUARE, out_dtype, name)


def dequantize_mxfp8(
    weight: Tensor, scale: Tensor, out_dtype: torch.dtype = torch.bfloat16, *, name: str = "weight"
) -> Tensor:
    """weight * 2^(scale - 127) per 1x32 along K (OCP MXFP8, E8M0 scales).

    weight: float8_e4m3fn [..., N, K]. scale: uint8 (or float8_e8m0fnu) [..., N, ceil(K/32)].
    out_dtype: bfloat16 or float32.
    Raises CheckpointError on a wrong scale shape, the scale 255 (NaN), a NaN weight, or a product beyond `out_dtype`.
    """
    _check_codes(weight, name)
    if scale.element_size() != 1:
        raise CheckpointError(f"the scale of {name} is {scale.dtype}, but MXFP8 scales are one byte (E8M0).")
    check_block_scale(tuple(weight.shape), scale, MX_BLOCK, name)
    return _product(weight, e8m0_to_float(scale, name=name), MX_BLOCK, out_dtype, name)


def e8m0_to_float(scale: Tensor, *, name: str = "weight") -> Tensor:
    """2^(v - 127) in float32, exactly, for v in 0..254; v = 255 is NaN and raises CheckpointError."""
    exponent = scale.view(torch.uint8)
    bad = int((exponent == _E8M0_NAN).sum())
    if bad:
        raise CheckpointError(f"NaN in the scale of {name}: {bad} E8M0 scales are 255; download the shard again.")
    # The byte is a float32 exponent field; 2^-127, the one subnormal, is the top mantissa bit alone.
    bits = exponent.to(torch.int32) << 23
    return bits.masked_fill_(exponent == 0, 1 << 22).view(torch.float32)


def _check_codes(weight: Tensor, name: str) -> None:
    if weight.dtype != torch.float8_e4m3fn:
        raise CheckpointError(f"{name} has a scale but is {weight.dtype}, not float8_e4m3fn: the source is damaged.")


def _product(weight: Tensor, scale: Tensor, block: Block, out_dtype: torch.dtype, name: str) -> Tensor:
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"a source is dequantized to bfloat16 or float32, not {out_dtype}")
    work = multiply_blocks_(weight.to(torch.float32), scale, block)
    low, high = torch.aminmax(work)  # NaN fails the comparison below
    if not float(max(-low, high)) <= torch.finfo(out_dtype).max:
        ensure_finite(weight, name)
        raise CheckpointError(f"{name} times its scale exceeds {out_dtype}: the scale is damaged, download it again.")
    return work.to(out_dtype)
