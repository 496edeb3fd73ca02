"""What a model family tells the rest of m3quant about its tensors. Torch-free; one file per architecture implements it.

A family reads every count from config.json. Names are the on-disk names of the official releases.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..schemes import Scheme

# Roles a recipe may give a scheme to, in the order tables show them.
QUANTIZABLE = ("routed_experts", "shared_experts", "dense_mlp", "attention", "indexer")
# Roles that always stay as they are, each with the reason that plans and errors show.
KEPT = {
    "router": "vLLM builds the router without a quantization config, in float32",
    "router_bias": "float32 by the engines' contract; rounding it changes which experts are chosen",
    "norm": "vectors, read in full precision by every engine",
    "embedding": "engines read token embeddings unquantized",
    "lm_head": "engines read the output head unquantized",
    "vision": "the vision tower is small and engines load it unquantized",
    "projector": "the multimodal projector is small and engines load it unquantized",
    "mtp": "multi-token-prediction weights are passed through byte for byte",
    "unknown": "not known to this family: passed through byte for byte",
}


@dataclass(frozen=True)
class Role:
    """What a tensor is. `kind` is one of QUANTIZABLE or KEPT; `part` is the projection (w1, q_proj, ...) or ''."""

    kind: str
    layer: int | None = None
    expert: int | None = None
    part: str = ""
    is_weight: bool = True  # False for a bias or another companion inside a quantizable module


@dataclass(frozen=True)
class Expected:
    """A tensor that config.json promises: shape, and whether the official release stores it in float32."""

    shape: tuple[int, ...]
    float32: bool = False


@dataclass(frozen=True)
class EngineModule:
    """One module of the engine: the names its scheme is looked up under, and the on-disk modules it is filled from.

    vLLM asks for the scheme of `probes` (facts: fused names such as qkv_proj, expert 0 for a whole MoE layer) and
    loads all `members` into it, so that every member must have the one scheme that every probe resolves to.
    """

    probes: tuple[str, ...]
    members: tuple[str, ...]
    fused_name: str  # what a person would call it, for error sentences


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


class Family(ABC):
    """One architecture: names, roles, fusion rules, exact folds and geometry. Stateless."""

    model_type: str
    architectures: tuple[str, ...]
    # role -> regexes for a quantization config; they match on-disk names, engine probes and merged names alike
    targets: Mapping[str, tuple[str, ...]]
    # regexes of Linear modules that an engine must be told to leave alone
    always_ignored: tuple[str, ...]
    # `modules_to_not_convert` of the `fp8` format, as the official releases write it
    fp8_ignored: tuple[str, ...]
    # `modules_to_not_convert` of the AutoAWQ format, which matches by substring, and what to add per kept role
    awq_ignored: tuple[str, ...]
    awq_substrings: Mapping[str, tuple[str, ...]]
    refused_formats: Mapping[str, str]  # output format -> why engines cannot load this family in it, and what to use
    # flags that `vllm serve` needs for this family, as in the official recipes, and the first release that has the model
    serve_flags: tuple[str, ...] = ()
    sglang_flags: tuple[str, ...] = ()
    reasoning_tokens: tuple[str, ...] = ()  # the reasoning parser refuses a tokenizer without them
    min_vllm: str = ""
    norm_one_plus: bool  # norms multiply by (1 + w) instead of w
    pair_fold: bool  # w3 -> w2 per expert is exact (plain SiLU GLU only)

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        return config

    @abstractmethod
    def num_layers(self, config: Mapping[str, Any]) -> int: ...

    @abstractmethod
    def layer_prefix(self, layer: int) -> str: ...

    @abstractmethod
    def role(self, name: str) -> Role: ...

    @abstractmethod
    def expected_tensors(self, config: Mapping[str, Any]) -> dict[str, Expected]: ...

    @abstractmethod
    def engine_modules(self, config: Mapping[str, Any]) -> Iterator[EngineModule]: ...

    @abstractmethod
    def kv_geometry(self, config: Mapping[str, Any]) -> KvGeometry: ...

    def selected_tokens(self, config: Mapping[str, Any]) -> int:
        """Context that block-sparse attention reads whole: shorter ones never exercise its selection. 0 without it."""
        return 0

    def has_index_keys(self, config: Mapping[str, Any], layer: int) -> bool:
        """Whether this layer keeps MSA index keys beside its KV cache."""
        return False

    @abstractmethod
    def recipe_aliases(self, module: str) -> tuple[str, ...]:
        """Other names of an on-disk module (as in the transformers tree), for recipes written by regex."""

    @abstractmethod
    def engine_names(self, module: str) -> tuple[str, ...]:
        """The on-disk module name and the name vLLM gives the module, where an exact list must hold both."""

    def engine_notes(self, routed_experts: Collection[Scheme], fmt: str) -> tuple[str, ...]:
        """What a person must know of engine releases before serving routed experts in these schemes."""
        return ()

    @abstractmethod
    def optional_groups(self) -> tuple[str, ...]:
        """Roles that a checkpoint may lack altogether (a text-only copy without vision), but not in part."""


def need(config: Mapping[str, Any], key: str, where: str = "config.json") -> Any:
    """config[key], or a CheckpointError that names the key."""
    if key not in config or config[key] is None:
        raise CheckpointError(
            f"{where} has no '{key}': copy the original config.json of the release beside the weights."
        )
    return config[key]
