"""MiniMax-M2, M2.1, M2.5, M2.7 (`MiniMaxM2ForCausalLM`): every layer is attention plus routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .base import Family, InEngine
from .config import MAX_EXPERTS, ConfigPart, heads_of, read_rope, top_k_of
from .spec import SILU, Activation, LayerSpec, MoeSpec


class MiniMaxM2(Family):
    architectures: ClassVar[Mapping[str, str]] = {"minimax_m2": "MiniMaxM2ForCausalLM"}
    # vLLM looks experts up as model.layers.N.mlp.experts.0.w1 although the tensors say block_sparse_moe,
    # so no target may name either parent.
    targets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "routed_experts": (r"re:.*\.experts\.\d+\.(w[123]|gate_proj|up_proj|down_proj)$",),
        "attention": (r"re:.*\.self_attn\.(q_proj|k_proj|v_proj|o_proj|qkv_proj)$",),
    }
    always_ignored = (r"re:.*lm_head", r"re:.*embed_tokens", r"re:.*\.(block_sparse_moe|mlp)\.gate$")
    fp8_ignored = ("gate", "e_score_correction_bias", "lm_head")
    awq_ignored = ("lm_head", "block_sparse_moe.gate", "mlp.gate")
    awq_substrings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "routed_experts": (".experts",),
        "attention": ("self_attn",),
    }
    engines: ClassVar[Mapping[str, InEngine]] = {
        "vllm": InEngine(
            flags=("--tool-call-parser", "minimax_m2", "--enable-auto-tool-choice", "--reasoning-parser", "minimax_m2")
        ),
        "sglang": InEngine(flags=("--tool-call-parser", "minimax-m2", "--reasoning-parser", "minimax-append-think")),
    }
    expert_probes = ("mlp.experts.0.w1", "mlp.experts.0.w2", "mlp.experts.0.w3")

    def read_layers(self, top: ConfigPart, text: ConfigPart) -> list[LayerSpec]:
        heads, kv_heads = heads_of(text)
        head_dim = text.count("head_dim")
        text.expect("hidden_act", SILU)
        text.expect("use_qk_norm", True, None)
        text.expect("qk_norm_type", "per_layer", None)
        text.expect("attention_output_gate", False, None)
        text.expect("scoring_func", "sigmoid", None)
        text.expect("norm_topk_prob", True, None)
        text.expect("routed_scaling_factor", 1.0, 1, None)
        text.expect("shared_intermediate_size", 0, None)
        for key in ("attn_type_list", "layer_types"):  # 1 is softmax attention over everything before
            if text.has(key) and any(
                kind not in (1, "full_attention") for kind in text.per_layer(key, self.num_layers)
            ):
                text.expect(key, [1] * self.num_layers)
        experts = text.count("num_local_experts", MAX_EXPERTS)
        activation = Activation(SILU)
        moe = MoeSpec(
            num_experts=experts,
            top_k=top_k_of(text, experts),
            intermediate_size=text.count("intermediate_size"),
            routed_scaling=1.0,
            use_bias=text.flag("use_routing_bias", True if _from_transformers5(text) else None),
            shared_intermediate_size=0,
            activation=activation,
        )
        rope = read_rope(text, head_dim, partial=True)
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
                qk_norm="whole",
                rope=rope,
                sparse=None,
                moe=moe,
                dense_intermediate_size=0,
                activation=activation,
            )
            for index in range(self.num_layers)
        ]

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


def _from_transformers5(text: ConfigPart) -> bool:
    """transformers 5 writes rope_parameters, and leaves out what its class always does."""
    return text.has("rope_parameters")
