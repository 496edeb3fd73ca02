"""FP8 weights of a source back to BF16 or float32: MiniMax-M2's 128x128 blocks, MiniMax-M3's MXFP8, one scale per row or per tensor.

The product is formed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError
from .fp8 import E4M3_MAX, SQUARE, Block, check_block_scale, multiply_blocks_
from .integer import ensure_finite

MX_BLOCK: Block = (1, 32)  # OCP Microscaling v1.0: 32 consecutive values along K share one E8M0 scale
_E8M0_NAN = 255
BAND_ELEMENTS = 1 << 18  # of float32, which fit a core's second-level cache
_SIGN_AND_MAGNITUDE = -(1 << 15) | 0x7F << 4  # of an int16 made of an E4M3 byte shifted left by four


def dequantize_fp8_block(
    weight: Tensor,
    scale_inv: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    out: Tensor | None = None,
    name: str = "weight",
) -> Tensor:
    """weight * scale_inv per 128x128 block (`_inv` multiplies: DeepSeek-V3, MiniMax-M2).

    weight: float8_e4m3fn [..., N, K]. scale_inv: F32 or BF16 [..., ceil(N/128), ceil(K/128)].
    out_dtype: bfloat16 or float32; or out, a tensor of one of them to fill, of the weight's shape and on its device.
    Raises CheckpointError on a wrong scale shape, a NaN in weight or scale, or a product beyond `out_dtype`.
    """
    _check_codes(weight, name)
    check_block_scale(tuple(weight.shape), scale_inv, SQUARE, name)
    ensure_finite(scale_inv, f"the scale of {name}")
    return _product(weight, scale_inv.float(), SQUARE, out_dtype if out is None else out, name)


def dequantize_mxfp8(
    weight: Tensor,
    scale: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    out: Tensor | None = None,
    name: str = "weight",
) -> Tensor:
    """weight * 2^(scale - 127) per 1x32 along K (OCP MXFP8, E8M0 scales).

    weight: float8_e4m3fn [..., N, K]. scale: uint8 (or float8_e8m0fnu) [..., N, ceil(K/32)].
    out_dtype, out: as `dequantize_fp8_block`.
    Raises CheckpointError on a wrong scale shape, the scale 255 (NaN), a NaN weight, or a product beyond `out_dtype`.
    """
    _check_codes(weight, name)
    if scale.element_size() != 1:
        raise CheckpointError(f"the scale of {name} is {scale.dtype}, but MXFP8 scales are one byte (E8M0).")
    check_block_scale(tuple(weight.shape), scale, MX_BLOCK, name)
    return _product(weight, e8m0_to_float(scale, name=name), MX_BLOCK, out_dtype if out is None else out, name)


def dequantize_fp8_rows(
    weight: Tensor,
    scale: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    out: Tensor | None = None,
    name: str = "weight",
) -> Tensor:
    """weight * scale, one for a row or for the whole tensor (compressed-tensors and ModelOpt: `weight_scale`, and its inverse nowhere).

    weight: float8_e4m3fn [N, K]. scale: F32, BF16 or F16, [N, 1] or [N], or one number.
    out_dtype, out, errors: as `dequantize_fp8_block`.
    """
    _check_codes(weight, name)
    if scale.numel() not in (1, weight.shape[0]):
        raise CheckpointError(
            f"the scale of {name} has shape {list(scale.shape)}, but {weight.shape[0]} rows need one each, or one in all."
        )
    ensure_finite(scale, f"the scale of {name}")
    wide = scale.float().reshape(-1, 1).expand(weight.shape[0], 1)
    return _product(weight, wide, (1, weight.shape[1]), out_dtype if out is None else out, name)


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


def _product(weight: Tensor, scale: Tensor, block: Block, out: Tensor | torch.dtype, name: str) -> Tensor:
    target = target_of(weight.shape, weight.device, out)
    dtype = target.dtype
    if weight.device.type == "cpu" and weight.numel():
        for part, own, matrix in zip(matrices(weight), matrices(scale), matrices(target), strict=True):
            _product_into(part, own, block, matrix, name)
        return target
    work = multiply_blocks_(weight.to(torch.float32), scale, block)
    low, high = torch.aminmax(work)  # NaN fails the comparison below
    if not float(max(-low, high)) <= torch.finfo(dtype).max:
        ensure_finite(weight, name)
        raise too_large(dtype, name)
    return target.copy_(work)


def target_of(shape: Sequence[int], device: torch.device, out: Tensor | torch.dtype) -> Tensor:
    """`out` itself, or an empty tensor of that dtype. Raises ValueError for a dtype that no source is dequantized to."""
    dtype = out if isinstance(out, torch.dtype) else out.dtype
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"a source is dequantized to bfloat16 or float32, not {dtype}")
    return torch.empty(tuple(shape), dtype=dtype, device=device) if isinstance(out, torch.dtype) else out


def matrices(tensor: Tensor) -> Tensor:
    """[..., N, K] as [M, N, K], the same memory."""
    return tensor.view(-1, *tensor.shape[-2:])


def _product_into(codes: Tensor, scale: Tensor, block: Block, out: Tensor, name: str) -> None:
    """`_product` of one matrix [N, K] on a CPU, band by band in its cache; scale: finite float32.

    Torch's own cast from E4M3 costs four times all the rest here. The seven bits of a code's magnitude, at the top of a
    BF16 value's, are that value times 2^-120, subnormal ones too; and 2^120 times it is exact.
    """
    limit = torch.finfo(out.dtype).max
    rows = max(1, BAND_ELEMENTS // codes.shape[1] // block[0]) * block[0]
    for first in range(0, codes.shape[0], rows):
        band = codes[first : first + rows]
        own = scale[first // block[0] : (first + rows) // block[0]]
        bits = band.view(torch.int8).to(torch.int16)  # the sign is in all of the upper byte
        bits.bitwise_left_shift_(4).bitwise_and_(_SIGN_AND_MAGNITUDE)
        work = bits.view(torch.bfloat16).to(torch.float32).mul_(2.0**120)
        low, high = torch.aminmax(work)
        if float(max(-low, high)) > E4M3_MAX:  # NaN's bits read as 480
            ensure_finite(codes, name)
        multiply_blocks_(work, own, block)
        if float(own.abs().max()) * E4M3_MAX > limit and not float(work.abs().max()) <= limit:
            raise too_large(out.dtype, name)
        out[first : first + rows] = work


def too_large(dtype: torch.dtype, name: str) -> CheckpointError:
    return CheckpointError(f"{name} times its scale exceeds {dtype}: the scale is damaged, download it again.")
