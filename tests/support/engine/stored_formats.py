"""A checkpoint's weights in every format that an engine must read, and the numbers that each of them stands for.

Integers are packed by compressed-tensors' own function, so that what these tests show about an engine does not rest on
m3quant's packing.

    stored = store(*tiny_m3(), "int4-g128")
    stored.write(folder)              # what the engine loads
    stored.write_dequantized(folder)  # the same numbers in float32, for transformers
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

FP8_MAX = 448.0  # largest finite E4M3 number
BLOCK = 128

LAYOUTS = (
    "bf16",
    "int4-g128",  # routed experts only
    "int4-g32-all",  # experts, attention, indexer, shared and dense MLPs
    "int4-g32-asym-all",
    "int8-channel-all",
    "fp8-channel-all",  # compressed-tensors, one scale per row, dynamic activations per token
    "fp8-block-all",  # compressed-tensors, 128x128 blocks
    "mixed",  # int4-g128 experts, fp8-channel elsewhere
    "fp8",  # DeepSeek style: weight_scale_inv, quant_method "fp8"
    "awq",  # AutoAWQ GEMM
)

EXPERTS = "experts"
OTHERS = "others"


def quantizable(name: str) -> str | None:
    """EXPERTS for a routed expert's weight, OTHERS for another language-model linear, None for what stays as it is."""
    if not name.endswith(".weight") or "layers." not in name or name.startswith("vision_tower"):
        return None
    if ".block_sparse_moe.experts." in name:
        return EXPERTS
    return OTHERS if name.endswith("_proj.weight") else None


@dataclass
class Stored:
    """A checkpoint as an engine reads it (`config`, `tensors`) and what its numbers are (`dequantized`, float32)."""

    config: dict[str, Any]
    plain_config: dict[str, Any]
    tensors: Tensors
    dequantized: Tensors = field(repr=False)

    def write(self, folder: Path) -> Path:
        return _write(folder, self.config, self.tensors)

    def write_dequantized(self, folder: Path) -> Path:
        return _write(folder, self.plain_config, {name: value.float() for name, value in self.dequantized.items()})


def _write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def store(config: dict[str, Any], weights: Tensors, layout: str) -> Stored:
    """The checkpoint (`config`, `weights`) in `layout`, one of LAYOUTS. Raises KeyError for another."""
    plans: dict[str, tuple[str | None, str | None]] = {
        "bf16": (None, None),
        "int4-g128": ("int4-g128", None),
        "int4-g32-all": ("int4-g32", "int4-g32"),
        "int4-g32-asym-all": ("int4-g32-asym", "int4-g32-asym"),
        "int8-channel-all": ("int8-channel", "int8-channel"),
        "fp8-channel-all": ("fp8-channel", "fp8-channel"),
        "fp8-block-all": ("fp8-block", "fp8-block"),
        "mixed": ("int4-g128", "fp8-channel"),
        "fp8": ("fp8-inv", "fp8-inv"),
        "awq": ("awq", "awq"),
    }
    experts, others = plans[layout]
    schemes = {EXPERTS: experts, OTHERS: others}
    tensors: Tensors = {}
    dequantized: Tensors = {}
    for name, value in weights.items():
        kind = quantizable(name)
        scheme = schemes[kind] if kind else None
        if scheme is None:
            tensors[name] = dequantized[name] = value
            continue
        parts, dequantized[name] = COMPRESS[scheme](value.float())
        tensors |= {f"{name.removesuffix('.weight')}.{suffix}": part for suffix, part in parts.items()}
    quantized = copy.deepcopy(config)
    section = _quantization_config(experts, others)
    if section:
        quantized["quantization_config"] = section
    return Stored(quantized, config, tensors, dequantized)


def _integer(bits: int, group: int | None, symmetric: bool) -> Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]:
    low_code, high_code = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def compress(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        rows, columns = weight.shape
        grouped = weight.unflatten(1, (-1, group or columns))
        if symmetric:
            scale = (grouped.abs().amax(-1) / (high_code + 0.5)).bfloat16()
            zero = torch.zeros_like(scale)
        else:
            low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
            scale = ((high - low) / (high_code - low_code)).bfloat16()
            zero = (low_code - low / scale.float()).round().clamp(low_code, high_code)
        steps, shift = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
        codes = (grouped / steps + shift).round().clamp(low_code, high_code)
        value = ((codes - shift) * steps).flatten(1)
        parts = {
            "weight_packed": pack_to_int32(codes.flatten(1).to(torch.int8), bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            parts["weight_zero_point"] = pack_to_int32(zero.to(torch.int8), bits, packed_dim=0)
        return parts, value

    return compress


def _fp8_channel(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / FP8_MAX
    codes = (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def _fp8_block(scale_name: str) -> Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]:
    def compress(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [N/128, 128, K/128, 128]
        scale = blocks.abs().amax((1, 3)) / FP8_MAX
        codes = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        value = (codes.float() * scale[:, None, :, None]).flatten(2).flatten(0, 1)
        return {"weight": codes.flatten(2).flatten(0, 1), scale_name: scale}, value

    return compress


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column held by nibble i of a word: AutoAWQ's GEMM layout


def _awq_words(codes: torch.Tensor) -> torch.Tensor:
    """[.., N] codes 0..15 -> [.., N/8] int32 in AutoAWQ's nibble order."""
    columns = codes.to(torch.int64).unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)]
    words = (columns << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _awq(weight: torch.Tensor, group: int = 128) -> tuple[Tensors, torch.Tensor]:
    grouped = weight.unflatten(1, (-1, group))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    steps, shift = scale.float().unsqueeze(-1), zero.unsqueeze(-1)
    codes = (grouped / steps + shift).round().clamp(0, 15)
    parts = {
        "qweight": _awq_words(codes.flatten(1).T),
        "qzeros": _awq_words(zero.T),
        "scales": scale.T.contiguous(),
    }
    return parts, ((codes - shift) * steps).flatten(1)


COMPRESS: dict[str, Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]] = {
    "int4-g128": _integer(4, 128, True),
    "int4-g32": _integer(4, 32, True),
    "int4-g32-asym": _integer(4, 32, False),
    "int8-channel": _integer(8, None, True),
    "fp8-channel": _fp8_channel,
    "fp8-block": _fp8_block("weight_scale"),
    "fp8-inv": _fp8_block("weight_scale_inv"),
    "awq": _awq,
}

IGNORED = [
    "re:.*lm_head",
    "re:.*embed_tokens",
    "re:.*vision_tower.*",
    "re:.*multi_modal_projector.*",
    "re:.*patch_merge_mlp.*",
    r"re:.*(block_sparse_moe|mlp)\.gate$",
]
# Both models: M2 probes `mlp.experts.0.w1`, M3 `block_sparse_moe.experts.0.gate_proj`.
ROUTED = r"re:.*\.experts\.\d+\..*"
ATTENTION_AND_MLP = [
    r"re:.*self_attn\..*",
    r"re:.*shared_experts\..*",
    r"re:.*layers\.\d+\.mlp\.(gate|up|down|gate_up)_proj$",
]


def _group(scheme: str, targets: list[str]) -> dict[str, Any]:
    if scheme.startswith("int"):
        grouping = scheme.split("-")[1]
        weights: dict[str, Any] = {
            "num_bits": int(scheme[3]),
            "type": "int",
            "symmetric": not scheme.endswith("asym"),
            "strategy": "channel" if grouping == "channel" else "group",
            "group_size": None if grouping == "channel" else int(grouping.removeprefix("g")),
            "dynamic": False,
        }
        return {"targets": targets, "weights": weights, "input_activations": None, "format": "pack-quantized"}
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    inputs: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
    if scheme == "fp8-block":
        weights |= {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
        inputs |= {"strategy": "group", "group_size": BLOCK}
    else:
        weights |= {"strategy": "channel"}
        inputs |= {"strategy": "token"}
    return {"targets": targets, "weights": weights, "input_activations": inputs, "format": "float-quantized"}


def _quantization_config(experts: str | None, others: str | None) -> dict[str, Any] | None:
    if experts is None:
        return None
    if experts == "fp8-inv":
        return {
            "quant_method": "fp8",
            "fmt": "float8_e4m3fn",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        }
    if experts == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head", "vision_tower", "multi_modal_projector", "patch_merge_mlp"],
        }
    if experts == others:
        groups, ignore = [_group(experts, ["Linear"])], list(IGNORED)
    elif others is None:
        groups, ignore = [_group(experts, ["Linear"])], [*IGNORED, *ATTENTION_AND_MLP]
    else:
        groups, ignore = [_group(experts, [ROUTED]), _group(others, ATTENTION_AND_MLP)], list(IGNORED)
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


# ---- the silent traps ----------------------------------------------------------------------------------------------


def without_index_projections(stored: Stored) -> Stored:
    """`stored` with index_q_proj and index_k_proj in BF16 with quantized q, k and v: vLLM drops them without an error."""
    tensors = {name: value for name, value in stored.tensors.items() if not _is_index(name)}
    tensors |= {name: value.bfloat16() for name, value in stored.dequantized.items() if _is_index(name)}
    config = copy.deepcopy(stored.config)
    config["quantization_config"]["ignore"].append(r"re:.*index_[qk]_proj$")
    return Stored(config, stored.plain_config, tensors, stored.dequantized)


def _is_index(name: str) -> bool:
    return ".index_q_proj." in name or ".index_k_proj." in name


def with_renamed_experts(stored: Stored) -> Stored:
    """`stored` with the routed experts called gate_proj, up_proj and down_proj, as some quantizers save them."""
    new_names = {".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}

    def renamed(name: str) -> str:
        if ".block_sparse_moe.experts." in name:
            for old, new in new_names.items():
                name = name.replace(old, new)
        return name

    return Stored(
        stored.config,
        stored.plain_config,
        {renamed(name): value for name, value in stored.tensors.items()},
        stored.dequantized,
    )
