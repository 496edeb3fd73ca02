"""The schemes that a config.json states, in the dialects that engines read. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..schemes import Scheme


def scheme_of_group(group: Mapping[str, Any]) -> Scheme:
    """The scheme of one compressed-tensors config group."""
    weights = group["weights"]
    if weights["type"] == "int":
        size = weights.get("group_size") if weights["strategy"] == "group" else None
        return Scheme("int", weights["num_bits"], size, weights["symmetric"])
    return Scheme("fp8", bits=8, block=weights["strategy"] == "block")


def config_schemes(config: Mapping[str, Any]) -> frozenset[Scheme]:
    """Every integer or FP8 scheme that a compressed-tensors or AutoAWQ checkpoint's config.json states, whoever wrote it.

    Groups of other kinds (FP4), and what is no scheme at all, are left out: what they mean is for the engine to say.
    """
    text = config.get("text_config")
    quantization = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, Mapping) else None
    )
    if not isinstance(quantization, Mapping):
        return frozenset()
    if quantization.get("quant_method") == "awq":
        groups: Any = {
            "awq": {
                "weights": {
                    "num_bits": quantization.get("bits"),
                    "type": "int",
                    "strategy": "group",
                    "symmetric": False,
                }
            }
        }
    else:
        groups = quantization.get("config_groups")
    found = set()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and _is_known(weights):
            found.add(scheme_of_group({"weights": weights}))
    return frozenset(found)


def _is_known(weights: Mapping[str, Any]) -> bool:
    size = weights.get("group_size")
    kinds = (type(weights.get("num_bits")), type(weights.get("symmetric")), type(weights.get("strategy")))
    if kinds != (int, bool, str) or not (size is None or type(size) is int):
        return False
    return weights.get("type") == "int" or (weights.get("type") == "float" and weights["num_bits"] == 8)
