"""Small random M2 and M3 checkpoints: config.json and tensors under the names, dtypes and shapes rules of the released ones.

Hidden and expert size are 256 (vLLM's Marlin is wrong at 128), and every fused projection holds whole blocks of 128.
"""

from __future__ import annotations

from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


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
