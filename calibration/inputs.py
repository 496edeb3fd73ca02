"""What a layer's products read: the activations of which linears an engine rounds, and how its cache rounds keys and values.

Which scheme a weight has decides (`Scheme.activations`); nothing else does. An engine rounds the input of a fused weight
(q, k, v and the index projections; gate and up of all experts) once, for all its parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from m3quant.errors import CalibrationError
from m3quant.families.spec import LayerSpec, always_on_names, expert_names
from m3quant.quant.activations import round_activations, round_cached
from m3quant.schemes import KEEP, Activations, Scheme

_KV_SCALE = re.compile(r"self_attn\.(?:\w+\.)?([kv])_scale")


class Inputs:
    """One tensor that several products read, rounded once for each way in which they read it."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        self._rounded: dict[Activations, torch.Tensor] = {}

    def under(self, activations: Activations | None) -> torch.Tensor:
        if activations is None:
            return self.x
        if activations not in self._rounded:
            self._rounded[activations] = round_activations(self.x, activations)
        return self._rounded[activations]


@dataclass(frozen=True)
class Rounding:
    """The activation rounding of one layer. by_name: of every weight but the routed experts'; experts: (w1 and w3, w2)."""

    by_name: Mapping[str, Activations] = field(default_factory=dict)
    experts: tuple[Activations | None, Activations | None] = (None, None)

    @classmethod
    def of(cls, spec: LayerSpec, schemes: Mapping[str, Scheme]) -> Rounding:
        """schemes: by weight name relative to the layer; a name without one reads unrounded activations.

        Raises CalibrationError where weights that an engine fuses would read one input rounded in two ways.
        """
        experts = expert_names(spec)
        normed = [name for gate, up, _ in experts for name in (gate, up)]
        gated = [down for _, _, down in experts]
        others = schemes.keys() - {*normed, *gated}
        by_name = {name: kind for name in others if (kind := schemes[name].activations)}
        always_on = always_on_names(spec)
        if always_on:
            _one_of(spec, schemes, always_on[:2])
        return cls(by_name, (_one_of(spec, schemes, normed), _one_of(spec, schemes, gated)))


def _one_of(spec: LayerSpec, schemes: Mapping[str, Scheme], names: list[str] | tuple[str, ...]) -> Activations | None:
    kinds = {schemes.get(name, KEEP).activations for name in names}
    if len(kinds) > 1:
        raise CalibrationError(
            f"layer {spec.index}: {names[0]} and others like it read one input, but their schemes round it differently; "
            "engines fuse them: give them one scheme."
        )
    return kinds.pop() if kinds else None


@dataclass(frozen=True)
class Cache:
    """How keys after the rotary embedding, values, and index keys (with the queries that meet them) are rounded.

    kv, index: whether to E4M3. k_scale, v_scale: of the KV cache, one number or one per KV head; 1 unless the checkpoint has
    its own. Index keys have no scale (vLLM 0.32, models/minimax_m3/common/indexer.py).
    """

    kv: bool = False
    index: bool = False
    k_scale: torch.Tensor | float = 1.0
    v_scale: torch.Tensor | float = 1.0

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        """k [S, kv heads, L, D] as attention finds it in the cache."""
        return round_cached(k, self.k_scale) if self.kv else k

    def values(self, v: torch.Tensor) -> torch.Tensor:
        return round_cached(v, self.v_scale) if self.kv else v

    def indices(self, x: torch.Tensor) -> torch.Tensor:
        """Index queries or keys [S, heads, L, D]: the engine's score kernel reads both in the cache's dtype."""
        return round_cached(x) if self.index else x


def cache_scales(spec: LayerSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The `k_scale` and `v_scale` [heads or 1, 1, 1] float32 among a layer's tensors, under any of the names that vLLM knows.

    A scale that is not positive means none, as in vLLM (quantization/kv_cache.py). Raises CalibrationError for a
    shape that fits neither the layer nor its KV heads.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        match = _KV_SCALE.fullmatch(name)
        if match is None:
            continue
        scale = tensor.float().flatten()
        if len(scale) not in (1, spec.num_kv_heads) or not bool(torch.isfinite(scale).all()):
            raise CalibrationError(
                f"layer {spec.index}: {name} holds {tuple(tensor.shape)} numbers, not one or one per KV head "
                f"({spec.num_kv_heads}), or one that is not finite: restore the checkpoint's cache scales."
            )
        if bool((scale > 0).all()):
            found[f"{match[1]}_scale"] = scale.view(-1, 1, 1)
    return found
