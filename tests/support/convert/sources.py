"""Quantized sources made from tiny BF16 checkpoints: FP8 in 128x128 blocks (M2's own) and MXFP8 (M3's own).

The arithmetic is written out here on its own, so that a conversion is compared with something else than itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.support.convert.common import config_of, rewrite, stored

E4M3_MAX = 448.0
Tensors = dict[str, torch.Tensor]
_LINEARS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "index_q_proj", "index_k_proj", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


def is_linear(name: str) -> bool:
    """Whether the official FP8 releases store this tensor in FP8: the language model's linears but router and head."""
    return name.endswith(tuple(f".{part}.weight" for part in _LINEARS)) and "vision_tower" not in name


def _spread(scale: torch.Tensor, rows: int, columns: int, block: tuple[int, int]) -> torch.Tensor:
    return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def to_fp8_block(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scale_inv F32 [ceil(N/128), ceil(K/128)], the BF16 weight that they stand for)."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % 128, 0, -rows % 128))
    amax = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128).abs().amax((1, 3))
    scale = amax.clamp_min(1e-8) / E4M3_MAX
    spread = _spread(scale, rows, columns, (128, 128))
    codes = (weight.float() / spread).to(torch.float8_e4m3fn)
    return codes, scale, (codes.float() * spread).bfloat16()


def to_mxfp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, E8M0 scale as U8 [N, K/32], the BF16 weight that they stand for)."""
    rows, columns = weight.shape
    amax = weight.float().view(rows, columns // 32, 32).abs().amax(-1).clamp_min(2.0**-100)
    exponent = torch.ceil(torch.log2(amax / E4M3_MAX))
    spread = _spread(torch.exp2(exponent), rows, columns, (1, 32))
    codes = (weight.float() / spread).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, (exponent + 127).to(torch.uint8), (codes.float() * spread).bfloat16()


def quantized_source(
    source: Path, folder: Path, kind: str, *, scales_apart: bool = False, index: bool = True
) -> tuple[Path, Path]:
    """Write `source` as FP8 (`kind` "fp8" or "mxfp8") and, next to it, as the BF16 checkpoint that this FP8 one means.

    scales_apart: all scales lie in a shard of their own. Returns (the FP8 folder, the dequantized BF16 folder).
    """
    parts: dict[str, Tensors] = {"a": {}, "b": {}, "scales": {}}
    dense: Tensors = {}
    for number, (name, tensor) in enumerate(stored(source).items()):
        home = parts["ab"[number % 2]]
        if not is_linear(name):
            home[name] = dense[name] = tensor
            continue
        home[name], scale, dense[name] = (to_fp8_block if kind == "fp8" else to_mxfp8)(tensor)
        (parts["scales"] if scales_apart else home)[f"{name}_scale_inv"] = scale
    config = config_of(source)
    block = [128, 128] if kind == "fp8" else [1, 32]
    quantization = {"quant_method": kind, "activation_scheme": "dynamic", "weight_block_size": block}
    quantized = folder / kind
    write_parts(quantized, {**config, "quantization_config": quantization}, parts, index)
    return quantized, write_parts(folder / f"{kind}-dense", config, {"all": dense}, index)


def write_parts(folder: Path, config: dict[str, Any], parts: dict[str, Tensors], index: bool = True) -> Path:
    """Write shards called after `parts` (empty ones left out), config.json and, by default, the index."""
    folder.mkdir(parents=True)
    weight_map = {}
    for label, tensors in parts.items():
        if tensors:
            save_file(tensors, folder / f"model-{label}.safetensors", metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, f"model-{label}.safetensors"))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return folder


def both_forms(
    source: Path, folder: Path, parts: Callable[[str, torch.Tensor], Any], section: dict[str, Any]
) -> tuple[Path, Path]:
    """The checkpoint with its linears stored by `parts` under that quantization_config, and the BF16 one that it stands for.

    parts: (module, weight) -> (stored tensors by name, the weight that they stand for).
    """
    tensors, dense = {}, {}
    for name, tensor in stored(source).items():
        if is_linear(name):
            made, dense[name] = parts(name.removesuffix(".weight"), tensor)
            tensors |= made
        else:
            tensors[name] = dense[name] = tensor
    config = config_of(source)
    quantized = rewrite(folder / "stored", tensors, {**config, "quantization_config": section})
    return quantized, rewrite(folder / "dense", dense, config)
