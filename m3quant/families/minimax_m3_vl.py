"""MiniMax-M3 (`MiniMaxM3SparseForConditionalGeneration`): dense first layers, then shared + routed experts with MSA."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..errors import CheckpointError
from ..schemes import Scheme
from .base import EngineModule, Expected, Family, KvGeometry, Role, need

_LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])\.(.+)")
_SHARED = re.compile(r"block_sparse_moe\.shared_experts\.((?:gate|up|down)_proj)\.(.+)")
_DENSE = re.compile(r"mlp\.((?:gate|up|down)_proj)\.(.+)")
_ATTENTION = re.compile(r"self_attn\.([qkvo]_proj)\.(.+)")
_INDEXER = re.compile(r"self_attn\.(index_[qk]_proj)\.(.+)")
_NORMS = {
    "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight",
    "self_attn.index_q_norm.weight", "self_attn.index_k_norm.weight",
}  # fmt: skip


class MiniMaxM3VL(Family):
    model_type = "minimax_m3_vl"
    architectures = ("MiniMaxM3SparseForConditionalGeneration",)
    # vLLM asks for experts.0.{gate,down,up}_proj here although the tensors are w1, w2, w3; and it fuses
    # q, k, v, index_q and index_k into one qkv_proj.
    targets: Mapping[str, tuple[str, ...]] = {
        "routed_experts": (r"re:.*\.experts\.\d+\.(w[123]|gate_proj|up_proj|down_proj)$",),
        "shared_experts": (r"re:.*\.shared_experts\.(gate_proj|up_proj|down_proj|gate_up_proj)$",),
        "dense_mlp": (r"re:.*\.layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj|gate_up_proj)$",),
        "attention": (
            r"re:.*language_model.*\.self_attn\.(q_proj|k_proj|v_proj|o_proj|qkv_proj|index_q_proj|index_k_proj)$",
        ),
    }
    always_ignored = (
        r"re:.*lm_head", r"re:.*embed_tokens", r"re:.*vision_tower.*", r"re:.*multi_modal_projector.*",
        r"re:.*patch_merge_mlp.*", r"re:.*block_sparse_moe\.gate$",
    )  # fmt: skip
    fp8_ignored = ("lm_head", "embed_tokens", "gate", "e_score_correction_bias")
    awq_ignored = ("lm_head", "vision_tower", "multi_modal_projector", "patch_merge_mlp", "block_sparse_moe.gate")
    awq_substrings: Mapping[str, tuple[str, ...]] = {
        "routed_experts": (".experts",),
        "shared_experts": ("shared_experts",),
        "dense_mlp": (".mlp.",),
        "attention": ("self_attn",),
    }
    refused_formats: Mapping[str, str] = {
        "fp8": "vLLM's M3 loader renames every weight_scale_inv to weight_scale and then skips it without a word, "
        "because the fp8 layers have no such parameter; add --format compressed-tensors, which stores the same blocks",
    }
    serve_flags = ("--tool-call-parser", "minimax_m3", "--enable-auto-tool-choice", "--reasoning-parser", "minimax_m3")
    sglang_flags = ("--tool-call-parser", "minimax-m3", "--reasoning-parser", "minimax-m3")
    reasoning_tokens = ("<mm:think>", "</mm:think>")
    min_vllm = "0.24.0"  # vllm-project/vllm#45381
    norm_one_plus = True
    pair_fold = False  # swigluoai clamps up and adds 1: scaling it does not commute (facts: relative error 0.54)

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        text = need(config, "text_config")
        if not isinstance(text, Mapping):
            raise CheckpointError(
                "config.json: 'text_config' is no object: copy the original config.json of the release."
            )
        return text

    def num_layers(self, config: Mapping[str, Any]) -> int:
        return int(need(self.text_config(config), "num_hidden_layers", "text_config"))

    def layer_prefix(self, layer: int) -> str:
        return f"language_model.model.layers.{layer}."

    def role(self, name: str) -> Role:
        if name.startswith("vision_tower."):
            return Role("vision")
        if name.startswith(("multi_modal_projector.", "patch_merge_mlp.")):
            return Role("projector")
        if ".mtp." in name or name.startswith("mtp."):
            return Role("mtp")
        if name in _OUTER:
            return Role(_OUTER[name])
        match = _LAYER.fullmatch(name)
        if not match:
            return Role("unknown")
        layer, rest = int(match[1]), match[2]
        if expert := _EXPERT.fullmatch(rest):
            return Role("routed_experts", layer, int(expert[1]), expert[2], expert[3] == "weight")
        for kind, pattern in _PROJECTIONS:
            if found := pattern.fullmatch(rest):
                return Role(kind, layer, part=found[1], is_weight=found[2] == "weight")
        if rest == "block_sparse_moe.gate.weight":
            return Role("router", layer)
        if rest == "block_sparse_moe.e_score_correction_bias":
            return Role("router_bias", layer)
        if rest in _NORMS:
            return Role("norm", layer)
        return Role("unknown", layer)

    def is_moe(self, config: Mapping[str, Any], layer: int) -> bool:
        return bool(need(self.text_config(config), "moe_layer_freq", "text_config")[layer])

    def is_sparse(self, config: Mapping[str, Any], layer: int) -> bool:
        sparse = self.text_config(config).get("sparse_attention_config") or {}
        return bool(sparse.get("use_sparse_attention")) and bool(sparse["sparse_attention_freq"][layer])

    def has_index_keys(self, config: Mapping[str, Any], layer: int) -> bool:
        return self.is_sparse(config, layer)

    def expected_tensors(self, config: Mapping[str, Any]) -> dict[str, Expected]:
        text = self.text_config(config)

        def get(key: str) -> int:
            return int(need(text, key, "text_config"))

        hidden, vocab = get("hidden_size"), get("vocab_size")
        heads, kv_heads, head_dim = get("num_attention_heads"), get("num_key_value_heads"), get("head_dim")
        out = {
            "language_model.model.embed_tokens.weight": Expected((vocab, hidden)),
            "language_model.model.norm.weight": Expected((hidden,)),
        }
        if not text.get("tie_word_embeddings", False):
            out["language_model.lm_head.weight"] = Expected((vocab, hidden))
        for layer in range(self.num_layers(config)):
            prefix = self.layer_prefix(layer)
            shapes: dict[str, tuple[int, ...]] = {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (heads * head_dim, hidden),
                "self_attn.k_proj": (kv_heads * head_dim, hidden),
                "self_attn.v_proj": (kv_heads * head_dim, hidden),
                "self_attn.o_proj": (hidden, heads * head_dim),
            }
            if text.get("use_qk_norm", True):
                shapes |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
            if self.is_sparse(config, layer):
                sparse = text["sparse_attention_config"]
                dim, index_heads = sparse["sparse_index_dim"], sparse["sparse_num_index_heads"]
                shapes |= {
                    "self_attn.index_q_proj": (index_heads * dim, hidden),
                    "self_attn.index_k_proj": (dim, hidden),
                    "self_attn.index_q_norm": (dim,),
                    "self_attn.index_k_norm": (dim,),
                }
            if self.is_moe(config, layer):
                inner, experts = get("intermediate_size"), get("num_local_experts")
                moe = f"{prefix}block_sparse_moe."
                out[f"{moe}gate.weight"] = Expected((experts, hidden), float32=True)
                if text.get("use_routing_bias", True):
                    out[f"{moe}e_score_correction_bias"] = Expected((experts,), float32=True)
                for expert in range(experts):
                    out[f"{moe}experts.{expert}.w1.weight"] = Expected((inner, hidden))
                    out[f"{moe}experts.{expert}.w2.weight"] = Expected((hidden, inner))
                    out[f"{moe}experts.{expert}.w3.weight"] = Expected((inner, hidden))
                if text.get("n_shared_experts"):
                    shared = get("shared_intermediate_size") * int(text["n_shared_experts"])
                    shapes |= _mlp("block_sparse_moe.shared_experts", hidden, shared)
            else:
                shapes |= _mlp("mlp", hidden, get("dense_intermediate_size"))
            for module, shape in shapes.items():
                out[f"{prefix}{module}.weight"] = Expected(shape)
        if config.get("vision_config"):
            out |= _vision_tensors(config, hidden)
        return out

    def engine_modules(self, config: Mapping[str, Any]) -> Iterator[EngineModule]:
        text = self.text_config(config)
        for layer in range(self.num_layers(config)):
            prefix = self.layer_prefix(layer)
            attention = f"{prefix}self_attn."
            qkv = tuple(f"{attention}{part}_proj" for part in "qkv")
            index = tuple(f"{attention}index_{p}_proj" for p in "qk") if self.is_sparse(config, layer) else ()
            names = "q, k, v, index_q, index_k" if index else "q, k, v"
            yield EngineModule((f"{attention}qkv_proj", *qkv), qkv + index, f"{attention}qkv_proj ({names})")
            yield EngineModule((f"{attention}o_proj",), (f"{attention}o_proj",), f"{attention}o_proj")
            mlps = [f"{prefix}mlp"]
            if self.is_moe(config, layer):
                moe = f"{prefix}block_sparse_moe."
                mlps = [f"{moe}shared_experts"] if text.get("n_shared_experts") else []
                experts = range(need(text, "num_local_experts", "text_config"))
                members = tuple(f"{moe}experts.{e}.{w}" for e in experts for w in ("w1", "w2", "w3"))
                probes = tuple(f"{moe}experts.0.{part}_proj" for part in ("gate", "down", "up"))
                yield EngineModule(probes, members, f"{moe}experts (w1, w2, w3 of every expert)")
            for mlp in mlps:
                pair = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
                yield EngineModule((f"{mlp}.gate_up_proj", *pair), pair, f"{mlp}.gate_up_proj (gate, up)")
                yield EngineModule((f"{mlp}.down_proj",), (f"{mlp}.down_proj",), f"{mlp}.down_proj")

    def selected_tokens(self, config: Mapping[str, Any]) -> int:
        if not any(self.is_sparse(config, layer) for layer in range(self.num_layers(config))):
            return 0
        sparse = self.text_config(config)["sparse_attention_config"]
        return int(sparse["sparse_topk_blocks"]) * int(sparse["sparse_block_size"])

    def kv_geometry(self, config: Mapping[str, Any]) -> KvGeometry:
        text, layers = self.text_config(config), self.num_layers(config)
        sparse = sum(self.is_sparse(config, layer) for layer in range(layers))
        dim = (text.get("sparse_attention_config") or {}).get("sparse_index_dim", 0)
        kv_heads, head_dim = need(text, "num_key_value_heads"), need(text, "head_dim")
        return KvGeometry(layers, kv_heads, head_dim, sparse, dim)

    def recipe_aliases(self, module: str) -> tuple[str, ...]:
        tree = module.replace("language_model.model.", "model.language_model.", 1)
        tree = tree.replace(".block_sparse_moe.", ".mlp.").replace(".self_attn.index_", ".self_attn.indexer.")
        for disk, name in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            if tree.endswith(f".{disk}"):
                return (module, tree, f"{tree.removesuffix(disk)}{name}")
        return (module, tree)

    def engine_names(self, module: str) -> tuple[str, ...]:
        if ".block_sparse_moe.experts." in module:
            return (module.split(".experts.")[0] + ".experts",)
        if module.startswith(("multi_modal_projector.", "patch_merge_mlp.")):
            return (module, f"vision_tower.{module}")
        # vLLM drops `mlp.` from the vision layers, but its name mapper misses entries without a trailing dot
        return tuple(dict.fromkeys((module, module.replace(".mlp.fc", ".fc"))))

    def engine_notes(self, routed_experts: Collection[Scheme], fmt: str) -> tuple[str, ...]:
        if any(scheme.kind == "fp8" for scheme in routed_experts) and fmt == "compressed-tensors":
            return (
                "FP8 routed experts of M3 need a vLLM that hands swiglu_alpha and swiglu_beta to its FP8 experts: 0.32 does, "
                "0.26 does not and answers with wrong numbers (docs/verify.md)",
            )
        return ()

    def optional_groups(self) -> tuple[str, ...]:
        return ("vision", "projector")


_OUTER = {
    "language_model.model.embed_tokens.weight": "embedding",
    "language_model.lm_head.weight": "lm_head",
    "language_model.model.norm.weight": "norm",
}
_PROJECTIONS = (("shared_experts", _SHARED), ("dense_mlp", _DENSE), ("attention", _ATTENTION), ("indexer", _INDEXER))


def _mlp(module: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{module}.gate_proj": (inner, hidden),
        f"{module}.up_proj": (inner, hidden),
        f"{module}.down_proj": (hidden, inner),
    }


def _vision_tensors(config: Mapping[str, Any], hidden: int) -> dict[str, Expected]:
    """Vision tower, projector and patch merger (facts/checkpoints 2.3), sized from vision_config."""
    vision = config["vision_config"]
    width, inner, patch = (need(vision, k, "vision_config") for k in ("hidden_size", "intermediate_size", "patch_size"))
    compression = vision.get("img_token_compression_config") or config.get("img_token_compression_config") or {}
    frames, merge = compression.get("temporal_patch_size", 2), compression.get("spatial_merge_size", 2)
    tower = "vision_tower.vision_model."
    conv = (width, need(vision, "num_channels", "vision_config"), frames, patch, patch)
    out = {f"{tower}embeddings.patch_embedding.weight": Expected(conv, float32=True)}

    def linear(module: str, rows: int, columns: int) -> None:
        out[f"{module}.weight"], out[f"{module}.bias"] = Expected((rows, columns)), Expected((rows,))

    def layer_norm(module: str) -> None:
        out[f"{module}.weight"] = out[f"{module}.bias"] = Expected((width,))

    layer_norm(f"{tower}pre_layrnorm")
    for layer in range(need(vision, "num_hidden_layers", "vision_config")):
        prefix = f"{tower}encoder.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{prefix}self_attn.{part}", width, width)
        layer_norm(f"{prefix}layer_norm1")
        layer_norm(f"{prefix}layer_norm2")
        linear(f"{prefix}mlp.fc1", inner, width)
        linear(f"{prefix}mlp.fc2", width, inner)
    projector = need(config, "projector_hidden_size")
    linear("multi_modal_projector.linear_1", projector, width)
    linear("multi_modal_projector.linear_2", hidden, projector)
    linear("patch_merge_mlp.linear_1", projector, hidden * merge * merge)
    linear("patch_merge_mlp.linear_2", hidden, projector)
    return out
