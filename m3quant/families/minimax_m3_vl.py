"""MiniMax-M3 (`MiniMaxM3SparseForConditionalGeneration`): dense first layers, then shared + routed experts with MSA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from ..errors import CheckpointError
from .base import Family, InEngine
from .config import MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, MAX_SIZE, ConfigPart, heads_of, read_rope, top_k_of
from .spec import SILU, SWIGLUOAI, Activation, Expected, LayerSpec, MoeSpec, SparseSpec

# Keys of the whole config.json that say nothing of the language model.
_BESIDE = re.compile(r"(image|img|video|vision|projector|multimodal|merged|process_image)_\w+|(spatial|temporal)_\w+")
# transformers 5's spelling of `sparse_attention_config`
_INDEX_KEYS = {
    "sparse_num_index_heads": "index_n_heads",
    "sparse_index_dim": "index_head_dim",
    "sparse_block_size": "index_block_size",
    "sparse_topk_blocks": "index_topk_blocks",
    "sparse_local_block": "index_local_blocks",
}

# What the transformers tree (its conversion_mapping, "minimax_m3_vl") names differently outside the layers.
_TREE = (
    (r"language_model\.lm_head", "lm_head"),
    (r"vision_tower\.vision_model\.(?:encoder\.)?", "model.vision_tower."),
    (r"multi_modal_projector\.", "model.multi_modal_projector."),
    (r"patch_merge_mlp\.", "model.multi_modal_projector.merge_"),
)


class MiniMaxM3VL(Family):
    architectures: ClassVar[Mapping[str, str]] = {"minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration"}
    # vLLM asks for experts.0.{gate,down,up}_proj here although the tensors are w1, w2, w3; and it fuses
    # q, k, v, index_q and index_k into one qkv_proj. SGLang fuses the index projections into index_qkv_proj (0.5.23,
    # srt/models/minimax_m3.py); transformers 5.24 calls them indexer.q_proj and indexer.k_proj.
    targets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "routed_experts": (r"re:.*\.experts\.\d+\.(w[123]|gate_proj|up_proj|down_proj)$",),
        "shared_experts": (r"re:.*\.shared_experts\.(gate_proj|up_proj|down_proj|gate_up_proj)$",),
        "dense_mlp": (r"re:.*\.layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj|gate_up_proj)$",),
        "attention": (
            r"re:.*language_model.*\.self_attn\.(q_proj|k_proj|v_proj|o_proj|qkv_proj|index_(q|k|v|qkv)_proj|indexer\.(q|k)_proj)$",
        ),
    }
    joined = frozenset({("shared_experts", "up_proj"), ("dense_mlp", "up_proj")})
    always_ignored = (
        r"re:.*lm_head", r"re:.*embed_tokens", r"re:.*vision_tower.*", r"re:.*multi_modal_projector.*",
        r"re:.*patch_merge_mlp.*", r"re:.*block_sparse_moe\.gate$",
    )  # fmt: skip
    fp8_ignored = ("lm_head", "embed_tokens", "gate", "e_score_correction_bias")
    awq_ignored = ("lm_head", "vision_tower", "multi_modal_projector", "patch_merge_mlp", "block_sparse_moe.gate")
    awq_substrings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "routed_experts": (".experts",),
        "shared_experts": ("shared_experts",),
        "dense_mlp": (".mlp.",),
        "attention": ("self_attn",),
    }
    engines: ClassVar[Mapping[str, InEngine]] = {
        "vllm": InEngine(
            flags=("--tool-call-parser", "minimax_m3", "--enable-auto-tool-choice", "--reasoning-parser", "minimax_m3"),
            first_release="0.24.0",  # vllm-project/vllm#45381
            refused_formats={
                "fp8": "vLLM's M3 loader renames every weight_scale_inv to weight_scale and then skips it without an error, "
                "because the fp8 layers have no such parameter; add --format compressed-tensors, which stores the same blocks"
            },
            reasoning_tokens=("<mm:think>", "</mm:think>"),
            draft_settings={"attention_backend": "FLASH_ATTN"},  # vLLM's recipe for M3: a draft has plain attention
            draft_over_stages=True,
            # The vision tower is neither built nor read; 128 is the only block size of the sparse kernels.
            probe_arguments={"language_model_only": True, "block_size": 128},
            probe_norm="vllm.models.minimax_m3.nvidia.model:MiniMAXGemmaRMSNorm",
        ),
        "sglang": InEngine(flags=("--tool-call-parser", "minimax-m3", "--reasoning-parser", "minimax-m3")),
    }
    body = "language_model.model."
    head_name = "language_model.lm_head.weight"
    towers: ClassVar[Mapping[str, str]] = {
        "vision_tower.": "vision",
        "multi_modal_projector.": "projector",
        "patch_merge_mlp.": "projector",
    }
    expert_probes = tuple(f"block_sparse_moe.experts.0.{part}_proj" for part in ("gate", "down", "up"))
    text_key = "text_config"

    def read_layers(self, top: ConfigPart, text: ConfigPart) -> list[LayerSpec]:
        resaved = text.has("mlp_layer_types")  # by transformers 5, which leaves out what its class always does
        heads, kv_heads = heads_of(text)
        head_dim = text.count("head_dim")
        text.expect("use_qk_norm", True, None)
        text.expect("qk_norm_type", "per_head", *([None] if resaved else []))
        text.expect("attention_output_gate", False, None)
        text.expect("scoring_func", "sigmoid", None)
        text.expect("norm_topk_prob", True, None)
        one_plus = text.flag("use_gemma_norm", True if resaved else None)
        has_experts = self._expert_layers(text)
        activation = _activation(text)
        moe = self._moe(text, activation, resaved) if any(has_experts) else None
        dense = (
            text.count("dense_intermediate_size") if not all(has_experts) else text.raw("dense_intermediate_size", 0)
        )
        sparse = self._sparse_layers(text, kv_heads)
        rope = read_rope(text, head_dim, partial=True)
        text.refuse_unknown()
        top.count("projector_hidden_size", MAX_HEADS, default=1)
        self.vision = self._vision(top)
        top.refuse_unknown(_BESIDE)
        return [
            LayerSpec(
                index=index,
                hidden_size=self.hidden_size,
                eps=self.eps,
                norm_one_plus=one_plus,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                qk_norm="per_head",
                rope=rope,
                sparse=sparse[index],
                moe=moe if has_experts[index] else None,
                dense_intermediate_size=0 if has_experts[index] else dense,
                activation=activation,
            )
            for index in range(self.num_layers)
        ]

    def _expert_layers(self, text: ConfigPart) -> list[bool]:
        """Which layers have routed experts. Both spellings may be there, and then agree."""
        found = []
        if text.has("mlp_layer_types"):
            kinds = text.per_layer("mlp_layer_types", self.num_layers)
            if any(kind not in ("sparse", "dense") for kind in kinds):
                raise text.wrong("mlp_layer_types", kinds, "a list of 'sparse' and 'dense'")
            found.append([kind == "sparse" for kind in kinds])
        if text.has("moe_layer_freq") or not found:
            found.append(text.flags("moe_layer_freq", self.num_layers))
        if found[0][: self.num_layers] != found[-1][: self.num_layers]:
            raise text.wrong("mlp_layer_types", text.raw("mlp_layer_types"), "what 'moe_layer_freq' says")
        return found[0]

    def _moe(self, text: ConfigPart, activation: Activation, resaved: bool) -> MoeSpec:
        experts = text.count("num_local_experts", MAX_EXPERTS)
        shared = text.count("n_shared_experts", MAX_EXPERTS, least=0, default=1 if resaved else None)
        return MoeSpec(
            num_experts=experts,
            top_k=top_k_of(text, experts),
            intermediate_size=text.count("intermediate_size"),
            routed_scaling=text.number("routed_scaling_factor"),
            use_bias=text.flag("use_routing_bias", True if resaved else None),
            shared_intermediate_size=shared
            * text.count("shared_intermediate_size", least=0, default=None if shared else 0),
            activation=activation,
        )

    def _sparse_layers(self, text: ConfigPart, kv_heads: int) -> list[SparseSpec | None]:
        """Block selection of each layer, from `sparse_attention_config` or from transformers 5's `layer_types` and `index_*`."""
        layers, released = self.num_layers, text.part("sparse_attention_config")
        kinds = None
        if text.has("layer_types"):
            kinds = text.per_layer("layer_types", layers)
            if any(kind not in ("minimax_m3_sparse", "full_attention") for kind in kinds):
                raise text.wrong("layer_types", kinds, "a list of 'minimax_m3_sparse' and 'full_attention'")
            kinds = [kind == "minimax_m3_sparse" for kind in kinds]
        for theirs in _INDEX_KEYS.values():
            text.raw(theirs)  # where both spellings are there, the release's is read
        if released is None:
            if kinds is None:
                text.need("sparse_attention_config")
            spec = _selection(text, _INDEX_KEYS, 0, kv_heads) if any(kinds or ()) else None
            return [spec if kind else None for kind in kinds or ()]
        used = released.flag("use_sparse_attention", True)
        chosen = released.flags("sparse_attention_freq", layers) if used else [False] * layers
        if kinds is not None and kinds[:layers] != chosen[:layers]:
            raise text.wrong("layer_types", text.raw("layer_types"), "what 'sparse_attention_freq' says")
        if not any(chosen):
            return [None] * layers
        released.expect("sparse_score_type", "max")
        without_values = released.flags("sparse_disable_index_value", layers)
        for layer in range(layers):
            if chosen[layer] and not without_values[layer]:
                raise CheckpointError(
                    f"{text.where}: layer {layer} asks for index values (sparse_disable_index_value = 0); none are released"
                )
        first = released.count("sparse_init_block", least=0)
        spec = _selection(released, {key: key for key in _INDEX_KEYS}, first, kv_heads)
        released.refuse_unknown()
        return [spec if kind else None for kind in chosen]

    def _vision(self, top: ConfigPart) -> ConfigPart | None:
        vision = top.part("vision_config")
        for key in ("patch_size", "num_channels"):
            if vision is not None and vision.has(key):
                vision.count(key, MAX_HEADS)
        if vision is not None and vision.has("num_hidden_layers"):
            self.num_vision_layers = vision.count("num_hidden_layers", MAX_LAYERS)
        return vision

    def other_tensors(self) -> dict[str, Expected]:
        return (
            _vision_tensors(self.vision, ConfigPart(self.config, self.where), self.hidden_size) if self.vision else {}
        )

    def recipe_aliases(self, module: str) -> tuple[str, ...]:
        for disk, renamed in _TREE:
            if found := re.match(disk, module):
                return (module, renamed + module[found.end() :])
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

    def optional_groups(self) -> tuple[str, ...]:
        return ("vision", "projector")


def _activation(text: ConfigPart) -> Activation:
    """swigluoai under either name: transformers 5 writes "silu", and computes with swiglu_alpha and swiglu_limit all the same."""
    text.expect("hidden_act", SWIGLUOAI, SILU)
    # The first released config.json has no swiglu_beta; vLLM's and transformers' value is 1.0.
    beta = text.number("swiglu_beta", default=1.0)
    return Activation(SWIGLUOAI, text.number("swiglu_alpha"), text.number("swiglu_limit"), beta)


def _selection(part: ConfigPart, keys: Mapping[str, str], init_blocks: int, kv_heads: int) -> SparseSpec:
    """keys: what `sparse_attention_config` calls a size -> its name in `part`."""
    part.expect(keys["sparse_num_index_heads"], kv_heads)
    return SparseSpec(
        index_heads=kv_heads,
        index_dim=part.count(keys["sparse_index_dim"]),
        block_size=part.count(keys["sparse_block_size"]),
        topk_blocks=part.count(keys["sparse_topk_blocks"]),
        local_blocks=part.count(keys["sparse_local_block"], least=0),
        init_blocks=init_blocks,
    )


def _vision_tensors(vision: ConfigPart, top: ConfigPart, hidden: int) -> dict[str, Expected]:
    """Vision tower, projector and patch merger, sized from vision_config."""
    width, inner, patch = (vision.count(key, MAX_SIZE) for key in ("hidden_size", "intermediate_size", "patch_size"))
    said = [p.part("img_token_compression_config") for p in (vision, top)]
    compression = next((part for part in said if part), vision)
    frames = compression.count("temporal_patch_size", 1024, default=2)
    merge = compression.count("spatial_merge_size", 1024, default=2)
    tower = "vision_tower.vision_model."
    conv = (width, vision.count("num_channels", 1024), frames, patch, patch)
    out: dict[str, Expected] = {f"{tower}embeddings.patch_embedding.weight": Expected(conv, float32=True)}

    def linear(module: str, rows: int, columns: int) -> None:
        out[f"{module}.weight"], out[f"{module}.bias"] = Expected((rows, columns)), Expected((rows,))

    def layer_norm(module: str) -> None:
        out[f"{module}.weight"] = out[f"{module}.bias"] = Expected((width,))

    layer_norm(f"{tower}pre_layrnorm")
    for layer in range(vision.count("num_hidden_layers", MAX_LAYERS)):
        prefix = f"{tower}encoder.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{prefix}self_attn.{part}", width, width)
        layer_norm(f"{prefix}layer_norm1")
        layer_norm(f"{prefix}layer_norm2")
        linear(f"{prefix}mlp.fc1", inner, width)
        linear(f"{prefix}mlp.fc2", width, inner)
    projector = top.count("projector_hidden_size", MAX_SIZE)
    linear("multi_modal_projector.linear_1", projector, width)
    linear("multi_modal_projector.linear_2", hidden, projector)
    linear("patch_merge_mlp.linear_1", projector, hidden * merge * merge)
    linear("patch_merge_mlp.linear_2", hidden, projector)
    return out
