"""Weights in the integer layouts of releases. The arithmetic and the packing are written out here on their own, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns nibble 0..7 of a word holds


def bit_stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes [N, K] as one little-endian stream of bits a row, in int32 words."""
    each = np.unpackbits(codes.numpy().astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    row = np.packbits(each.reshape(len(codes), -1), axis=-1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(row).view(np.int32).copy())


def grid(weight: torch.Tensor, bits: int, group: int | None, symmetric: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    """(unsigned codes [N, K], scale [N, G] of dtype, unsigned zero points [N, G], the BF16 weight that they stand for)."""
    rows, columns = weight.shape
    parts = weight.float().view(rows, -1, group or columns)
    top = 2**bits - 1
    if symmetric:
        scale = (parts.abs().amax(-1) * 2 / top).clamp_min(1e-6).to(dtype)
        zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.float32)
    else:
        low, high = parts.amin(-1).clamp_max(0), parts.amax(-1).clamp_min(0)
        scale = ((high - low) / top).clamp_min(1e-6).to(dtype)
        zero = (-low / scale.float()).round().clamp(0, top)
    codes = ((parts / scale.float()[..., None]).round() + zero[..., None]).clamp(0, top)
    dense = ((codes - zero[..., None]) * scale.float()[..., None]).view(rows, columns).bfloat16()
    return codes.view(rows, columns).to(torch.uint8), scale, zero.to(torch.uint8), dense


def packed(
    module: str,
    weight: torch.Tensor,
    bits: int,
    group: int | None,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' pack-quantized: (the stored tensors, the weight that they stand for)."""
    codes, scale, zero, dense = grid(weight, bits, group, symmetric, dtype)
    parts = {
        "weight_packed": bit_stream(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = bit_stream(zero.T.contiguous(), bits).T.contiguous()
    return {f"{module}.{leaf}": part for leaf, part in parts.items()}, dense


def awq(module: str, weight: torch.Tensor, group: int | None) -> tuple[Tensors, torch.Tensor]:
    """AutoAWQ's gemm."""
    codes, scale, zero, dense = grid(weight, 4, group, False, torch.float16)
    parts = {"qweight": _awq_words(codes.T), "qzeros": _awq_words(zero.T), "scales": scale.T.contiguous()}
    return {f"{module}.{leaf}": part for leaf, part in parts.items()}, dense


def _awq_words(codes: torch.Tensor) -> torch.Tensor:
    eights = codes.numpy().astype(np.uint32).reshape(codes.shape[0], -1, 8)
    words = sum(eights[..., column] << np.uint32(4 * nibble) for nibble, column in enumerate(_AWQ_COLUMNS))
    return torch.from_numpy(np.asarray(words).astype(np.uint32).view(np.int32).copy())


def packed_section(*groups: tuple[int, int | None, bool]) -> dict[str, Any]:
    """compressed-tensors' section of groups (bits, group size, symmetric); which module is which is for targets that are not looked at."""
    found = {}
    for number, (bits, group, symmetric) in enumerate(groups):
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group}
        weights["strategy"] = "group" if group else "channel"
        found[f"group_{number}"] = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": found}


def awq_section(group: int | None) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group or -1, "zero_point": True, "version": "gemm"}
