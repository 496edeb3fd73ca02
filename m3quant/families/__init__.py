"""Model families by config.json's model_type and architectures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .base import KEPT, QUANTIZABLE, EngineModule, Expected, Family, Role
from .minimax_m2 import MiniMaxM2
from .minimax_m3_vl import MiniMaxM3VL

FAMILIES: tuple[Family, ...] = (MiniMaxM2(), MiniMaxM3VL())


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a config. Raises CheckpointError that says which file to write for an unknown architecture."""
    model_type, architectures = config.get("model_type"), tuple(config.get("architectures") or ())
    for family in FAMILIES:
        if model_type == family.model_type:
            if architectures and not set(architectures) & set(family.architectures):
                raise CheckpointError(
                    f"{where} says model_type '{model_type}' but architectures {list(architectures)}: m3quant knows "
                    f"{list(family.architectures)} for it; restore the release's own config.json."
                )
            return family
    known = ", ".join(f"'{f.model_type}'" for f in FAMILIES)
    raise CheckpointError(
        f"{where} has model_type {model_type!r} (architectures {list(architectures)}), which m3quant does not know "
        f"(known: {known}); to add it, write m3quant/families/{model_type or 'name'}.py with a Family and list it in "
        "m3quant/families/__init__.py."
    )


__all__ = ["FAMILIES", "KEPT", "QUANTIZABLE", "EngineModule", "Expected", "Family", "Role", "family_of"]
