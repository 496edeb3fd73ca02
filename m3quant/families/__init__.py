"""Model families by config.json's model_type and architectures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .base import KEPT, QUANTIZABLE, EngineModule, Family, InEngine, Role
from .config import REMEDY, check_values, shown
from .llama import Llama
from .minimax_m2 import MiniMaxM2
from .minimax_m3_vl import MiniMaxM3VL
from .qwen3_moe import Qwen3Moe
from .spec import Expected, LayerSpec

FAMILIES: tuple[type[Family], ...] = (MiniMaxM2, MiniMaxM3VL, Llama, Qwen3Moe)


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a config, bound to it. Raises CheckpointError that names the value no model has or that is not
    computed, and for an unknown architecture says which file to write."""
    check_values(config, where)
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(f"{where}: 'architectures' is no list of names; restore the release's own config.json.")
    for family in FAMILIES:
        known = family.architectures.get(model_type) if isinstance(model_type, str) else None
        if known is None:
            continue
        if architectures and known not in architectures:
            raise CheckpointError(
                f"{where} says model_type '{model_type}' but architectures {shown(architectures)}: m3quant knows "
                f"['{known}'] for it; restore the release's own config.json."
            )
        return family(config, where)
    names = ", ".join(f"'{name}'" for family in FAMILIES for name in family.architectures)
    raise CheckpointError(
        f"{where} has model_type {shown(model_type)} (architectures {shown(architectures)}), which m3quant does not know "
        f"(known: {names}); to add it, write a file in m3quant/families with a Family and list it in "
        "m3quant/families/__init__.py."
    )


__all__ = [
    "FAMILIES", "KEPT", "QUANTIZABLE", "REMEDY", "EngineModule", "Expected", "Family", "InEngine", "LayerSpec", "Role", "family_of",
]  # fmt: skip
