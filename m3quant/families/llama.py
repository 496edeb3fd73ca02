"""Dense decoders in Llama's layout: Llama, SmolLM2, Mistral, Qwen2 (bias on q, k, v), Qwen3 (q and k normed per head)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from .base import Family
from .config import ConfigPart, full_attention_only, heads_of, read_rope
from .spec import SILU, Activation, LayerSpec

_ALL, _QKV = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "k_proj", "v_proj")


class Llama(Family):
    architectures: ClassVar[Mapping[str, str]] = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }
    targets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "dense_mlp": (r"re:.*\.mlp\.(gate_proj|up_proj|down_proj|gate_up_proj)$",),
        "attention": (r"re:.*\.self_attn\.(q_proj|k_proj|v_proj|o_proj|qkv_proj)$",),
    }
    always_ignored = (r"re:.*lm_head", r"re:.*embed_tokens")
    fp8_ignored = ("lm_head",)
    awq_ignored = ("lm_head",)
    awq_substrings: ClassVar[Mapping[str, tuple[str, ...]]] = {"dense_mlp": (".mlp.",), "attention": ("self_attn",)}

    def read_layers(self, top: ConfigPart, text: ConfigPart) -> list[LayerSpec]:
        kind = self.model_type
        heads, kv_heads = heads_of(text, kv_needed=False)  # Llama 1 has no num_key_value_heads
        if not text.has("head_dim") and kind != "qwen3" and self.hidden_size % heads:
            text.need("head_dim")
        head_dim = text.count("head_dim", default=None if kind == "qwen3" else self.hidden_size // heads)
        text.expect("hidden_act", SILU)
        text.expect("mlp_bias", False, None)
        biased: tuple[str, ...] = _QKV if kind == "qwen2" else ()
        if kind in ("llama", "qwen3"):
            biased = _ALL if text.flag("attention_bias", False) else ()
        full_attention_only(text, self.num_layers, switch=kind.startswith("qwen"))
        rope = read_rope(
            text,
            head_dim,
            kinds=("default", "linear", "llama3"),
            theta=10000.0 if kind == "llama" else None,
            partial=False,
        )
        inner = text.count("intermediate_size")
        qk_norm: Literal["per_head", "none"] = "per_head" if kind == "qwen3" else "none"
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
                qk_norm=qk_norm,
                rope=rope,
                sparse=None,
                moe=None,
                dense_intermediate_size=inner,
                activation=Activation(SILU),
                biased=biased,
            )
            for index in range(self.num_layers)
        ]
