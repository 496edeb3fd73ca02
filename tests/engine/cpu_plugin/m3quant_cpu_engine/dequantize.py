"""Stored numbers to float32 weights, for each format, as vLLM's parameters hold them after loading."""

from __future__ import annotations

import torch


def unpack(words: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """Unsigned codes of int32 `words` that hold 32 / bits codes each along `dim`, the first in the lowest bits."""
    words = words.movedim(dim, -1)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2).movedim(-1, dim)


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
