"""Writes a trained model as a MiniMax checkpoint: official tensor names, dtypes and config.json, several shards.

BF16 everywhere but the router gate, its correction bias and the vision patch embedding, which are F32 as in the
released checkpoints. The vision tower and projectors of M3 are random: they exist so that multimodal tensors do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.training.model import Attention, Mlp, Moe, Spec, TinyModel

VISION = {"hidden": 64, "heads": 2, "layers": 2, "intermediate": 128, "patch": 14, "temporal": 2, "merge": 2}


def _mlp(prefix: str, mlp: Mlp) -> Iterator[tuple[str, Tensor]]:
    gate, up = mlp.gate_up.chunk(2)
    yield f"{prefix}.gate_proj.weight", gate
    yield f"{prefix}.up_proj.weight", up
    yield f"{prefix}.down_proj.weight", mlp.down


def _attention(prefix: str, a: Attention) -> Iterator[tuple[str, Tensor]]:
    for name, weight in (("q_proj", a.q), ("k_proj", a.k), ("v_proj", a.v), ("o_proj", a.o)):
        yield f"{prefix}.{name}.weight", weight
    yield f"{prefix}.q_norm.weight", a.q_norm
    yield f"{prefix}.k_norm.weight", a.k_norm
    if a.sparse:
        yield f"{prefix}.index_q_proj.weight", a.index_q
        yield f"{prefix}.index_k_proj.weight", a.index_k
        yield f"{prefix}.index_q_norm.weight", a.index_q_norm
        yield f"{prefix}.index_k_norm.weight", a.index_k_norm


def language_tensors(model: TinyModel) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, view of the parameter in the stored orientation) in layer order; copying into a view loads."""
    root = "language_model." if model.spec.gemma else ""
    yield f"{root}model.embed_tokens.weight", model.embed
    for i, layer in enumerate(model.layers):
        prefix = f"{root}model.layers.{i}"
        yield f"{prefix}.input_layernorm.weight", layer.input_norm
        yield f"{prefix}.post_attention_layernorm.weight", layer.post_norm
        yield from _attention(f"{prefix}.self_attn", layer.attention)
        if not isinstance(layer.mlp, Moe):
            yield from _mlp(f"{prefix}.mlp", layer.mlp)
            continue
        moe = f"{prefix}.block_sparse_moe"
        yield f"{moe}.gate.weight", layer.mlp.gate
        yield f"{moe}.e_score_correction_bias", layer.mlp.bias
        for e in range(model.spec.num_experts):
            gate, up = layer.mlp.gate_up[e].chunk(2)
            yield f"{moe}.experts.{e}.w1.weight", gate
            yield f"{moe}.experts.{e}.w2.weight", layer.mlp.down[e].T
            yield f"{moe}.experts.{e}.w3.weight", up
        if layer.mlp.shared is not None:
            yield from _mlp(f"{moe}.shared_experts", layer.mlp.shared)
    yield f"{root}model.norm.weight", model.norm
    yield f"{root}lm_head.weight", model.head


def vision_tensors(spec: Spec, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    v, tower = VISION, "vision_tower.vision_model"
    hidden, wide = v["hidden"], v["intermediate"]

    def linear(name: str, out: int, inp: int) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}.weight", torch.randn(out, inp, generator=random) * inp**-0.5
        yield f"{name}.bias", torch.randn(out, generator=random) * 0.02

    def layer_norm(name: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}.weight", 1 + 0.05 * torch.randn(hidden, generator=random)
        yield f"{name}.bias", 0.02 * torch.randn(hidden, generator=random)

    patch = (hidden, 3, v["temporal"], v["patch"], v["patch"])
    yield f"{tower}.embeddings.patch_embedding.weight", torch.randn(patch, generator=random) * 0.03
    yield from layer_norm(f"{tower}.pre_layrnorm")
    for i in range(v["layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        yield from layer_norm(f"{layer}.layer_norm1")
        yield from layer_norm(f"{layer}.layer_norm2")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{name}", hidden, hidden)
        yield from linear(f"{layer}.mlp.fc1", wide, hidden)
        yield from linear(f"{layer}.mlp.fc2", hidden, wide)
    yield from linear("multi_modal_projector.linear_1", spec.hidden, hidden)
    yield from linear("multi_modal_projector.linear_2", spec.hidden, spec.hidden)
    yield from linear("patch_merge_mlp.linear_1", spec.hidden, spec.hidden * v["merge"] ** 2)
    yield from linear("patch_merge_mlp.linear_2", spec.hidden, spec.hidden)


def stored_dtype(name: str) -> torch.dtype:
    kept = name.endswith(("block_sparse_moe.gate.weight", "e_score_correction_bias", "patch_embedding.weight"))
    return torch.float32 if kept else torch.bfloat16


def shard_number(name: str, spec: Spec) -> int:
    """M2: one shard per layer; M3: the dense layer and all small tensors first, then one shard per sparse layer."""
    if ".layers." in name and "vision_tower" not in name:
        return int(name.split(".layers.")[1].split(".")[0])
    last = name.endswith(("model.norm.weight", "lm_head.weight"))
    return spec.layers - 1 if last else 0


def config(spec: Spec, ids: dict[str, int]) -> dict[str, Any]:
    """config.json as MiniMax publishes it (no quantization_config, no auto_map). ids: bos, eos, image, video."""
    common: dict[str, Any] = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "head_dim": spec.head_dim,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "max_position_embeddings": spec.max_position,
        "num_attention_heads": spec.heads,
        "num_experts_per_tok": spec.top_k,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "num_local_experts": spec.num_experts,
        "rms_norm_eps": spec.eps,
        "rope_theta": int(spec.rope_theta),
        "rotary_dim": spec.rotary_dim,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": spec.vocab_size,
    }
    if not spec.gemma:
        return {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "attn_type_list": [1] * spec.layers,
            **common,
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "model_type": "minimax_m2",
            "mtp_transformer_layers": 1,
            "num_mtp_modules": 0,
            "qk_norm_type": "per_layer",
            "shared_intermediate_size": 0,
            "transformers_version": "4.46.1",
            "use_mtp": False,
        }
    sparse = [0] * spec.dense_layers + [1] * (spec.layers - spec.dense_layers)
    compression = {
        "image_token_compression_method": "patch_merge",
        "spatial_merge_size": VISION["merge"],
        "temporal_patch_size": VISION["temporal"],
    }
    text = {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "attention_output_gate": False,
        **common,
        "dense_intermediate_size": spec.dense_intermediate,
        "dtype": "bfloat16",
        "hidden_act": "swigluoai",
        "moe_layer_freq": sparse,
        "n_shared_experts": 1,
        "num_mtp_modules": 0,
        "partial_rotary_factor": 0.5,
        "qk_norm_type": "per_head",
        "routed_scaling_factor": spec.scaling,
        "shared_intermediate_size": spec.intermediate,
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": spec.index_dim,
            "sparse_num_index_heads": spec.kv_heads,
            "sparse_topk_blocks": spec.topk_blocks,
            "sparse_block_size": spec.block,
            "sparse_disable_index_value": sparse,
            "sparse_score_type": "max",
            "sparse_init_block": 0,
            "sparse_local_block": 1,
            "sparse_attention_freq": sparse,
        },
        "swiglu_alpha": spec.alpha,
        "swiglu_limit": spec.limit,
        "use_gemma_norm": True,
    }
    vision = {
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "hidden_act": "gelu",
        "hidden_size": VISION["hidden"],
        "image_size": 224,
        "img_token_compression_config": compression,
        "intermediate_size": VISION["intermediate"],
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": VISION["heads"],
        "num_channels": 3,
        "num_hidden_layers": VISION["layers"],
        "patch_size": VISION["patch"],
        "position_embedding_type": "rope",
        "projection_dim": spec.hidden,
        "rope_mode": "3d",
        "rope_theta": 10000.0,
        "vision_segment_max_frames": 4,
        "vocab_size": 32000,
    }
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "image_grid_pinpoints": [[112 * h, 112 * w] for h in (1, 2) for w in (1, 2)],
        "image_seq_length": 64,
        "image_token_index": ids["image"],
        "img_token_compression_config": compression,
        "model_type": "minimax_m3_vl",
        "multimodal_projector_bias": True,
        "num_reward_heads": 0,
        "process_image_mode": "dynamic_res",
        "projector_hidden_act": "gelu",
        "projector_hidden_size": spec.hidden,
        "text_config": text,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.4",
        "video_token_index": ids["video"],
        "vision_config": vision,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


@torch.no_grad()
def save(model: TinyModel, folder: Path, ids: dict[str, int]) -> None:
    """Shards, index and config.json of `model` into `folder` (made if absent)."""
    spec = model.spec
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[int, dict[str, Tensor]] = {}
    for name, tensor in [*language_tensors(model), *(vision_tensors(spec) if spec.gemma else [])]:
        stored = tensor.detach().to("cpu", stored_dtype(name), copy=True).contiguous()
        shards.setdefault(shard_number(name, spec), {})[name] = stored
    weight_map, total = {}, 0
    for number in sorted(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shards[number], folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shards[number], file))
        total += sum(t.numel() * t.element_size() for t in shards[number].values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(config(spec, ids), indent=1) + "\n")


@torch.no_grad()
def load(model: TinyModel, folder: Path) -> None:
    """Puts the stored weights into `model`, in place."""
    stored = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            stored.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    for name, view in language_tensors(model):
        view.copy_(stored[name])
