"""Codes to int32 words and back, in the orders of compressed-tensors and AutoAWQ.

Codes are signed int8 in [-2^(b-1), 2^(b-1)-1], b from 2 to 8, and are stored with 2^(b-1) added as one dense
little-endian bit stream: code i of a row is in the row's bits b i to b i + b - 1, across the border of two words if
need be (compressed-tensors >= 0.20 `pack_quantized/helpers.py`; older ones pad every word unless b divides 32).

Everything is done on bytes: 4-bit codes pair up into one byte, low nibble first; of the other widths eight codes are
the eight bytes of an int64, which is squeezed in three steps (bytes to pairs, to fours, to all eight) into b bytes. The
same operations run on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..schemes import INT_BITS

# Column of each group of eight that nibble 0..7 of an AutoAWQ word holds (AutoAWQ utils/packing_utils.py, AWQ_ORDER).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_REVERSE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


WORD_BITS = 32
# Lane widths of an int64 that are merged in turn, and the mask of every other lane of that width.
_LANES = ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF))
# Codes that are squeezed at a time on a CPU: a block's int64 and its temporary fit the second-level cache.
_BLOCK = 1 << 18
_UNIT = 32  # codes that fill whole words, whatever the width


def _check(codes: Tensor, dtype: torch.dtype, bits: int) -> None:
    if codes.dtype != dtype:
        raise ValueError(f"expected {dtype}, got {codes.dtype}")
    if bits not in INT_BITS:
        raise ValueError(f"packing is defined for {INT_BITS[0]} to {INT_BITS[-1]} bits, not {bits}")


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

    A last partial word is filled with zero bits.
    """
    _check(codes, torch.int8, bits)
    unsigned = _unsigned(codes, bits)
    columns = codes.shape[-1]
    short = -columns % (_UNIT if bits not in (4, 8) else WORD_BITS // bits)
    if short:
        unsigned = pad(unsigned, (0, short))
    packed = _reinterpret(pack_bytes(unsigned, bits), torch.int32)
    words = -(-columns * bits // WORD_BITS)
    return packed if packed.shape[-1] == words else packed[..., :words].contiguous()


def pack_bytes(unsigned: Tensor, bits: int, overwrite: bool = False) -> Tensor:
    """uint8 codes [..., K] below 2^bits, K a multiple of 8, to the uint8 bytes [..., K * bits / 8] of their stream.

    For 8 bits the argument itself. overwrite: the argument, if row-major, may be used as scratch.
    """
    if bits == 8:
        return unsigned
    if bits == 4:
        return unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    eights = unsigned.reshape(-1).view(torch.int64)
    part = torch.uint8 if bits % 2 else torch.int16  # what the squeezed bytes are copied by
    parts = bits // part.itemsize
    out = torch.empty(eights.numel(), parts, dtype=part, device=unsigned.device)
    step = _BLOCK // 8 if unsigned.device.type == "cpu" else max(1, eights.numel())
    for first in range(0, eights.numel(), step):
        block = eights[first : first + step]
        squeezed = _squeeze(block if overwrite else block.clone(), bits)
        out[first : first + step] = squeezed.view(part).view(len(block), -1)[:, :parts]
    return out.view(torch.uint8).view(*unsigned.shape[:-1], unsigned.shape[-1] * bits // 8)


def _squeeze(eights: Tensor, bits: int) -> Tensor:
    """int64 whose bytes are codes below 2^bits: in place, the codes side by side in the low 8 * bits bits."""
    for width, every_other in _LANES:
        low = eights & every_other
        eights ^= low  # the high lane of each pair, moved down to where the low one's codes end
        eights >>= width - bits * width // 8
        eights |= low
    return eights


def _spread(eights: Tensor, bits: int) -> Tensor:
    """`_squeeze` undone, in place."""
    for width, every_other in reversed(_LANES):
        taken = bits * width // 8  # bits of a lane that hold codes
        low = eights & (every_other & _repeated((1 << taken) - 1, 2 * width))
        eights ^= low
        eights <<= width - taken
        eights |= low
    return eights


def _repeated(value: int, width: int) -> int:
    """`value` in every lane of `width` bits of 64."""
    return sum(value << at for at in range(0, 64, width))


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [..., N, W] back to int8 codes [..., N, columns]."""
    _check(packed, torch.int32, bits)
    if packed.shape[-1] * WORD_BITS // bits < columns:
        raise ValueError(f"{packed.shape[-1]} words hold fewer than {columns} codes of {bits} bits")
    if bits not in (4, 8) and (short := -packed.shape[-1] % bits):
        packed = pad(packed, (0, short))
    unsigned = _unpack_bytes(_reinterpret(packed, torch.uint8), bits)
    return unsigned[..., :columns].sub(1 << (bits - 1)).view(torch.int8)


def _unpack_bytes(stream: Tensor, bits: int) -> Tensor:
    """uint8 [..., B] back to uint8 codes [..., 8 B / bits]; B a multiple of `bits` unless bits is 4 or 8."""
    if bits == 8:
        return stream
    if bits == 4:
        return torch.stack((stream & 0xF, stream >> 4), dim=-1).flatten(-2)
    parts = stream.reshape(-1, bits)
    out = torch.zeros(len(parts), 8, dtype=torch.uint8, device=stream.device)
    step = _BLOCK // 8 if stream.device.type == "cpu" else max(1, len(parts))
    for first in range(0, len(parts), step):
        block = out[first : first + step]
        block[:, :bits] = parts[first : first + step]
        _spread(block.view(torch.int64), bits)
    return out.view(*stream.shape[:-1], stream.shape[-1] * 8 // bits)


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
    eights = torch.unflatten(_unsigned(codes, 4), -1, (-1, 8))
    octets = eights[..., AWQ_ORDER[0::2]] | (eights[..., AWQ_ORDER[1::2]] << 4)
    return _reinterpret(octets.flatten(-2), torch.int32)


def unpack_awq(packed: Tensor) -> Tensor:
    """AutoAWQ GEMM words int32 [..., R, N / 8] back to int8 codes [..., R, N]."""
    _check(packed, torch.int32, 4)
    octets = torch.unflatten(_reinterpret(packed, torch.uint8), -1, (-1, 4))
    nibbles = torch.stack((octets & 0xF, octets >> 4), dim=-1).flatten(-2)
    return nibbles[..., AWQ_REVERSE_ORDER].flatten(-2).sub_(8).view(torch.int8)
