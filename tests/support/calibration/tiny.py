"""Random tiny checkpoints in the official on-disk layouts, for tests of every package.

Names, dtypes (float32 router, correction bias and patch embedding; BF16 elsewhere) and the original form of
config.json are those of the released models. Weights are random but scaled so that activations stay near 1 through the
layers; norms and correction biases are never trivial. Linear dimensions of the language model are multiples of 128.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


class FolderSource:
    """The least that a streamed source must be: a folder's config and tensors, all in memory."""

    def __init__(self, folder: str | Path) -> None:
        self.config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        self.tensors: Tensors = {}
        for shard in sorted(Path(folder).glob("*.safetensors")):
            self.tensors.update(load_file(str(shard)))

    def read_many(self, names: Sequence[str]) -> Tensors:
        return {name: self.tensors[name] for name in names}


class _Maker:
    """Draws tensors from one seeded generator; `dtype` is what the official files store in BF16."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.tensors: Tensors = {}

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * std

    def add(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        self.tensors[name] = tensor.to(dtype or self.dtype).contiguous()

    def linear(self, name: str, out_size: int, in_size: int, gain: float = 1.0, bias: bool = False) -> None:
        self.add(f"{name}.weight", self.normal(out_size, in_size, std=gain / math.sqrt(in_size)))
        if bias:
            self.add(f"{name}.bias", self.normal(out_size, std=0.05))

    def norm(self, name: str, size: int, one_plus: bool) -> None:
        scale = torch.exp(self.normal(size, std=0.3))
        self.add(f"{name}.weight", scale - 1 if one_plus else scale)

    def attention(self, prefix: str, config: dict[str, Any], one_plus: bool, per_head: bool) -> None:
        hidden, dim = config["hidden_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.linear(f"{prefix}q_proj", heads * dim, hidden)
        self.linear(f"{prefix}k_proj", kv_heads * dim, hidden)
        self.linear(f"{prefix}v_proj", kv_heads * dim, hidden)
        self.linear(f"{prefix}o_proj", hidden, heads * dim, gain=0.7)
        self.norm(f"{prefix}q_norm", dim if per_head else heads * dim, one_plus)
        self.norm(f"{prefix}k_norm", dim if per_head else kv_heads * dim, one_plus)

    def moe(self, prefix: str, config: dict[str, Any]) -> None:
        hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
        self.add(f"{prefix}gate.weight", self.normal(experts, hidden, std=1 / math.sqrt(hidden)), torch.float32)
        self.add(f"{prefix}e_score_correction_bias", self.normal(experts, std=0.05), torch.float32)
        for expert in range(experts):
            self.linear(f"{prefix}experts.{expert}.w1", inner, hidden)
            self.linear(f"{prefix}experts.{expert}.w2", hidden, inner, gain=0.7)
            self.linear(f"{prefix}experts.{expert}.w3", inner, hidden)

    def mlp(self, prefix: str, hidden: int, inner: int) -> None:
        self.linear(f"{prefix}gate_proj", inner, hidden)
        self.linear(f"{prefix}up_proj", inner, hidden)
        self.linear(f"{prefix}down_proj", hidden, inner, gain=0.7)

    def ends(self, body: str, head: str, config: dict[str, Any], one_plus: bool) -> None:
        vocab, hidden = config["vocab_size"], config["hidden_size"]
        self.add(f"{body}embed_tokens.weight", self.normal(vocab, hidden))
        self.norm(f"{body}norm", hidden, one_plus)
        if not config["tie_word_embeddings"]:
            self.linear(head, vocab, hidden, gain=2.0)


def load_reference(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model of a folder, eager attention, ready to be called with input_ids."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    auto_class: Any = AutoModelForImageTextToText
    if config.model_type == "minimax_m2":
        auto_class = AutoModelForCausalLM
        # transformers 5.17 rotates whole heads of an original config; later versions compute this very value.
        original = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        config.rope_parameters["partial_rotary_factor"] = original["rotary_dim"] / original["head_dim"]
    return auto_class.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="eager").eval()


def m2_config(**overrides: Any) -> dict[str, Any]:
    """config.json of a tiny M2 in the original form. Overrides replace top-level keys (None removes one)."""
    config: dict[str, Any] = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "dtype": "bfloat16",
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "shared_intermediate_size": 0,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "rotary_dim": 32,
        "max_position_embeddings": 8192,
        "vocab_size": 512,
        "tie_word_embeddings": False,
        "use_cache": True,
        "transformers_version": "4.46.1",
        "use_mtp": True,
        "num_mtp_modules": 3,
        "mtp_transformer_layers": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config["attn_type_list"] = [1] * overrides.get("num_hidden_layers", config["num_hidden_layers"])
    return _override(config, overrides)


def m3_config(**overrides: Any) -> dict[str, Any]:
    """config.json of a tiny M3 in the original form: one dense layer, then sparse attention with MoE.

    Overrides replace keys of text_config (None removes one); a dict merges into the key's own dict. Top-k is 2 blocks
    of 128, so that windows above 256 tokens make the indexer choose.
    """
    text: dict[str, Any] = {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "shared_intermediate_size": 128,
        "n_shared_experts": 1,
        "dense_intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 512,
        "max_position_embeddings": 8192,
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
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "routed_scaling_factor": 2.0,
        "num_mtp_modules": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    layers = overrides.get("num_hidden_layers", text["num_hidden_layers"])
    sparse = [0] + [1] * (layers - 1)
    text["moe_layer_freq"] = list(sparse)
    text["sparse_attention_config"] = {
        "use_sparse_attention": True,
        "sparse_index_dim": 128,
        "sparse_num_index_heads": 2,
        "sparse_topk_blocks": 2,
        "sparse_block_size": 128,
        "sparse_disable_index_value": list(sparse),
        "sparse_score_type": "max",
        "sparse_init_block": 0,
        "sparse_local_block": 1,
        "sparse_attention_freq": list(sparse),
    }
    text = _override(text, overrides)
    compression = {"image_token_compression_method": "patch_merge", "spatial_merge_size": 2, "temporal_patch_size": 2}
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.4",
        "image_token_index": text["vocab_size"] - 2,
        "video_token_index": text["vocab_size"] - 1,
        "image_seq_length": 576,
        "process_image_mode": "dynamic_res",
        "projector_hidden_size": text["hidden_size"],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "num_reward_heads": 0,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "img_token_compression_config": compression,
        "text_config": text,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "intermediate_size": 128,
            "patch_size": 14,
            "image_size": 56,
            "num_channels": 3,
            "projection_dim": text["hidden_size"],
            "position_embedding_type": "rope",
            "rope_mode": "3d",
            "rope_theta": 10000.0,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "vocab_size": 32000,
            "img_token_compression_config": compression,
            "vision_segment_max_frames": 4,
        },
    }


def m2_tensors(config: dict[str, Any], seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """All tensors of a tiny M2, on-disk names."""
    make = _Maker(seed, dtype)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        make.norm(f"{prefix}input_layernorm", config["hidden_size"], False)
        make.attention(f"{prefix}self_attn.", config, one_plus=False, per_head=False)
        make.norm(f"{prefix}post_attention_layernorm", config["hidden_size"], False)
        make.moe(f"{prefix}block_sparse_moe.", config)
    make.ends("model.", "lm_head", config, one_plus=False)
    return make.tensors


def m3_tensors(config: dict[str, Any], seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """All tensors of a tiny M3 with its vision tower and projector, on-disk names."""
    make = _Maker(seed, dtype)
    text = config["text_config"]
    hidden, sparse = text["hidden_size"], text["sparse_attention_config"]
    for layer in range(text["num_hidden_layers"]):
        prefix = f"language_model.model.layers.{layer}."
        make.norm(f"{prefix}input_layernorm", hidden, True)
        make.attention(f"{prefix}self_attn.", text, one_plus=True, per_head=True)
        if sparse["sparse_attention_freq"][layer]:
            dim = sparse["sparse_index_dim"]
            make.linear(f"{prefix}self_attn.index_q_proj", sparse["sparse_num_index_heads"] * dim, hidden)
            make.linear(f"{prefix}self_attn.index_k_proj", dim, hidden)
            make.norm(f"{prefix}self_attn.index_q_norm", dim, True)
            make.norm(f"{prefix}self_attn.index_k_norm", dim, True)
        make.norm(f"{prefix}post_attention_layernorm", hidden, True)
        if text["moe_layer_freq"][layer]:
            make.moe(f"{prefix}block_sparse_moe.", text)
            make.mlp(f"{prefix}block_sparse_moe.shared_experts.", hidden, text["shared_intermediate_size"])
        else:
            make.mlp(f"{prefix}mlp.", hidden, text["dense_intermediate_size"])
    make.ends("language_model.model.", "language_model.lm_head", text, one_plus=True)
    _vision(make, config)
    return make.tensors


def make_tiny_m2(
    folder: str | Path, seed: int = 0, *, dtype: torch.dtype = torch.bfloat16, shards: int = 3, **overrides: Any
) -> Path:
    """Write a tiny M2 checkpoint into `folder` (made if absent) and return it as a Path."""
    config = m2_config(**overrides)
    return write_checkpoint(folder, config, m2_tensors(config, seed, dtype), shards)


def make_tiny_m3(
    folder: str | Path, seed: int = 0, *, dtype: torch.dtype = torch.bfloat16, shards: int = 3, **overrides: Any
) -> Path:
    """Write a tiny M3 checkpoint into `folder` (made if absent) and return it as a Path."""
    config = m3_config(**overrides)
    return write_checkpoint(folder, config, m3_tensors(config, seed, dtype), shards)


def write_checkpoint(folder: str | Path, config: dict[str, Any], tensors: Tensors, shards: int = 3) -> Path:
    """Write config.json, the tensors in `shards` files of about equal size, and the index."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    total = sum(tensor.nbytes for tensor in tensors.values())
    parts: list[Tensors] = [{} for _ in range(shards)]
    written = 0
    for name, tensor in tensors.items():
        parts[min(shards - 1, written * shards // total)][name] = tensor
        written += tensor.nbytes
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file_name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(part, str(root / file_name), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return root


def _override(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    for key, value in overrides.items():
        if value is None:
            config.pop(key, None)
        elif isinstance(value, dict) and isinstance(config.get(key), dict):
            config[key] = {**config[key], **value}
        else:
            config[key] = value
    return config


def _vision(make: _Maker, config: dict[str, Any]) -> None:
    vision, text_hidden = config["vision_config"], config["text_config"]["hidden_size"]
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    tower = "vision_tower.vision_model."
    patch = make.normal(hidden, vision["num_channels"], 2, vision["patch_size"], vision["patch_size"], std=0.02)
    make.add(f"{tower}embeddings.patch_embedding.weight", patch, torch.float32)
    _layer_norm(make, f"{tower}pre_layrnorm", hidden)
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"{tower}encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            make.linear(f"{prefix}self_attn.{name}", hidden, hidden, bias=True)
        _layer_norm(make, f"{prefix}layer_norm1", hidden)
        make.linear(f"{prefix}mlp.fc1", inner, hidden, bias=True)
        make.linear(f"{prefix}mlp.fc2", hidden, inner, bias=True)
        _layer_norm(make, f"{prefix}layer_norm2", hidden)
    projected = config["projector_hidden_size"]
    merged = text_hidden * config["img_token_compression_config"]["spatial_merge_size"] ** 2
    make.linear("multi_modal_projector.linear_1", projected, hidden, bias=True)
    make.linear("multi_modal_projector.linear_2", text_hidden, projected, bias=True)
    make.linear("patch_merge_mlp.linear_1", projected, merged, bias=True)
    make.linear("patch_merge_mlp.linear_2", text_hidden, projected, bias=True)


def _layer_norm(make: _Maker, name: str, size: int) -> None:
    make.add(f"{name}.weight", torch.exp(make.normal(size, std=0.3)))
    make.add(f"{name}.bias", make.normal(size, std=0.05))
