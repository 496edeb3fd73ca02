"""Qwen3 with routed experts (`Qwen3MoeForCausalLM`): Qwen3-30B-A3B, 235B-A22B. A softmax router, no shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .base import Family, InEngine
from .config import MAX_EXPERTS, MAX_LAYERS, ConfigPart, full_attention_only, heads_of, read_rope, top_k_of
from .spec import SILU, Activation, LayerSpec, MoeSpec

_PARTS = ("gate_proj", "up_proj", "down_proj")


class Qwen3Moe(Family):
    architectures: ClassVar[Mapping[str, str]] = {"qwen3_moe": "Qwen3MoeForCausalLM"}
    targets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "routed_experts": (r"re:.*\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)$",),
        "dense_mlp": (r"re:.*\.mlp\.(gate_proj|up_proj|down_proj|gate_up_proj)$",),
        "attention": (r"re:.*\.self_attn\.(q_proj|k_proj|v_proj|o_proj|qkv_proj)$",),
    }
    always_ignored = (r"re:.*lm_head", r"re:.*embed_tokens", r"re:.*\.mlp\.gate$")
    fp8_ignored = ("lm_head",)
    awq_ignored = ("lm_head", "mlp.gate")
    awq_substrings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "routed_experts": (".experts",),
        "dense_mlp": ("mlp.gate_", "mlp.up_", "mlp.down_"),
        "attention": ("self_attn",),
    }
    engines: ClassVar[Mapping[str, InEngine]] = {
        "vllm": InEngine(
            flags=("--tool-call-parser", "hermes", "--enable-auto-tool-choice", "--reasoning-parser", "qwen3")
        ),
        "sglang": InEngine(flags=("--tool-call-parser", "qwen25", "--reasoning-parser", "qwen3")),
    }
    expert_probes = tuple(f"mlp.experts.0.{part}" for part in ("gate_proj", "down_proj", "up_proj"))

    def read_layers(self, top: ConfigPart, text: ConfigPart) -> list[LayerSpec]:
        heads, kv_heads = heads_of(text)
        head_dim = text.count("head_dim")
        text.expect("hidden_act", SILU)
        biased = ("q_proj", "k_proj", "v_proj", "o_proj") if text.flag("attention_bias", False) else ()
        full_attention_only(text, self.num_layers, switch=True)
        rope = read_rope(text, head_dim, kinds=("default", "linear", "llama3"), partial=False)
        activation = Activation(SILU)
        experts = text.count("num_local_experts" if text.has("num_local_experts") else "num_experts", MAX_EXPERTS)
        text.expect("num_experts", experts, None)
        moe = MoeSpec(
            num_experts=experts,
            top_k=top_k_of(text, experts),
            intermediate_size=text.count("moe_intermediate_size"),
            routed_scaling=1.0,
            use_bias=False,
            shared_intermediate_size=0,
            activation=activation,
            router="softmax",
            normalise=text.flag("norm_topk_prob"),
            router_float32=False,
            block="mlp.",
            parts=_PARTS,
        )
        has_experts = self._expert_layers(text)
        inner = text.raw("intermediate_size", 0) if all(has_experts) else text.count("intermediate_size")
        text.refuse_unknown()
        return [
            LayerSpec(
                index=index,
                hidden_size=self.hidden_size,
                eps=self.eps,
                norm_one_plus=False,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                qk_norm="per_head",
                rope=rope,
                sparse=None,
                moe=moe if has_experts[index] else None,
                dense_intermediate_size=0 if has_experts[index] else inner,
                activation=activation,
                biased=biased,
            )
            for index in range(self.num_layers)
        ]

    def _expert_layers(self, text: ConfigPart) -> list[bool]:
        """Every decoder_sparse_step-th layer has experts, those of mlp_only_layers excepted."""
        step = text.count("decoder_sparse_step", MAX_LAYERS, default=1)
        dense = text.raw("mlp_only_layers", [])
        if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
            raise text.wrong("mlp_only_layers", dense, "a list of layers")
        return [index not in dense and (index + 1) % step == 0 for index in range(self.num_layers)]

    def engine_names(self, module: str) -> tuple[str, ...]:
        return (module.split(".experts.")[0] + ".experts",) if ".experts." in module else (module,)
