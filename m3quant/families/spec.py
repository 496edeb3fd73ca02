"""What a decoder layer is, in one form for every architecture: sizes, norms, attention, router, activation. Torch-free.

A family makes one `LayerSpec` a layer from config.json; tensor names, shapes and roles follow from it here, once.
Names are relative to the layer's prefix and those of the official releases on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

SILU = "silu"
SWIGLUOAI = "swigluoai"

INPUT_NORM = "input_layernorm.weight"
MLP_NORM = "post_attention_layernorm.weight"
# The three stacks of a layer's routed experts: gate, up, down.
STACKS = ("w1", "w3", "w2")


@dataclass(frozen=True)
class Activation:
    """The gate of a GLU MLP. `alpha`, `limit` and `beta` are read only for kind "swigluoai"."""

    kind: str = SILU
    alpha: float = 1.702
    limit: float = 7.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in (SILU, SWIGLUOAI):
            raise ValueError(f"unknown activation kind {self.kind!r}: expected {SILU!r} or {SWIGLUOAI!r}")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: `size` channels of a head are turned, by frequencies theta^(-2i/size), scaled as `kind` says.

    kind: "default"; "linear" (all frequencies / factor); "llama3" (low ones / factor, up to `low` and from `high` turns in
    `original` positions, interpolated between). Formulas: transformers' modeling_rope_utils.
    """

    size: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


@dataclass(frozen=True)
class SparseSpec:
    """Block selection of MiniMax Sparse Attention. Sizes are in tokens, except `*_blocks`."""

    index_heads: int
    index_dim: int
    block_size: int
    topk_blocks: int
    local_blocks: int
    init_blocks: int

    def covers(self, window: int) -> bool:
        """Whether every causal block of a window of this many tokens is always selected (plain causal attention)."""
        return window <= self.topk_blocks * self.block_size


@dataclass(frozen=True)
class MoeSpec:
    """The mixture-of-experts block of a layer. Sizes are numbers of features.

    router: the kind, a module of `m3quant.calibration.routers`. normalise: weights of the chosen experts sum to 1 before
    scaling. router_float32: the releases store router and bias in float32. block: what the names of the block begin with;
    parts: what an expert's gate, up and down projections are called.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    routed_scaling: float
    use_bias: bool
    shared_intermediate_size: int
    activation: Activation
    router: str = "sigmoid"
    normalise: bool = True
    router_float32: bool = True
    block: str = "block_sparse_moe."
    parts: tuple[str, str, str] = STACKS

    @property
    def has_shared(self) -> bool:
        return self.shared_intermediate_size > 0

    @property
    def router_name(self) -> str:
        return f"{self.block}gate.weight"

    @property
    def bias_name(self) -> str:
        return f"{self.block}e_score_correction_bias"

    @property
    def experts_prefix(self) -> str:
        return f"{self.block}experts."

    @property
    def shared_prefix(self) -> str:
        return f"{self.block}shared_experts."

    def expert_name(self, expert: int, which: str) -> str:
        """The weight of one routed expert. which: "w1" (gate), "w3" (up) or "w2" (down), whatever the disk calls it."""
        return f"{self.block}experts.{expert}.{self.parts[STACKS.index(which)]}.weight"

    def expert_of(self, name: str) -> tuple[int, str] | None:
        """(expert, stack) of a routed expert's weight; None for any other name."""
        if not name.startswith(self.experts_prefix):
            return None
        pieces = name.removeprefix(self.experts_prefix).split(".", 2)
        if len(pieces) != 3 or pieces[2] != "weight" or pieces[1] not in self.parts or not is_index(pieces[0]):
            return None
        return int(pieces[0]), STACKS[self.parts.index(pieces[1])]


@dataclass(frozen=True)
class LayerSpec:
    """What one decoder layer is.

    qk_norm: RMSNorm of queries and keys, over each head, over all heads together ("whole"), or none. biased: the
    projections that add a bias. sparse: block selection, None for full causal attention. moe: None for a dense layer,
    whose MLP has `dense_intermediate_size`.
    """

    index: int
    hidden_size: int
    eps: float
    norm_one_plus: bool
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: Literal["per_head", "whole", "none"]
    rope: Rope
    sparse: SparseSpec | None
    moe: MoeSpec | None
    dense_intermediate_size: int
    activation: Activation
    biased: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expected:
    """A tensor that config.json promises: shape, and whether the official release stores it in float32."""

    shape: tuple[int, ...]
    float32: bool = False


@dataclass(frozen=True)
class LayerTensor:
    """A tensor of a layer: what is promised of it, and its role: one of QUANTIZABLE or KEPT, and the projection's name."""

    expected: Expected
    kind: str
    part: str = ""


def layer_tensors(spec: LayerSpec) -> dict[str, LayerTensor]:
    """Every tensor that the layer's forward pass reads, by relative name, in the order of the layer."""
    return dict(_tensors(spec))


def layer_shapes(spec: LayerSpec) -> dict[str, tuple[int, ...]]:
    """Relative name -> shape of every tensor that the layer's forward pass reads."""
    return {name: tensor.expected.shape for name, tensor in _tensors(spec)}


def _tensors(spec: LayerSpec) -> Iterator[tuple[str, LayerTensor]]:
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    kv = spec.num_kv_heads * spec.head_dim
    yield INPUT_NORM, LayerTensor(Expected((hidden,)), "norm")
    for part, shape in (
        ("q_proj", (heads, hidden)),
        ("k_proj", (kv, hidden)),
        ("v_proj", (kv, hidden)),
        ("o_proj", (hidden, heads)),
    ):
        yield from _linear(spec, "attention", "self_attn.", part, shape)
    if spec.qk_norm != "none":
        whole = spec.qk_norm == "whole"
        yield "self_attn.q_norm.weight", LayerTensor(Expected((heads if whole else spec.head_dim,)), "norm")
        yield "self_attn.k_norm.weight", LayerTensor(Expected((kv if whole else spec.head_dim,)), "norm")
    yield MLP_NORM, LayerTensor(Expected((hidden,)), "norm")
    if spec.sparse:
        dim = spec.sparse.index_dim
        yield from _linear(spec, "indexer", "self_attn.", "index_q_proj", (spec.sparse.index_heads * dim, hidden))
        yield from _linear(spec, "indexer", "self_attn.", "index_k_proj", (dim, hidden))
        for which in "qk":
            yield f"self_attn.index_{which}_norm.weight", LayerTensor(Expected((dim,)), "norm")
    if spec.moe is None:
        yield from _mlp(spec, "dense_mlp", "mlp.", spec.dense_intermediate_size)
        return
    moe = spec.moe
    yield moe.router_name, LayerTensor(Expected((moe.num_experts, hidden), moe.router_float32), "router")
    if moe.use_bias:
        yield moe.bias_name, LayerTensor(Expected((moe.num_experts,), moe.router_float32), "router_bias")
    inward, outward = Expected((moe.intermediate_size, hidden)), Expected((hidden, moe.intermediate_size))
    shapes = zip(moe.parts, (inward, inward, outward), strict=True)
    parts = [(part, LayerTensor(expected, "routed_experts", part)) for part, expected in shapes]
    for expert in range(moe.num_experts):
        for part, tensor in parts:
            yield f"{moe.block}experts.{expert}.{part}.weight", tensor
    if moe.has_shared:
        yield from _mlp(spec, "shared_experts", moe.shared_prefix, moe.shared_intermediate_size)


def _mlp(spec: LayerSpec, kind: str, prefix: str, inner: int) -> Iterator[tuple[str, LayerTensor]]:
    for part, shape in (
        ("gate_proj", (inner, spec.hidden_size)),
        ("up_proj", (inner, spec.hidden_size)),
        ("down_proj", (spec.hidden_size, inner)),
    ):
        yield from _linear(spec, kind, prefix, part, shape)


def _linear(
    spec: LayerSpec, kind: str, prefix: str, part: str, shape: tuple[int, int]
) -> Iterator[tuple[str, LayerTensor]]:
    yield f"{prefix}{part}.weight", LayerTensor(Expected(shape), kind, part)
    if part in spec.biased:
        yield f"{prefix}{part}.bias", LayerTensor(Expected(shape[:1]), "bias", part)


def expert_names(spec: LayerSpec) -> list[tuple[str, str, str]]:
    """(gate, up, down) of every routed expert, in expert order; empty for a dense layer."""
    moe = spec.moe
    if moe is None:
        return []
    names = [tuple(moe.expert_name(expert, which) for which in STACKS) for expert in range(moe.num_experts)]
    return [(gate, up, down) for gate, up, down in names]


def always_on_names(spec: LayerSpec) -> tuple[str, str, str] | None:
    """(gate, up, down) of the MLP that sees every token: shared expert or dense MLP; None if there is none."""
    if spec.moe is None:
        prefix = "mlp."
    elif spec.moe.has_shared:
        prefix = spec.moe.shared_prefix
    else:
        return None
    return (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight", f"{prefix}down_proj.weight")


def is_index(text: str) -> bool:
    """Whether `text` is how names count layers and experts: ASCII digits, no leading zero, short enough to be one."""
    return len(text) <= 6 and text.isascii() and text.isdigit() and (text == "0" or text[0] != "0")
