"""Model families by config.json's model_type and architectures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .base import KEPT, QUANTIZABLE, EngineModule, Expected, Family, Role
from .counts import check_config
from .minimax_m2 import MiniMaxM2
from .minimax_m3_vl import MiniMaxM3VL

FAMILIES: tuple[Family, ...] = (MiniMaxM2(), MiniMaxM3VL())


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a config. Raises CheckpointError that says which file to write for an
    unknown architecture, or which value no model has."""
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(f"{where}: 'architectures' is no list of names; restore the release's own config.json.")
    for family in FAMILIES:
        if model_type == family.model_type:
            if architectures and not set(architectures) & set(family.architectures):
                raise CheckpointError(
                    f"{where} says model_type '{model_type}' but architectures {architectures}: m3quant knows "
                    f"{list(family.architectures)} for it; restore the release's own config.json."
                )
            check_config(config, family.text_config(config), where)
            return family
    known = ", ".join(f"'{f.model_type}'" for f in FAMILIES)
    raise CheckpointError(
        f"{where} has model_type {model_type!r} (architectures {architectures}), which m3quant does not know "
        f"(known: {known}); to add it, write m3quant/families/{model_type or 'name'}.py with a Family and list it in "
        "m3quant/families/__init__.py."
    )


__all__ = ["FAMILIES", "KEPT", "QUANTIZABLE", "EngineModule", "Expected", "Family", "Role", "family_of"]
