"""Stored numbers to float32 weights, for each format, as vLLM's parameters hold them after loading."""

from __future__ import annotations

import math

import torch


def unpack(words: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """Unsigned codes of int32 `words` along `dim`, a dense stream of 2 to 8 bits each, the first in the lowest bits.

    Of every 32 codes, which fill `bits` words, code i begins at bit i * bits and may end in the next word.
    """
    words = words.movedim(dim, -1)
    per_run = bits // math.gcd(bits, 32)  # words that hold whole codes
    first = torch.arange(0, 32 * per_run, bits)
    runs = words.unflatten(-1, (-1, per_run)).to(torch.int64) & 0xFFFFFFFF
    beyond = torch.cat((runs[..., 1:], torch.zeros_like(runs[..., :1])), dim=-1)  # the last code of a run ends with it
    pairs = runs | (beyond << 32 & 0x7FFFFFFFFFFFFFFF)  # 63 bits are enough: a code ends at bit 31 + 7 at most
    codes = (pairs[..., first // 32] >> first % 32) & (2**bits - 1)
    return codes.flatten(-2).to(torch.int32).movedim(-1, dim)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 of AutoAWQ's int32 words [.., N/8] as [.., N]: nibbles hold columns 0 2 4 6 1 3 5 7."""
    nibbles = unpack(words, -1, 4).unflatten(-1, (-1, 8))
    return nibbles[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(-2)


def integer(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | int) -> torch.Tensor:
    """(codes - zero) * scale with codes [.., N, K], scale [.., N, G], zero [.., N, G] or one number; groups along K."""
    groups = scale.shape[-1]
    grouped = codes.float().unflatten(-1, (groups, -1))
    shift = zero.float().unsqueeze(-1) if isinstance(zero, torch.Tensor) else float(zero)
    return ((grouped - shift) * scale.float().unsqueeze(-1)).flatten(-2)


def fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight [.., N, K] E4M3 times scale: [.., N, 1] per row, or [.., ceil(N/128), ceil(K/128)] per block."""
    rows, columns = weight.shape[-2:]
    if scale.shape[-2:] != (rows, 1):
        scale = scale.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., :rows, :columns]
    return weight.float() * scale.float()
