"""How vLLM finds a module's scheme in `quantization_config`, so that it can be compared with the files.

compressed_tensors/utils.py `find_matched_target` and `should_ignore_layer`, quant_utils `is_layer_skipped`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import PlanError
from ...families import Family
from ...schemes import KEEP, Scheme
from ..stated import scheme_of_group

# `packed_modules_mapping` of vLLM's models.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def resolve(config: Mapping[str, Any], probe: str, expert: bool = False) -> Scheme:
    """The scheme that vLLM's lookup gives to the module called `probe`; KEEP where it stays unquantized."""
    method = config.get("quant_method")
    if method == "compressed-tensors":
        if any(_matches(probe, pattern) for pattern in config.get("ignore") or ()):
            return KEEP
        for group in config["config_groups"].values():
            if any(_matches(probe, target) for target in group["targets"]):
                return scheme_of_group(group)
        return KEEP
    ignored = config.get("modules_to_not_convert") or config.get("ignored_layers") or []
    if method == "awq":
        if any(entry in probe for entry in ignored):
            return KEEP
        size = config["group_size"]
        return Scheme("int", config["bits"], None if size == -1 else size, symmetric=False)
    if method == "fp8":
        return KEEP if _fp8_skipped(probe, ignored, expert) else Scheme("fp8", bits=8, block=True)
    raise PlanError(f"quantization_config has quant_method {method!r}, which m3quant does not write.")


def _fp8_skipped(probe: str, ignored: Iterable[str], expert: bool) -> bool:
    """vLLM's `is_layer_skipped`: a fused name is skipped if it is listed itself, or if all its parts are."""
    listed = set(ignored)
    if expert:
        return any(_parent(probe) in entry for entry in listed if "experts" in entry)
    parent, _, leaf = probe.rpartition(".")
    parts = _FUSED.get(leaf)
    return probe in listed or (parts is not None and all(f"{parent}.{part}" in listed for part in parts))


def _parent(probe: str) -> str:
    """'…experts.0.w1' -> '…experts': vLLM looks a whole MoE layer up under the name of its list of experts."""
    return probe.rsplit(".", 2)[0]


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern


def lookup_problems(family: Family, qconfig: Mapping[str, Any], modules: Mapping[str, Scheme]) -> list[str]:
    """Where vLLM's view of the checkpoint differs from the schemes of `modules`; empty when it loads as meant.

    Checks what vLLM demands of a layer: members of one fused module share a scheme, and every name under
    which the engine looks that module up resolves to it.
    """
    problems = []
    zero_point_only = qconfig.get("quant_method") == "awq"
    for module in family.engine_modules():
        # By identity first: hashing 47,000 schemes of M2's experts takes longer than all the rest.
        found = {id(scheme): scheme for scheme in map(modules.get, module.members) if scheme is not None}
        schemes = set(found.values())
        if len(schemes) > 1:
            example = {scheme.name: next(m for m in module.members if modules.get(m) == scheme) for scheme in schemes}
            listed = ", ".join(f"{name} ({member})" for name, member in sorted(example.items()))
            problems.append(
                f"{module.fused_name} is one module in the engine but has several schemes: {listed}. Give them one scheme, or keep all of them."
            )
            continue
        if not schemes:
            continue
        planned = schemes.pop()
        for probe in module.probes:
            seen = resolve(qconfig, probe, expert=".experts." in probe and "shared" not in probe)
            same = seen == planned or (
                zero_point_only and seen.quantizes and seen.group_size == planned.group_size and planned.quantizes
            )
            if not same:
                problems.append(
                    f"the engine looks up {probe} and finds {seen}, but {module.fused_name} is stored as {planned}: quantization_config's targets are wrong."
                )
    return problems
