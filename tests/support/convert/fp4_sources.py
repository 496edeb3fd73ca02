"""Weights in the 4-bit float layouts of releases. The arithmetic is written out here on its own, from the formats' definitions."""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_MIDDLES = (E2M1[1:] + E2M1[:-1]) / 2


def to_codes(values: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 code of each value of at most 6, uint8 0..15."""
    return torch.bucketize(values.abs(), _MIDDLES).to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the even column in the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def values_of(packed: torch.Tensor) -> torch.Tensor:
    """float64 [..., K] of packed codes [..., K/2], code by code."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return E2M1.double()[(codes & 7).long()] * (1 - 2.0 * (codes >> 3).double())


def to_nvfp4(weight: torch.Tensor, divides: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(packed U8 [N, K/2], E4M3 scale [N, K/16], global F32, the BF16 weight that they stand for). divides: compressed-tensors' global."""
    rows, columns = weight.shape
    whole = weight.float().abs().max().clamp_min(1e-12) / (6 * 448)  # what a group's scale is multiplied by
    factor = (1 / whole).reshape(1) if divides else whole
    largest = weight.float().view(rows, columns // 16, 16).abs().amax(-1)
    scale = (largest / 6 / whole).clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
    together = scale.float() / factor if divides else scale.float() * factor
    spread = together.repeat_interleave(16, 1)
    packed = pack(to_codes((weight.float() / spread).clamp(-6, 6)))
    return packed, scale, factor, (values_of(packed).float() * spread).bfloat16()


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(packed U8 [N, K/2], E8M0 scale as U8 [N, K/32], the BF16 weight that they stand for)."""
    rows, columns = weight.shape
    largest = weight.float().view(rows, columns // 32, 32).abs().amax(-1).clamp_min(2.0**-100)
    exponent = torch.ceil(torch.log2(largest / 6))
    spread = torch.exp2(exponent).repeat_interleave(32, 1)
    packed = pack(to_codes((weight.float() / spread).clamp(-6, 6)))
    return packed, (exponent + 127).to(torch.uint8), (values_of(packed).float() * spread).bfloat16()


def nvfp4_packed(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' layout, which M3.1 has: (the stored tensors, the weight that they stand for)."""
    packed, scale, factor, dense = to_nvfp4(weight, divides=True)
    parts = {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_global_scale": factor,
        "input_global_scale": torch.full((1,), 448.0),
    }
    return {f"{module}.{leaf}": part for leaf, part in parts.items()}, dense


def nvfp4_modelopt(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """ModelOpt's layout, as nvidia's M3 has it."""
    packed, scale, factor, dense = to_nvfp4(weight, divides=False)
    parts = {"weight": packed, "weight_scale": scale, "weight_scale_2": factor, "input_scale": torch.ones(())}
    return {f"{module}.{leaf}": part for leaf, part in parts.items()}, dense


def mxfp4_packed(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    packed, scale, dense = to_mxfp4(weight)
    return {f"{module}.weight_packed": packed, f"{module}.weight_scale": scale}, dense


def mxfp4_modelopt(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    packed, scale, dense = to_mxfp4(weight)
    return {f"{module}.weight": packed, f"{module}.weight_scale": scale}, dense


def fp8_rows(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' FP8 with a BF16 scale per row."""
    scale = (weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 448).bfloat16()
    codes = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale}, (codes.float() * scale.float()).bfloat16()


def fp8_tensor(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """ModelOpt's and vLLM's static FP8: one F32 number."""
    scale = weight.float().abs().max().clamp_min(1e-12) / 448
    codes = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    parts = {f"{module}.weight": codes, f"{module}.weight_scale": scale, f"{module}.input_scale": torch.ones(())}
    return parts, (codes.float() * scale).bfloat16()


def mxfp8_modelopt(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """MXFP8 whose scale is called weight_scale."""
    from tests.support.convert.sources import to_mxfp8

    codes, scale, dense = to_mxfp8(weight)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale}, dense


def mxfp8(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """MXFP8 as MiniMax's releases name it."""
    parts, dense = mxfp8_modelopt(module, weight)
    return {name.replace("weight_scale", "weight_scale_inv"): part for name, part in parts.items()}, dense
