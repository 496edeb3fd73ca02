"""What config.json says about each decoder layer: sizes, norms, activation, sparse attention, experts.

Everything is read from the original config.json (M2 flat, M3 with a text_config); no size is assumed here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from m3quant.calibration import ops
from m3quant.calibration.msa import SparseSpec
from m3quant.calibration.ops import Activation
from m3quant.errors import CheckpointError

EXPERTS = "block_sparse_moe.experts."


@dataclass(frozen=True)
class MoeSpec:
    """The mixture-of-experts block of a layer. Sizes are numbers of features."""

    num_experts: int
    top_k: int
    intermediate_size: int
    routed_scaling: float
    use_bias: bool
    shared_intermediate_size: int
    activation: Activation

    @property
    def has_shared(self) -> bool:
        return self.shared_intermediate_size > 0


@dataclass(frozen=True)
class LayerSpec:
    """What one decoder layer is, read from the original config.json. `config` is that whole dict."""

    index: int
    model_type: str
    hidden_size: int
    eps: float
    norm_one_plus: bool
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm_per_head: bool
    rotary_dim: int
    rope_theta: float
    sparse: SparseSpec | None
    moe: MoeSpec | None
    dense_intermediate_size: int
    activation: Activation
    config: dict[str, Any] = field(repr=False, compare=False)


class _Config:
    """Reads keys of config.json, and names a key that is missing or has a value that we do not compute."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise CheckpointError(
                f"config.json lacks {self.where}{key}, which the forward pass needs; take config.json from the "
                "original model repository"
            )
        return self.values[key]

    def at(self, key: str, index: int) -> Any:
        values = self.get(key)
        if not isinstance(values, list) or index >= len(values):
            raise CheckpointError(
                f"config.json's {self.where}{key} has no entry for layer {index}; it must list every layer"
            )
        return values[index]

    def expect(self, key: str, value: Any, default: Any = None) -> None:
        found = self.values.get(key, default)
        if found != value:
            raise CheckpointError(
                f"config.json says {self.where}{key} = {found!r}, but only {value!r} is implemented for this "
                "architecture; a model that differs needs its own layer maths in calibration/layers.py"
            )


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes the language model: `text_config` if there is one, or the whole."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def model_type(config: Mapping[str, Any]) -> str:
    """config.json's model_type, refused unless layers of it can be computed (CheckpointError)."""
    kind = config.get("model_type")
    if kind not in ("minimax_m2", "minimax_m3_vl"):
        raise CheckpointError(
            f"config.json says model_type = {kind!r}, but calibration computes layers of minimax_m2 and minimax_m3_vl; "
            "use a recipe without calibration, or write the layer maths in calibration/layers.py"
        )
    return str(kind)


def layer_spec(config: dict[str, Any], index: int) -> LayerSpec:
    """Describe layer `index` from the original config.json dict (M2 flat, M3 with text_config).

    Raises CheckpointError naming the key that is missing or has an unsupported value.
    """
    kind = model_type(config)
    m3 = kind == "minimax_m3_vl"
    text = _Config(text_config(config), "text_config." if m3 else "")
    layers = text.get("num_hidden_layers")
    if not 0 <= index < layers:
        raise CheckpointError(f"layer {index} does not exist: config.json says num_hidden_layers = {layers}")
    text.expect("use_qk_norm", True)
    text.expect("qk_norm_type", "per_head" if m3 else "per_layer")
    text.expect("attention_output_gate", False, default=False)
    activation = _activation(text)
    is_moe = bool(text.at("moe_layer_freq", index)) if m3 else True
    return LayerSpec(
        index=index,
        model_type=kind,
        hidden_size=text.get("hidden_size"),
        eps=text.get("rms_norm_eps"),
        norm_one_plus=bool(text.get("use_gemma_norm")) if m3 else False,
        num_heads=text.get("num_attention_heads"),
        num_kv_heads=text.get("num_key_value_heads"),
        head_dim=text.get("head_dim"),
        qk_norm_per_head=m3,
        rotary_dim=_rotary_dim(text),
        rope_theta=float(text.get("rope_theta")),
        sparse=_sparse(text, index) if m3 else None,
        moe=_moe(text, activation, m3) if is_moe else None,
        dense_intermediate_size=0 if is_moe else text.get("dense_intermediate_size"),
        activation=activation,
        config=config,
    )


def _rotary_dim(text: _Config) -> int:
    """How many channels of a head are rotated. Raises CheckpointError where config.json also says otherwise, or scales angles."""
    size, theta, head_dim = text.get("rotary_dim"), text.get("rope_theta"), text.get("head_dim")
    if type(size) is not int or size % 2 or not 0 < size <= head_dim or not _is_positive(theta):
        raise CheckpointError(
            f"config.json says {text.where}rotary_dim = {size!r} and rope_theta = {theta!r}, but an even number of a head's "
            f"{head_dim} channels is rotated, by a positive theta; take config.json from the original model repository"
        )
    for key in ("rope_scaling", "rope_parameters"):
        found = text.values.get(key) or {}
        if not isinstance(found, Mapping) or found.get("rope_type", found.get("type", "default")) != "default":
            raise CheckpointError(
                f"config.json says {text.where}{key} = {found!r}, but only unscaled rotary embedding is implemented for this "
                "architecture; a model that differs needs its own in calibration/attention.py"
            )
    nested = text.values.get("rope_parameters") or {}
    share = nested.get("partial_rotary_factor", text.values.get("partial_rotary_factor"))
    rotated = size if share is None else int(head_dim * share) if _is_positive(share) else share
    if rotated != size or nested.get("rope_theta", theta) != theta:
        raise CheckpointError(
            f"config.json says {text.where}rotary_dim = {size} and rope_theta = {theta}, but its other rotary settings "
            f"rotate {rotated!r} dimensions of a head by {nested.get('rope_theta', theta)!r}; take config.json from the "
            "original model repository"
        )
    return size


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _activation(text: _Config) -> Activation:
    kind = text.get("hidden_act")
    if kind == ops.SILU:
        return Activation(ops.SILU)
    text.expect("hidden_act", ops.SWIGLUOAI)
    # The first released config.json has no swiglu_beta; vLLM's and transformers' value is 1.0.
    beta = float(text.values.get("swiglu_beta", 1.0))
    return Activation(ops.SWIGLUOAI, float(text.get("swiglu_alpha")), float(text.get("swiglu_limit")), beta)


def _moe(text: _Config, activation: Activation, m3: bool) -> MoeSpec:
    text.expect("scoring_func", "sigmoid")
    shared = text.get("shared_intermediate_size") * text.get("n_shared_experts") if m3 else 0
    if not m3:
        text.expect("shared_intermediate_size", 0, default=0)
    return MoeSpec(
        num_experts=text.get("num_local_experts"),
        top_k=text.get("num_experts_per_tok"),
        intermediate_size=text.get("intermediate_size"),
        routed_scaling=float(text.get("routed_scaling_factor")) if m3 else 1.0,
        use_bias=bool(text.get("use_routing_bias")),
        shared_intermediate_size=shared,
        activation=activation,
    )


def _sparse(text: _Config, index: int) -> SparseSpec | None:
    sparse = _Config(text.get("sparse_attention_config"), f"{text.where}sparse_attention_config.")
    if not (sparse.get("use_sparse_attention") and sparse.at("sparse_attention_freq", index)):
        return None
    sparse.expect("sparse_score_type", "max")
    heads = sparse.get("sparse_num_index_heads")
    sparse.expect("sparse_num_index_heads", text.get("num_key_value_heads"))
    if not sparse.at("sparse_disable_index_value", index):
        raise CheckpointError(
            f"layer {index} asks for index values (sparse_disable_index_value = 0); none are released"
        )
    return SparseSpec(
        index_heads=heads,
        index_dim=sparse.get("sparse_index_dim"),
        block_size=sparse.get("sparse_block_size"),
        topk_blocks=sparse.get("sparse_topk_blocks"),
        local_blocks=sparse.get("sparse_local_block"),
        init_blocks=sparse.get("sparse_init_block"),
    )


def layer_shapes(spec: LayerSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that the layer's forward pass reads: name relative to the layer prefix -> shape."""
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    kv = spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, heads),
        "self_attn.q_norm.weight": (spec.head_dim if spec.qk_norm_per_head else heads,),
        "self_attn.k_norm.weight": (spec.head_dim if spec.qk_norm_per_head else kv,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if spec.sparse:
        dim = spec.sparse.index_dim
        shapes["self_attn.index_q_proj.weight"] = (spec.sparse.index_heads * dim, hidden)
        shapes["self_attn.index_k_proj.weight"] = (dim, hidden)
        shapes["self_attn.index_q_norm.weight"] = shapes["self_attn.index_k_norm.weight"] = (dim,)
    if spec.moe is None:
        return shapes | _mlp_shapes("mlp.", hidden, spec.dense_intermediate_size)
    shapes["block_sparse_moe.gate.weight"] = (spec.moe.num_experts, hidden)
    if spec.moe.use_bias:
        shapes["block_sparse_moe.e_score_correction_bias"] = (spec.moe.num_experts,)
    inner = spec.moe.intermediate_size
    for expert in range(spec.moe.num_experts):
        shapes[f"{EXPERTS}{expert}.w1.weight"] = shapes[f"{EXPERTS}{expert}.w3.weight"] = (inner, hidden)
        shapes[f"{EXPERTS}{expert}.w2.weight"] = (hidden, inner)
    if spec.moe.has_shared:
        shapes |= _mlp_shapes("block_sparse_moe.shared_experts.", hidden, spec.moe.shared_intermediate_size)
    return shapes


def _mlp_shapes(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }
