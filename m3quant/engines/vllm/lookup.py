"""How vLLM finds a module's scheme in `quantization_config`, so that it can be compared with the files.

compressed_tensors/utils.py `find_matched_target` and `should_ignore_layer`, quant_utils `is_layer_skipped`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...checkpoint.name_list import NameList
from ...checkpoint.patterns import Allowance
from ...errors import PlanError
from ...families import Family
from ...schemes import KEEP, Scheme
from ..stated import scheme_of_group

# `packed_modules_mapping` of vLLM's models.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_REMEDY = "The source has too many tensors that are none of its architecture's: remove them, or restore the release's own files."


class Lookup:
    """The schemes that vLLM finds for names in a `quantization_config` that m3quant wrote.

    Its ignore list names every module of a source that no recipe knows, of which there may be any number: raises PlanError where comparing
    them takes longer than `Allowance` lets it, and for a method that m3quant does not write.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config, self._method = config, config.get("quant_method")
        if self._method not in ("compressed-tensors", "awq", "fp8"):
            raise PlanError(f"quantization_config has quant_method {self._method!r}, which m3quant does not write.")
        packed = self._method == "compressed-tensors"
        ignored = (
            config.get("ignore") if packed else config.get("modules_to_not_convert") or config.get("ignored_layers")
        )
        self._allowance = Allowance("quantization_config", _REMEDY, PlanError)
        self._ignored = NameList(ignored or (), self._allowance, regexes=packed)
        self._groups = [
            (NameList(group["targets"], self._allowance, regexes=True), scheme_of_group(group))
            for group in (config["config_groups"].values() if packed else ())
        ]
        self._experts = [entry for entry in sorted(self._ignored.exact) if "experts" in entry]
        self._skipped_experts: dict[str, bool] = {}

    def scheme(self, probe: str, expert: bool = False) -> Scheme:
        """The scheme that vLLM's lookup gives to the module called `probe`; KEEP where it stays unquantized."""
        if self._method == "compressed-tensors":
            if self._ignored.names(probe):
                return KEEP
            return next((scheme for targets, scheme in self._groups if targets.names(probe)), KEEP)
        if self._method == "awq":
            if self._ignored.has_piece(probe):
                return KEEP
            size = self._config["group_size"]
            return Scheme("int", self._config["bits"], None if size == -1 else size, symmetric=False)
        return KEEP if self._fp8_skipped(probe, expert) else Scheme("fp8", bits=8, block=True)

    def _fp8_skipped(self, probe: str, expert: bool) -> bool:
        """vLLM's `is_layer_skipped`: a fused name is skipped if it is listed itself, or if all its parts are."""
        listed = self._ignored.exact
        if expert:
            experts = _parent(probe)
            if experts not in self._skipped_experts:
                entries = self._allowance.timed(self._experts)
                self._skipped_experts[experts] = any(experts in entry for entry in entries)
            return self._skipped_experts[experts]
        parent, _, leaf = probe.rpartition(".")
        parts = _FUSED.get(leaf)
        return probe in listed or (parts is not None and all(f"{parent}.{part}" in listed for part in parts))


def _parent(probe: str) -> str:
    """'…experts.0.w1' -> '…experts': vLLM looks a whole MoE layer up under the name of its list of experts."""
    return probe.rsplit(".", 2)[0]


def lookup_problems(family: Family, qconfig: Mapping[str, Any], modules: Mapping[str, Scheme]) -> list[str]:
    """Where vLLM's view of the checkpoint differs from the schemes of `modules`; empty when it loads as meant.

    Checks what vLLM demands of a layer: members of one fused module share a scheme, and every name under
    which the engine looks that module up resolves to it.
    """
    problems = []
    lookup = Lookup(qconfig)
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
            seen = lookup.scheme(probe, expert=".experts." in probe and "shared" not in probe)
            same = seen == planned or (
                zero_point_only and seen.quantizes and seen.group_size == planned.group_size and planned.quantizes
            )
            if not same:
                problems.append(
                    f"the engine looks up {probe} and finds {seen}, but {module.fused_name} is stored as {planned}: quantization_config's targets are wrong."
                )
    return problems
