"""MiniMax-M2, M2.1, M2.5, M2.7 (`MiniMaxM2ForCausalLM`): every layer is attention plus routed experts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .base import EngineModule, Expected, Family, KvGeometry, Role, need

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])\.(.+)")
_ATTENTION = re.compile(r"self_attn\.([qkvo]_proj)\.(.+)")


class MiniMaxM2(Family):
    model_type = "minimax_m2"
    architectures = ("MiniMaxM2ForCausalLM",)
    # vLLM looks experts up as model.layers.N.mlp.experts.0.w1 although the tensors say block_sparse_moe,
    # so no target may name either parent.
    targets: Mapping[str, tuple[str, ...]] = {
        "routed_experts": (r"re:.*\.experts\.\d+\.(w[123]|gate_proj|up_proj|down_proj)$",),
        "attention": (r"re:.*\.self_attn\.(q_proj|k_proj|v_proj|o_proj|qkv_proj)$",),
    }
    always_ignored = (r"re:.*lm_head", r"re:.*embed_tokens", r"re:.*\.(block_sparse_moe|mlp)\.gate$")
    fp8_ignored = ("gate", "e_score_correction_bias", "lm_head")
    awq_ignored = ("lm_head", "block_sparse_moe.gate", "mlp.gate")
    awq_substrings: Mapping[str, tuple[str, ...]] = {"routed_experts": (".experts",), "attention": ("self_attn",)}
    refused_formats: Mapping[str, str] = {}
    serve_flags = ("--tool-call-parser", "minimax_m2", "--enable-auto-tool-choice", "--reasoning-parser", "minimax_m2")
    sglang_flags = ("--tool-call-parser", "minimax-m2", "--reasoning-parser", "minimax-append-think")
    norm_one_plus = False
    pair_fold = True

    def num_layers(self, config: Mapping[str, Any]) -> int:
        return int(need(config, "num_hidden_layers"))

    def layer_prefix(self, layer: int) -> str:
        return f"model.layers.{layer}."

    def role(self, name: str) -> Role:
        if name == "model.embed_tokens.weight":
            return Role("embedding")
        if name == "lm_head.weight":
            return Role("lm_head")
        if name == "model.norm.weight":
            return Role("norm")
        if name.startswith(("model.mtp.", "mtp.")) or ".mtp." in name:
            return Role("mtp")
        match = _LAYER.fullmatch(name)
        if not match:
            return Role("unknown")
        layer, rest = int(match[1]), match[2]
        if expert := _EXPERT.fullmatch(rest):
            return Role("routed_experts", layer, int(expert[1]), expert[2], expert[3] == "weight")
        if attention := _ATTENTION.fullmatch(rest):
            return Role("attention", layer, part=attention[1], is_weight=attention[2] == "weight")
        if rest == "block_sparse_moe.gate.weight":
            return Role("router", layer)
        if rest == "block_sparse_moe.e_score_correction_bias":
            return Role("router_bias", layer)
        if rest in _NORMS:
            return Role("norm", layer)
        return Role("unknown", layer)

    def expected_tensors(self, config: Mapping[str, Any]) -> dict[str, Expected]:
        hidden, vocab = need(config, "hidden_size"), need(config, "vocab_size")
        inner, experts = need(config, "intermediate_size"), need(config, "num_local_experts")
        heads, kv_heads = need(config, "num_attention_heads"), need(config, "num_key_value_heads")
        head_dim = config.get("head_dim") or hidden // heads
        out = {"model.embed_tokens.weight": Expected((vocab, hidden)), "model.norm.weight": Expected((hidden,))}
        if not config.get("tie_word_embeddings", False):
            out["lm_head.weight"] = Expected((vocab, hidden))
        for layer in range(self.num_layers(config)):
            prefix = self.layer_prefix(layer)
            shapes = {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (heads * head_dim, hidden),
                "self_attn.k_proj": (kv_heads * head_dim, hidden),
                "self_attn.v_proj": (kv_heads * head_dim, hidden),
                "self_attn.o_proj": (hidden, heads * head_dim),
            }
            if config.get("use_qk_norm", True):
                shapes |= {"self_attn.q_norm": (heads * head_dim,), "self_attn.k_norm": (kv_heads * head_dim,)}
            for module, shape in shapes.items():
                out[f"{prefix}{module}.weight"] = Expected(shape)
            moe = f"{prefix}block_sparse_moe."
            out[f"{moe}gate.weight"] = Expected((experts, hidden), float32=True)
            if config.get("use_routing_bias", True):
                out[f"{moe}e_score_correction_bias"] = Expected((experts,), float32=True)
            for expert in range(experts):
                out[f"{moe}experts.{expert}.w1.weight"] = Expected((inner, hidden))
                out[f"{moe}experts.{expert}.w2.weight"] = Expected((hidden, inner))
                out[f"{moe}experts.{expert}.w3.weight"] = Expected((inner, hidden))
        return out

    def engine_modules(self, config: Mapping[str, Any]) -> Iterator[EngineModule]:
        experts = range(need(config, "num_local_experts"))
        for layer in range(self.num_layers(config)):
            prefix = self.layer_prefix(layer)
            attention = f"{prefix}self_attn."
            qkv = tuple(f"{attention}{part}_proj" for part in "qkv")
            yield EngineModule((f"{attention}qkv_proj", *qkv), qkv, f"{attention}qkv_proj (q, k, v)")
            yield EngineModule((f"{attention}o_proj",), (f"{attention}o_proj",), f"{attention}o_proj")
            members = tuple(f"{prefix}block_sparse_moe.experts.{e}.{w}" for e in experts for w in ("w1", "w2", "w3"))
            probes = tuple(f"{prefix}mlp.experts.0.{w}" for w in ("w1", "w2", "w3"))
            yield EngineModule(probes, members, f"{prefix}block_sparse_moe.experts (w1, w2, w3 of every expert)")

    def kv_geometry(self, config: Mapping[str, Any]) -> KvGeometry:
        heads = need(config, "num_attention_heads")
        head_dim = config.get("head_dim") or need(config, "hidden_size") // heads
        return KvGeometry(self.num_layers(config), need(config, "num_key_value_heads"), head_dim)

    def recipe_aliases(self, module: str) -> tuple[str, ...]:
        renamed = module.replace(".block_sparse_moe.", ".mlp.")
        for disk, tree in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            if renamed.endswith(f".{disk}"):
                return (module, renamed, f"{renamed.removesuffix(disk)}{tree}")
        return (module, renamed)

    def engine_names(self, module: str) -> tuple[str, ...]:
        if ".experts." in module:
            return (module.replace(".block_sparse_moe.", ".mlp.").split(".experts.")[0] + ".experts",)
        return (module,)

    def optional_groups(self) -> tuple[str, ...]:
        return ()


_NORMS = {
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
}
