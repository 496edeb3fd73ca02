"""NVFP4 and MXFP4 weights of a source back to BF16 or float32, and the check of a global scale's convention.

A byte holds two E2M1 codes, the even column in the low half (compressed-tensors `compressors/nvfp4/helpers.py`, ModelOpt
`qtensor/nvfp4_tensor.py`). A group's scale and the tensor's global one are combined in float32, as both libraries do; the product with the
code is formed in float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError
from .dequantize import BAND_ELEMENTS, MX_BLOCK, e8m0_to_float, matrices, target_of, too_large
from .fp8 import Block, check_block_scale, multiply_blocks_
from .integer import ensure_finite

NV_BLOCK: Block = (1, 16)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the low three bits of a code; the fourth is the sign
E2M1_MAX = E2M1[-1]


def dequantize_nvfp4(
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    divides: bool,
    out: Tensor | None = None,
    name: str = "weight",
) -> Tensor:
    """code * (scale / global_scale) per 16 values along K where `divides` (compressed-tensors), else code * (scale * global_scale).

    packed: uint8 [..., N, K/2]. scale: float8_e4m3fn [..., N, K/16]. global_scale: one float32.
    out_dtype: bfloat16 or float32; or out, a tensor of one of them to fill, [..., N, K] on the codes' device.
    Raises CheckpointError on a wrong scale shape, a scale of NaN, a global scale of NaN, zero or infinity, or a product beyond `out_dtype`.
    """
    check_block_scale((*packed.shape[:-1], packed.shape[-1] * 2), scale, NV_BLOCK, name)
    ensure_finite(scale, f"the scale of {name}")
    return _product(
        packed,
        group_scales(scale, global_scale, divides=divides, name=name),
        NV_BLOCK,
        out_dtype if out is None else out,
        name,
    )


def dequantize_mxfp4(
    packed: Tensor,
    scale: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    out: Tensor | None = None,
    name: str = "weight",
) -> Tensor:
    """code * 2^(scale - 127) per 32 values along K. packed: uint8 [..., N, K/2]; scale: uint8 (or float8_e8m0fnu) [..., N, K/32].

    out_dtype, out: as `dequantize_nvfp4`. Raises CheckpointError on a wrong scale shape, a scale of 255 (NaN), or too large a product.
    """
    check_block_scale((*packed.shape[:-1], packed.shape[-1] * 2), scale, MX_BLOCK, name)
    return _product(packed, e8m0_to_float(scale, name=name), MX_BLOCK, out_dtype if out is None else out, name)


def group_scales(scale: Tensor, global_scale: Tensor, *, divides: bool, name: str = "weight") -> Tensor:
    """float32 of a group's scale and the tensor's global one together. Raises CheckpointError for a global scale that is no factor."""
    factor = float(global_scale)
    if not 0 < factor < float("inf"):
        raise CheckpointError(
            f"the global scale of {name} is {factor}, which no weight can be multiplied or divided by: fetch its shard again, or take "
            "the weights from another release."
        )
    whole = global_scale.to(torch.float32).reshape(())
    wide = scale.to(torch.float32)
    return wide.div_(whole) if divides else wide.mul_(whole)


def unpack(packed: Tensor) -> Tensor:
    """float32 [..., K] of the E2M1 values in uint8 [..., K/2]."""
    pairs = _pairs(packed.device)
    found = torch.index_select(pairs, 0, packed.reshape(-1).to(torch.int32))
    return found.view(torch.float32).view(*packed.shape[:-1], packed.shape[-1] * 2)


def _pairs(device: torch.device) -> Tensor:
    """Byte -> its two values as one int64, so that one look-up gives both."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float32, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([values[byte & 15], values[byte >> 4]], 1).contiguous().view(torch.int64).view(-1)


def _product(packed: Tensor, scale: Tensor, block: Block, out: Tensor | torch.dtype, name: str) -> Tensor:
    if packed.dtype != torch.uint8:
        raise CheckpointError(f"{name} has 4-bit scales but is {packed.dtype}, not uint8: the source is damaged.")
    target = target_of((*packed.shape[:-1], packed.shape[-1] * 2), packed.device, out)
    if not packed.numel():
        return target
    largest = float(scale.abs().max()) * E2M1_MAX
    if not largest <= torch.finfo(target.dtype).max:
        raise too_large(target.dtype, name)
    for codes, own, matrix in zip(matrices(packed), matrices(scale), matrices(target), strict=True):
        rows = max(1, BAND_ELEMENTS // matrix.shape[1]) if packed.device.type == "cpu" else len(codes)
        for first in range(0, len(codes), rows):
            matrix[first : first + rows] = multiply_blocks_(
                unpack(codes[first : first + rows]), own[first : first + rows], block
            )
    return target
