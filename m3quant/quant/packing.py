"""Codes to int32 words and back, in the orders of compressed-tensors and AutoAWQ.

Codes are signed int8 in [-2^(b-1), 2^(b-1)-1] and are stored with 2^(b-1) added. Everything is done on bytes:
4-bit codes pair up into one byte, low nibble first, and four bytes are one little-endian word.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# Column of each group of eight that nibble 0..7 of an AutoAWQ word holds (AutoAWQ utils/packing_utils.py, AWQ_ORDER).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_REVERSE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def _check(codes: Tensor, dtype: torch.dtype, bits: int) -> None:
    if codes.dtype != dtype:
        raise ValueError(f"expected {dtype}, got {codes.dtype}")
    if bits not in (4, 8):
        raise ValueError(f"packing is defined for 4 and 8 bits, not {bits}")


def _reinterpret(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of `tensor` as `dtype`, the last dimension rescaled.

    Through a flat tensor, because `view(dtype)` looks at strides and those are arbitrary in a dimension of size 1.
    """
    last = tensor.shape[-1] * tensor.element_size() // dtype.itemsize
    return tensor.reshape(-1).view(dtype).reshape(*tensor.shape[:-1], last)


def densely(tensor: Tensor) -> Tensor:
    """A copy with row-major strides; `contiguous()` leaves odd ones in size-1 dimensions, which a byte view refuses."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes with the offset 2^(bits-1) added; wraps modulo 256 as intended."""
    return codes.view(torch.uint8) + (1 << (bits - 1))


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [..., N, K] to int32 [..., N, ceil(K * bits / 32)] (compressed-tensors `pack_to_int32`).

    Code i sits in bits `bits * (i mod per_word)` of word `i // per_word`; a last partial word is filled with zero bits.
    """
    _check(codes, torch.int8, bits)
    unsigned = _unsigned(codes, bits)
    short = -codes.shape[-1] % (32 // bits)
    if short:
        unsigned = pad(unsigned, (0, short))
    if bits == 4:
        unsigned = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    return _reinterpret(unsigned, torch.int32)


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [..., N, W] back to int8 codes [..., N, columns]."""
    _check(packed, torch.int32, bits)
    if packed.shape[-1] * 32 // bits < columns:
        raise ValueError(f"{packed.shape[-1]} words hold fewer than {columns} codes of {bits} bits")
    unsigned = _reinterpret(packed, torch.uint8)
    if bits == 4:
        unsigned = torch.stack((unsigned & 0xF, unsigned >> 4), dim=-1).flatten(-2)
    return unsigned[..., :columns].sub(1 << (bits - 1)).view(torch.int8)


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [..., N, G] packed along N, as zero points are: int32 [..., ceil(N * bits / 32), G]."""
    return densely(pack_rows(codes.transpose(-1, -2), bits).transpose(-1, -2))


def unpack_columns(packed: Tensor, bits: int, rows: int) -> Tensor:
    """int32 [..., W, G] back to int8 codes [..., rows, G]."""
    return unpack_rows(packed.transpose(-1, -2), bits, rows).transpose(-1, -2).contiguous()


def pack_awq(codes: Tensor) -> Tensor:
    """int8 4-bit codes [..., R, N] to AutoAWQ GEMM words int32 [..., R, N / 8], packed along the output dimension N.

    R is K for weights and the group count for zero points. Signed codes and zero points both get 8 added, which cancels
    in their difference. Source: AutoAWQ 0.2.9 `modules/linear/gemm.py: WQLinear_GEMM.from_linear`.
    """
    _check(codes, torch.int8, 4)
    if codes.shape[-1] % 8:
        raise ValueError(f"AutoAWQ packs eight outputs to a word; {codes.shape[-1]} is not a multiple of 8")
    eights = _unsigned(codes, 4).unflatten(-1, (-1, 8))
    octets = eights[..., AWQ_ORDER[0::2]] | (eights[..., AWQ_ORDER[1::2]] << 4)
    return _reinterpret(octets.flatten(-2), torch.int32)


def unpack_awq(packed: Tensor) -> Tensor:
    """AutoAWQ GEMM words int32 [..., R, N / 8] back to int8 codes [..., R, N]."""
    _check(packed, torch.int32, 4)
    octets = _reinterpret(packed, torch.uint8).unflatten(-1, (-1, 4))
    nibbles = torch.stack((octets & 0xF, octets >> 4), dim=-1).flatten(-2)
    return nibbles[..., AWQ_REVERSE_ORDER].flatten(-2).sub_(8).view(torch.int8)
