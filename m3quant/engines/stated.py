"""The schemes and the KV cache that a config.json states, in the dialects that engines read. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..schemes import Scheme


def scheme_of_group(group: Mapping[str, Any]) -> Scheme:
    """The scheme of one compressed-tensors config group."""
    weights = group["weights"]
    if weights["type"] == "int":
        size = weights.get("group_size") if weights["strategy"] == "group" else None
        return Scheme("int", weights["num_bits"], size, weights["symmetric"])
    return Scheme("fp8", bits=8, block=weights["strategy"] == "block")


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json's `quantization_config`, at its top or in `text_config`; empty where there is none, or no object."""
    text = config.get("text_config")
    found = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, Mapping) else None
    )
    return found if isinstance(found, Mapping) else {}


def stated_cache(config: Mapping[str, Any]) -> str | None:
    """The KV cache's dtype that config.json asks for: "fp8", or another under the name it has there; None where it asks for none.

    compressed-tensors writes `kv_cache_scheme`, ModelOpt `kv_cache_quant_algo`. FP8 weights alone never mean an FP8 cache.
    """
    quantization = quantization_of(config)
    scheme = quantization.get("kv_cache_scheme")
    if isinstance(scheme, Mapping) and scheme.get("num_bits"):
        kind = scheme.get("type", "float")
        return "fp8" if (scheme["num_bits"], kind) == (8, "float") else f"{kind}{scheme['num_bits']}"
    algorithm = str(quantization.get("kv_cache_quant_algo") or "none").lower()
    return None if algorithm == "none" else algorithm


def config_schemes(config: Mapping[str, Any], about: Callable[[str], bool] | None = None) -> frozenset[Scheme]:
    """Every integer or FP8 scheme that a compressed-tensors or AutoAWQ checkpoint's config.json states, whoever wrote it.

    about: of a target, whether its group is asked for; AutoAWQ's one group has no targets and is left out then.

    Groups of other kinds (FP4), and what is no scheme at all, are left out: what they mean is for the engine to say.
    """
    quantization = quantization_of(config)
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
        if isinstance(weights, Mapping) and _is_known(weights) and (about is None or _names(group, about)):
            found.add(scheme_of_group({"weights": weights}))
    return frozenset(found)


def _names(group: Mapping[str, Any], about: Callable[[str], bool]) -> bool:
    targets = group.get("targets")
    return isinstance(targets, list) and any(isinstance(target, str) and about(target) for target in targets)


def _is_known(weights: Mapping[str, Any]) -> bool:
    size = weights.get("group_size")
    kinds = (type(weights.get("num_bits")), type(weights.get("symmetric")), type(weights.get("strategy")))
    if kinds != (int, bool, str) or not (size is None or type(size) is int):
        return False
    if weights.get("type") == "float":  # MXFP8 is 8 bits in groups
        return weights["num_bits"] == 8 and weights["strategy"] in ("channel", "block", "tensor")
    return weights.get("type") == "int"
