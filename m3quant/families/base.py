"""What a model family states to the rest of m3quant. Torch-free; one file per architecture implements it.

A family is bound to one config.json, which it reads once into typed facts and one `LayerSpec` a layer. Tensor names and
shapes, roles, fused modules, folds and the KV geometry follow from those. Names are the on-disk names of the official releases.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from ..errors import CheckpointError
from .config import MAX_LAYERS, MAX_SIZE, MAX_VOCABULARY, REMEDY, ConfigPart
from .spec import SILU, Expected, LayerSpec, LayerTensor, MoeSpec, is_index, layer_tensors

# Roles a recipe may give a scheme to, in the order tables show them.
QUANTIZABLE = ("routed_experts", "shared_experts", "dense_mlp", "attention", "indexer")
# Roles that always stay as they are, each with the reason that plans and errors show.
KEPT = {
    "router": "vLLM builds the router without a quantization config, in float32",
    "router_bias": "float32 by the engines' contract; rounding it changes which experts are chosen",
    "norm": "vectors, read in full precision by every engine",
    "bias": "vectors, added in full precision by every engine",
    "embedding": "engines read token embeddings unquantized",
    "lm_head": "engines read the output head unquantized",
    "vision": "the vision tower is small and engines load it unquantized",
    "projector": "the multimodal projector is small and engines load it unquantized",
    "mtp": "multi-token-prediction weights are passed through byte for byte",
    "unknown": "not known to this family: passed through byte for byte",
}
# More than any layer has outside its experts, so that what a config promises can be bounded without listing it.
_PER_LAYER, _PER_VISION_LAYER, _OUTSIDE = 64, 32, 64
_MAX_TENSORS = 1_000_000  # listing as many takes seconds and some 300 MB; M3 has 24,000
# What is promised and absent is listed name by name, in so far as it can be a faulty copy of this model at all.
_TIMES_HELD, _SPARE = 4, 10_000
# Leaves next to a weight that no forward pass in full precision reads.
_SILENT_LEAVES = re.compile(
    r"(weight|input|output|[kqv]|prob)_?\w*(scale|zero_point)\w*|[kqv]_(scale|zero_point)|scales?"
)


@dataclass(frozen=True)
class Role:
    """What a tensor is. `kind` is one of QUANTIZABLE or KEPT; `part` is the projection (w1, q_proj, ...) or ''."""

    kind: str
    layer: int | None = None
    expert: int | None = None
    part: str = ""
    is_weight: bool = True  # False for a bias or another companion inside a quantizable module
    joined: bool = False  # one of `Family.joined`


@dataclass(frozen=True)
class EngineModule:
    """One module of the engine: the names its scheme is looked up under, and the on-disk modules it is filled from.

    vLLM asks for the scheme of `probes` (facts: fused names such as qkv_proj, expert 0 for a whole MoE layer) and
    loads all `members` into it, so that every member must have the one scheme that every probe resolves to.
    """

    probes: tuple[str, ...]
    members: tuple[str, ...]
    fused_name: str  # what a reader would call it, for error sentences


@dataclass(frozen=True)
class KvGeometry:
    """What the KV cache holds per token: heads and widths, and how many layers keep MSA index keys."""

    layers: int
    kv_heads: int
    head_dim: int
    index_layers: int = 0
    index_dim: int = 0

    def bytes_per_token(self, kv_bytes: float = 2, index_bytes: float = 2) -> float:
        """Unsharded bytes of KV and index cache for one token."""
        kv = 2 * self.layers * self.kv_heads * self.head_dim * kv_bytes
        return kv + self.index_layers * self.index_dim * index_bytes


@dataclass(frozen=True)
class InEngine:
    """What is particular to one family in one engine.

    flags: arguments of the server that the family needs, as in the official recipes. first_release: the oldest that has the
    architecture, '' where every known one does. refused_formats: output format -> why it cannot load the family in it, and
    what to use. reasoning_tokens: what the reasoning parser among the flags insists on in a
    tokenizer. probe_arguments: what a loading probe gives the engine in addition to the request. probe_norm: "module:class" of a
    norm of the engine's that has no plain fallback of its own. draft_settings: what a draft model of the family is started with in
    addition; draft_over_stages: whether the engine hands a draft the hidden states that other pipeline stages computed.
    """

    flags: tuple[str, ...] = ()
    first_release: str = ""
    refused_formats: Mapping[str, str] = field(default_factory=dict)
    reasoning_tokens: tuple[str, ...] = ()
    probe_arguments: Mapping[str, Any] = field(default_factory=dict)
    probe_norm: str = ""
    draft_settings: Mapping[str, Any] = field(default_factory=dict)
    draft_over_stages: bool = False


class Family(ABC):
    """One architecture, bound to one config.json. Subclasses read the config in `read_layers` and state what differs."""

    architectures: ClassVar[Mapping[str, str]]  # model_type -> the class that config.json names
    # role -> regexes for a quantization config; they match on-disk names, engine probes and merged names alike
    targets: ClassVar[Mapping[str, tuple[str, ...]]]
    # regexes of Linear modules that an engine must leave unquantized
    always_ignored: ClassVar[tuple[str, ...]]
    # `modules_to_not_convert` of the `fp8` format, as the official releases write it
    fp8_ignored: ClassVar[tuple[str, ...]]
    # `modules_to_not_convert` of the AutoAWQ format, which matches by substring, and what to add per kept role
    awq_ignored: ClassVar[tuple[str, ...]]
    awq_substrings: ClassVar[Mapping[str, tuple[str, ...]]]
    # engine's name -> what is particular to the family there
    engines: ClassVar[Mapping[str, InEngine]] = {}
    # What the language model's names begin with, its head's name, and the other towers by prefix.
    body: ClassVar[str] = "model."
    head_name: ClassVar[str] = "lm_head.weight"
    towers: ClassVar[Mapping[str, str]] = {}
    # What vLLM asks for the scheme of a layer's routed experts under, relative to the layer.
    expert_probes: ClassVar[tuple[str, ...]] = ()
    # (role, part) of weights that readers put below another of the layer and that store no `weight_shape` of their own. transformers 5.24
    # joins whatever begins with "gate_proj.weight" and "up_proj.weight" by rows, so that two shapes become one of four numbers; the
    # first one's states the columns of both, and engines do not read it.
    joined: ClassVar[frozenset[tuple[str, str]]] = frozenset()
    text_key: ClassVar[str | None] = None  # where config.json describes the language model, if not at its top

    def __init__(self, config: Mapping[str, Any], where: str = "config.json") -> None:
        """Read a config whose values `check_values` has passed. Raises CheckpointError naming the key."""
        self.config, self.where = config, where
        self.model_type = str(config.get("model_type"))
        top = ConfigPart(config, where)
        text = top if self.text_key is None else top.needed_part(self.text_key)
        for part in (top, text):
            part.part("quantization_config")
        self.hidden_size = text.count("hidden_size", MAX_SIZE)
        self.vocab_size = text.count("vocab_size", MAX_VOCABULARY)
        self.num_layers = text.count("num_hidden_layers", MAX_LAYERS)
        has_positions = text.has("max_position_embeddings")
        self.max_positions = text.count("max_position_embeddings", MAX_VOCABULARY) if has_positions else None
        self.eps = text.number("rms_norm_eps")
        self.tied = text.flag("tie_word_embeddings", False)
        self.num_vision_layers = 0
        self.layers: tuple[LayerSpec, ...] = tuple(self.read_layers(top, text))
        self.check_promised()

    @abstractmethod
    def read_layers(self, top: ConfigPart, text: ConfigPart) -> list[LayerSpec]:
        """One description a layer, from the whole config and its part on the language model.

        Every key that changes the forward pass is read, expected to have the one value that is computed, or refused
        (`ConfigPart.refuse_unknown`). Raises CheckpointError.
        """

    # --- names ---

    def layer_prefix(self, layer: int) -> str:
        """What the on-disk names of a layer begin with."""
        return f"{self.body}layers.{layer}."

    @property
    def embedding_name(self) -> str:
        return f"{self.body}embed_tokens.weight"

    @property
    def final_norm_name(self) -> str:
        return f"{self.body}norm.weight"

    def role(self, name: str) -> Role:
        """What the tensor of that on-disk name is. Layers past the last are multi-token prediction (engines drop them)."""
        if kind := self._outer.get(name):
            return Role(kind)
        for prefix, kind in self.towers.items():
            if name.startswith(prefix):
                return Role(kind)
        if ".mtp." in name or name.startswith("mtp."):
            return Role("mtp")
        before = f"{self.body}layers."
        index, _, rest = name.removeprefix(before).partition(".")
        if not name.startswith(before) or not rest or not is_index(index):
            return Role("unknown")
        layer = int(index)
        return Role("mtp") if layer >= self.num_layers else self._role_in_layer(layer, rest)

    def _role_in_layer(self, layer: int, rest: str) -> Role:
        known, moes = self._known_names
        if (tensor := known.get(rest)) is not None:
            return Role(tensor.kind, layer, part=tensor.part, joined=(tensor.kind, tensor.part) in self.joined)
        parts = rest.split(".", 5)
        for moe in moes:
            prefix = moe.experts_prefix
            number, _, tail = rest.removeprefix(prefix).partition(".")
            part, _, leaf = tail.partition(".")
            if rest.startswith(prefix) and is_index(number) and part in moe.parts and leaf:
                return Role("routed_experts", layer, int(number), part, leaf == "weight")
        for end in range(1, len(parts)):
            tensor = known.get(".".join(parts[:end]) + ".weight")
            if tensor is not None and tensor.kind in QUANTIZABLE:
                return Role(tensor.kind, layer, part=tensor.part, is_weight=False)
        return Role("unknown", layer)

    @cached_property
    def _outer(self) -> dict[str, str]:
        return {self.embedding_name: "embedding", self.head_name: "lm_head", self.final_norm_name: "norm"}

    @cached_property
    def _known_names(self) -> tuple[dict[str, LayerTensor], list[MoeSpec]]:
        """Names of all kinds of layers, experts left out, and the kinds of expert blocks."""
        kinds = {replace(spec, index=0) for spec in self.layers}
        moes = {spec.moe for spec in kinds if spec.moe}
        few = [replace(s, moe=replace(s.moe, num_experts=1) if s.moe else None) for s in kinds]
        known = {n: t for spec in few for n, t in layer_tensors(spec).items() if t.kind != "routed_experts"}
        return known, sorted(moes, key=repr)

    @cached_property
    def expected_tensors(self) -> dict[str, Expected]:
        """Every tensor that config.json promises, by on-disk name."""
        return self.expected_of(self.layers)

    def expected_of(self, layers: Iterable[LayerSpec]) -> dict[str, Expected]:
        """The tensors of these layers, and those that belong to no layer."""
        out = {
            self.embedding_name: Expected((self.vocab_size, self.hidden_size)),
            self.final_norm_name: Expected((self.hidden_size,)),
        }
        if not self.tied:
            out[self.head_name] = Expected((self.vocab_size, self.hidden_size))
        for spec in layers:
            prefix = self.layer_prefix(spec.index)
            out |= {f"{prefix}{name}": tensor.expected for name, tensor in layer_tensors(spec).items()}
        return out | self.other_tensors()

    def check_promised(self, held: int | None = None) -> None:
        """Raise CheckpointError for counts that promise far more tensors than the headers hold, before anything lists them.

        held: tensors in the headers; None for a config alone.
        """
        counts = {
            "num_hidden_layers": self.num_layers,
            "num_local_experts": self.moe.num_experts if self.moe else 0,
            "vision_config.num_hidden_layers": self.num_vision_layers,
        }
        experts = sum(spec.moe.num_experts for spec in self.layers if spec.moe)
        promised = _OUTSIDE + _PER_LAYER * self.num_layers + 3 * experts + _PER_VISION_LAYER * self.num_vision_layers
        limit = _MAX_TENSORS if held is None else min(_MAX_TENSORS, _TIMES_HELD * held + _SPARE)
        if promised > limit:
            named = ", ".join(f"{key} {value}" for key, value in counts.items() if value)
            known = "than any model has" if held is None else f"than the {held:,} in its shards allow"
            raise CheckpointError(f"{self.where}: {named} promise up to {promised:,} tensors, more {known}: {REMEDY}.")

    def other_tensors(self) -> dict[str, Expected]:
        """Tensors outside the language model (vision tower, projector)."""
        return {}

    def unread_companion(self, name: str) -> str | None:
        """Why a tensor that config.json does not promise would change what the model computes; None where it would not."""
        role = self.role(name)
        if role.is_weight or role.kind not in QUANTIZABLE or name in self.expected_tensors:
            return None
        leaf = name.rpartition(".")[2]
        if _SILENT_LEAVES.fullmatch(leaf):
            return None
        return f"'{name}' belongs to a {role.kind} projection, but config.json says nothing of a {leaf} there"

    # --- what the layers are ---

    @property
    def moe(self) -> MoeSpec | None:
        """The expert block of the first layer that has one; None for a dense model."""
        return next((spec.moe for spec in self.layers if spec.moe), None)

    @property
    def num_heads(self) -> int:
        return self.layers[0].num_heads

    @property
    def norm_one_plus(self) -> bool:
        """Norms multiply by (1 + w) instead of w."""
        return self.layers[0].norm_one_plus

    @property
    def pair_fold(self) -> bool:
        """Whether folding a scale from up into down is exact: a GLU that is linear in up."""
        return all(spec.activation.kind == SILU for spec in self.layers)

    @property
    def kv_geometry(self) -> KvGeometry:
        first = self.layers[0]
        sparse = [spec.sparse for spec in self.layers if spec.sparse]
        return KvGeometry(
            self.num_layers, first.num_kv_heads, first.head_dim, len(sparse), sparse[0].index_dim if sparse else 0
        )

    @property
    def selected_tokens(self) -> int:
        """Context that block-sparse attention reads whole: shorter ones never exercise its selection. 0 without it."""
        return max((s.sparse.topk_blocks * s.sparse.block_size for s in self.layers if s.sparse), default=0)

    def has_index_keys(self, layer: int) -> bool:
        """Whether this layer keeps MSA index keys in addition to its KV cache."""
        return self.layers[layer].sparse is not None

    # --- what engines call things ---

    def engine_modules(self) -> tuple[EngineModule, ...]:
        """The modules that vLLM builds of the quantizable weights, in layer order."""
        return self._engine_modules

    @cached_property
    def _engine_modules(self) -> tuple[EngineModule, ...]:
        return tuple(self._list_engine_modules())

    def _list_engine_modules(self) -> Iterator[EngineModule]:
        for spec in self.layers:
            prefix = self.layer_prefix(spec.index)
            attention = f"{prefix}self_attn."
            qkv = tuple(f"{attention}{part}_proj" for part in "qkv")
            index = tuple(f"{attention}index_{part}_proj" for part in "qk") if spec.sparse else ()
            names = "q, k, v, index_q, index_k" if index else "q, k, v"
            yield EngineModule((f"{attention}qkv_proj", *qkv), qkv + index, f"{attention}qkv_proj ({names})")
            yield EngineModule((f"{attention}o_proj",), (f"{attention}o_proj",), f"{attention}o_proj")
            moe, mlp = spec.moe, f"{prefix}mlp"
            if moe is not None:
                experts = f"{prefix}{moe.experts_prefix}"
                named = tuple(moe.parts[i] for i in (0, 2, 1))  # gate, down, up
                members = tuple(f"{experts}{e}.{part}" for e in range(moe.num_experts) for part in named)
                probes = tuple(f"{prefix}{probe}" for probe in self.expert_probes)
                listed = ", ".join(named)
                yield EngineModule(probes, members, f"{experts.removesuffix('.')} ({listed} of every expert)")
                if not moe.has_shared:
                    continue
                mlp = f"{prefix}{moe.shared_prefix}".removesuffix(".")
            pair = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
            yield EngineModule((f"{mlp}.gate_up_proj", *pair), pair, f"{mlp}.gate_up_proj (gate, up)")
            yield EngineModule((f"{mlp}.down_proj",), (f"{mlp}.down_proj",), f"{mlp}.down_proj")

    def in_engine(self, name: str) -> InEngine:
        """What is particular to this family in the engine of that name."""
        return self.engines.get(name, InEngine())

    def recipe_aliases(self, module: str) -> tuple[str, ...]:
        """Other names of an on-disk module (as in the transformers tree), for recipes written by regex."""
        return (module,)

    def engine_names(self, module: str) -> tuple[str, ...]:
        """The on-disk module name and the name vLLM gives the module, where an exact list must hold both."""
        return (module,)

    def optional_groups(self) -> tuple[str, ...]:
        """Roles that a checkpoint may lack altogether (a text-only copy without vision), but not in part."""
        return ()

    def layer(self, index: int) -> LayerSpec:
        """The description of one layer. Raises CheckpointError for a layer that does not exist."""
        if not 0 <= index < self.num_layers:
            raise CheckpointError(
                f"layer {index} does not exist: {self.where} says num_hidden_layers = {self.num_layers}: {REMEDY}."
            )
        return self.layers[index]
