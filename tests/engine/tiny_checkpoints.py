"""Small random M2 and M3 checkpoints in their on-disk form, and the same weights in every format that an engine must read.

The integer formats are packed by compressed-tensors' own functions, so that what these tests show about an engine does
not rest on m3quant's packing. Names and shapes are those of the released checkpoints; only the sizes are small:
hidden and expert size 256 (vLLM's Marlin is wrong at 128), two blocks of 128 in every fused projection.

    config, weights = tiny_m3()
    stored = store(config, weights, "int4-g128")
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
    "fp8-channel-all",  # compressed-tensors, one scale per row, dynamic activations per token
    "fp8-block-all",  # compressed-tensors, 128x128 blocks
    "mixed",  # int4-g128 experts, fp8-channel elsewhere
    "fp8",  # DeepSeek style: weight_scale_inv, quant_method "fp8"
    "awq",  # AutoAWQ GEMM
)


def tiny_m2(seed: int = 0, layers: int = 3) -> tuple[dict[str, Any], Tensors]:
    """(config.json, tensors) of a MiniMax-M2 with 24 experts, 8 of them active."""
    config: dict[str, Any] = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "attn_type_list": [1] * layers,
        "dtype": "bfloat16",
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 24,
        "num_experts_per_tok": 8,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "shared_intermediate_size": 0,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "rotary_dim": 32,
        "max_position_embeddings": 4096,
        "vocab_size": 512,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    make = _Maker(seed)
    hidden, heads, kv, width = 256, 4 * 64, 2 * 64, 256
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        make.attention(prefix + "self_attn.", hidden, heads, kv)
        make.norm(prefix + "self_attn.q_norm", heads, 1.0)
        make.norm(prefix + "self_attn.k_norm", kv, 1.0)
        make.moe(prefix + "block_sparse_moe.", hidden, width, config["num_local_experts"])
        make.norm(prefix + "input_layernorm", hidden, 1.0)
        make.norm(prefix + "post_attention_layernorm", hidden, 1.0)
    make.ends("model.", "lm_head", hidden, config["vocab_size"], 1.0)
    return config, make.tensors


def tiny_m3(seed: int = 0, layers: int = 3, topk_blocks: int = 4) -> tuple[dict[str, Any], Tensors]:
    """(config.json, tensors) of a MiniMax-M3: a dense first layer, then block-sparse attention over `topk_blocks` x 128 tokens."""
    sparse = [0] + [1] * (layers - 1)
    text: dict[str, Any] = {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": 256,
        "num_hidden_layers": layers,
        "intermediate_size": 256,
        "shared_intermediate_size": 256,
        "n_shared_experts": 1,
        "dense_intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "use_gemma_norm": True,
        "attention_output_gate": False,
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "rope_theta": 5000000,
        "rotary_dim": 64,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
        "hidden_act": "swigluoai",
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "routed_scaling_factor": 2.0,
        "moe_layer_freq": sparse,
        "num_mtp_modules": 1,
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": 128,
            "sparse_num_index_heads": 2,
            "sparse_topk_blocks": topk_blocks,
            "sparse_block_size": 128,
            "sparse_disable_index_value": sparse,
            "sparse_score_type": "max",
            "sparse_init_block": 0,
            "sparse_local_block": 1,
            "sparse_attention_freq": sparse,
        },
    }
    compression = {"image_token_compression_method": "patch_merge", "spatial_merge_size": 2, "temporal_patch_size": 2}
    config: dict[str, Any] = {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "torch_dtype": "bfloat16",
        "image_token_index": 510,
        "video_token_index": 511,
        "image_seq_length": 576,
        "process_image_mode": "dynamic_res",
        "projector_hidden_size": 256,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "img_token_compression_config": compression,
        "text_config": text,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "intermediate_size": 128,
            "patch_size": 14,
            "image_size": 56,
            "projection_dim": 256,
            "position_embedding_type": "rope",
            "rope_mode": "3d",
            "rope_theta": 10000.0,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "num_channels": 3,
            "img_token_compression_config": compression,
            "vision_segment_max_frames": 4,
        },
    }
    make = _Maker(seed)
    hidden, heads, kv, width = 256, 4 * 128, 2 * 128, 256
    for layer in range(layers):
        prefix = f"language_model.model.layers.{layer}."
        make.attention(prefix + "self_attn.", hidden, heads, kv)
        make.norm(prefix + "self_attn.q_norm", 128, 0.0)
        make.norm(prefix + "self_attn.k_norm", 128, 0.0)
        if sparse[layer]:
            make.linear(prefix + "self_attn.index_q_proj", 2 * 128, hidden)
            make.linear(prefix + "self_attn.index_k_proj", 128, hidden)
            make.norm(prefix + "self_attn.index_q_norm", 128, 0.0)
            make.norm(prefix + "self_attn.index_k_norm", 128, 0.0)
            make.moe(prefix + "block_sparse_moe.", hidden, width, text["num_local_experts"])
            make.glu(prefix + "block_sparse_moe.shared_experts.", hidden, width)
        else:
            make.glu(prefix + "mlp.", hidden, text["dense_intermediate_size"])
        make.norm(prefix + "input_layernorm", hidden, 0.0)
        make.norm(prefix + "post_attention_layernorm", hidden, 0.0)
    make.ends("language_model.model.", "language_model.lm_head", hidden, text["vocab_size"], 0.0)
    make.vision(config["vision_config"], hidden)
    return config, make.tensors


class _Maker:
    """Fills a tensor dictionary; every draw is from one generator, so a seed is a checkpoint."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: Tensors = {}

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * std + mean

    def put(self, name: str, value: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        self.tensors[name] = value.to(dtype)

    def linear(self, name: str, rows: int, columns: int) -> None:
        self.put(f"{name}.weight", self.normal(rows, columns, std=columns**-0.5))

    def norm(self, name: str, size: int, mean: float) -> None:
        self.put(f"{name}.weight", self.normal(size, std=0.2, mean=mean))

    def attention(self, prefix: str, hidden: int, heads: int, kv: int) -> None:
        for name, rows in (("q", heads), ("k", kv), ("v", kv)):
            self.linear(f"{prefix}{name}_proj", rows, hidden)
        self.linear(f"{prefix}o_proj", hidden, heads)

    def glu(self, prefix: str, hidden: int, width: int) -> None:
        self.linear(f"{prefix}gate_proj", width, hidden)
        self.linear(f"{prefix}up_proj", width, hidden)
        self.linear(f"{prefix}down_proj", hidden, width)

    def moe(self, prefix: str, hidden: int, width: int, experts: int) -> None:
        self.put(f"{prefix}gate.weight", self.normal(experts, hidden, std=hidden**-0.5), torch.float32)
        self.put(f"{prefix}e_score_correction_bias", self.normal(experts, std=0.1, mean=1.0), torch.float32)
        for expert in range(experts):
            self.linear(f"{prefix}experts.{expert}.w1", width, hidden)
            self.linear(f"{prefix}experts.{expert}.w2", hidden, width)
            self.linear(f"{prefix}experts.{expert}.w3", width, hidden)

    def ends(self, prefix: str, head: str, hidden: int, vocab: int, norm_mean: float) -> None:
        self.put(f"{prefix}embed_tokens.weight", self.normal(vocab, hidden))
        self.norm(f"{prefix}norm", hidden, norm_mean)
        self.put(f"{head}.weight", self.normal(vocab, hidden, std=2 * hidden**-0.5))

    def vision(self, config: dict[str, Any], hidden: int) -> None:
        size, width = config["hidden_size"], config["intermediate_size"]
        tower = "vision_tower.vision_model."
        patch = config["patch_size"]
        self.put(
            f"{tower}embeddings.patch_embedding.weight", self.normal(size, 3, 2, patch, patch) * 0.02, torch.float32
        )

        def dense(name: str, rows: int, columns: int) -> None:
            self.linear(name, rows, columns)
            self.put(f"{name}.bias", self.normal(rows, std=0.02))

        def layer_norm(name: str) -> None:
            self.norm(name, size, 1.0)
            self.put(f"{name}.bias", self.normal(size, std=0.02))

        layer_norm(f"{tower}pre_layrnorm")
        for layer in range(config["num_hidden_layers"]):
            prefix = f"{tower}encoder.layers.{layer}."
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                dense(f"{prefix}self_attn.{name}", size, size)
            layer_norm(f"{prefix}layer_norm1")
            layer_norm(f"{prefix}layer_norm2")
            dense(f"{prefix}mlp.fc1", width, size)
            dense(f"{prefix}mlp.fc2", size, width)
        dense("multi_modal_projector.linear_1", hidden, size)
        dense("multi_modal_projector.linear_2", hidden, hidden)
        dense("patch_merge_mlp.linear_1", hidden, 4 * hidden)
        dense("patch_merge_mlp.linear_2", hidden, hidden)


# ---- formats -------------------------------------------------------------------------------------------------------

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


def _int4(group: int, symmetric: bool) -> Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]:
    def compress(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        rows, columns = weight.shape
        grouped = weight.unflatten(1, (-1, group))
        if symmetric:
            scale = (grouped.abs().amax(-1) / 7.5).bfloat16()
            zero = torch.zeros_like(scale)
        else:
            low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
            scale = ((high - low) / 15).bfloat16()
            zero = (-8 - low / scale.float()).round().clamp(-8, 7)
        steps, shift = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
        codes = (grouped / steps + shift).round().clamp(-8, 7)
        value = ((codes - shift) * steps).flatten(1)
        parts = {
            "weight_packed": pack_to_int32(codes.flatten(1).to(torch.int8), 4),
            "weight_scale": scale,
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            parts["weight_zero_point"] = pack_to_int32(zero.to(torch.int8), 4, packed_dim=0)
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
    "int4-g128": _int4(128, True),
    "int4-g32": _int4(32, True),
    "int4-g32-asym": _int4(32, False),
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
    if scheme.startswith("int4"):
        weights: dict[str, Any] = {
            "num_bits": 4,
            "type": "int",
            "symmetric": not scheme.endswith("asym"),
            "strategy": "group",
            "group_size": int(scheme.split("-")[1].removeprefix("g")),
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
    """`stored` with index_q_proj and index_k_proj in BF16 beside quantized q, k and v: vLLM drops them without a word."""
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
