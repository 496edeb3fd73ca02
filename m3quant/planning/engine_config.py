"""`quantization_config`: what an engine reads. How it resolves names in it is `engines.rules.lookup_problems`. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..engines.rules import check_expert_scheme
from ..errors import PlanError
from ..families.base import QUANTIZABLE, Family, Role
from ..recipe.recipe import Recipe
from ..schemes import Scheme
from .engine_kept import add_kept

PACKED = "pack-quantized"


def quantization_config(
    recipe: Recipe, family: Family, modules: Mapping[str, Scheme], kept: Iterable[tuple[str, Role]]
) -> dict[str, Any]:
    """The `quantization_config` for these modules.

    modules: on-disk module name -> scheme, for every module of a quantizable role.
    kept: the other modules that engines may build as Linear layers, as `engine_kept.kept_linears` finds them.
    """
    if recipe.format == "fp8":
        config = _deepseek_fp8(family, modules)
    elif recipe.format == "autoawq":
        config = _autoawq(recipe, family, modules)
    else:
        config = _compressed_tensors(recipe, family, modules)
    roles = {module: family.role(f"{module}.weight") for module in modules if ".experts." not in module}
    own = [(module, role) for module, role in roles.items() if not modules[module].quantizes]
    mixed = {role.kind for _, role in own} & {roles[m].kind for m in roles if modules[m].quantizes}
    add_kept(config, family, [*kept, *own], mixed)
    return config


def _roles(recipe: Recipe, family: Family) -> dict[str, Scheme]:
    return {role: recipe.scheme(role) for role in QUANTIZABLE if role in family.targets}


def _compressed_tensors(recipe: Recipe, family: Family, modules: Mapping[str, Scheme]) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    targets: dict[Scheme, list[str]] = {}
    ignore = list(family.always_ignored)
    by_layer = _layers(family, modules) if recipe.layers else {}
    for role, scheme in _roles(recipe, family).items():
        found = by_layer.get(role, {})
        if len(found) < 2:
            found = {next(iter(found), scheme): []}
        for own, layers in found.items():
            patterns = [in_layers(pattern, layers) if layers else pattern for pattern in family.targets[role]]
            (targets.setdefault(own, []) if own.quantizes else ignore).extend(patterns)
    for number, (scheme, patterns) in enumerate(targets.items()):
        groups[f"group_{number}"] = {"targets": patterns, **compressed_tensors_group(scheme)}
    formats = sorted({group["format"] for group in groups.values()}, key=lambda form: form != PACKED)
    return {
        "quant_method": "compressed-tensors",
        # Of a mixture the integers' own: SGLang 0.5.23 refuses experts of integers under "mixed-precision"; vLLM and
        # compressed-tensors take each group's own format.
        "format": formats[0],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def _layers(family: Family, modules: Mapping[str, Scheme]) -> dict[str, dict[Scheme, list[int]]]:
    """role -> scheme -> the layers whose modules of the role have it."""
    found: dict[str, dict[Scheme, set[int]]] = {}
    seen: set[tuple[str, int]] = set()
    for module, scheme in modules.items():
        layer, experts, _ = module.partition(".experts.")
        if experts and (layer, id(scheme)) in seen:
            continue  # all experts of a layer have one role
        seen.add((layer, id(scheme)))
        role = family.role(f"{module}.weight")
        if role.layer is not None:
            found.setdefault(role.kind, {}).setdefault(scheme, set()).add(role.layer)
    return {role: {scheme: sorted(layers) for scheme, layers in own.items()} for role, own in found.items()}


def in_layers(pattern: str, layers: Iterable[int]) -> str:
    """A family's target that matches in these layers only. A lookahead, so that the rest of the pattern stays as it is:
    every tree (on disk, vLLM's, transformers') has `.layers.N.` in a module's name."""
    return rf"re:(?=.*\.layers\.({'|'.join(map(str, layers))})\.){pattern.removeprefix('re:')}"


def compressed_tensors_group(scheme: Scheme) -> dict[str, Any]:
    """One compressed-tensors config group without its targets: weights, input_activations and format."""
    if scheme.kind == "int":
        weights: dict[str, Any] = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "group" if scheme.group_size else "channel",
            "group_size": scheme.group_size,
            "dynamic": False,
        }
        return {"weights": weights, "input_activations": None, "output_activations": None, "format": PACKED}
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    if scheme.block:
        weights = {**common, "strategy": "block", "block_structure": [128, 128], "dynamic": False}
    else:
        weights = {**common, "strategy": "channel", "dynamic": False}
    rounded = scheme.activations
    assert rounded is not None, "FP8 weights are read with FP8 activations"
    run = {"strategy": "group", "group_size": rounded.group_size} if rounded.group_size else {"strategy": "token"}
    inputs = {**common, **run, "dynamic": True}
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": "float-quantized"}


def _deepseek_fp8(family: Family, modules: Mapping[str, Scheme]) -> dict[str, Any]:
    kept = [name for name, scheme in modules.items() if not scheme.quantizes]
    # One entry covers all experts of a layer: vLLM asks whether the layer's prefix is part of an entry.
    exact = sorted({alias for name in kept for alias in family.engine_names(name)})
    return {
        "quant_method": "fp8",
        "fmt": "float8_e4m3fn",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [*family.fp8_ignored, *exact],
    }


def _autoawq(recipe: Recipe, family: Family, modules: Mapping[str, Scheme]) -> dict[str, Any]:
    scheme = next(s for s in modules.values() if s.quantizes)
    kept = [s for role, sc in _roles(recipe, family).items() if not sc.quantizes for s in family.awq_substrings[role]]
    return {
        "quant_method": "awq",
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "zero_point": True,  # symmetric codes are stored with the constant zero point 8
        "version": "gemm",
        "modules_to_not_convert": [*family.awq_ignored, *kept],
    }


def check_format(recipe: Recipe, family: Family) -> None:
    """Raise PlanError when the recipe's format cannot hold its schemes, with every role of the family that it is about."""
    used = [
        (role, scheme)
        for role in QUANTIZABLE
        if role in family.targets
        for scheme in sorted(recipe.schemes_of(role), key=str)
        if scheme.quantizes
    ]
    for role, scheme in used:
        if role == "routed_experts":
            check_expert_scheme(scheme)
    if recipe.format == "fp8" and (odd := [item for item in used if not (item[1].kind == "fp8" and item[1].block)]):
        raise PlanError(
            f"format 'fp8' holds 128x128 blocks only, but {_named(odd)}: use fp8-block or --format compressed-tensors."
        )
    if recipe.format == "autoawq":
        if recipe.layers:
            raise PlanError(
                "format 'autoawq' has one scheme for the whole model, but the recipe has 'layers' of their own: use --format "
                "compressed-tensors, or take 'layers' out."
            )
        if odd := [item for item in used if item[1].kind != "int" or item[1].bits != 4]:
            changes = " ".join(f"--set {role}=keep" for role in dict.fromkeys(role for role, _ in odd))
            raise PlanError(
                f"format 'autoawq' holds int4 only, but {_named(odd)}: --to awq-attn-bf16 or awq-all-int4, or {changes} "
                "(or int4-g128)."
            )
        sizes = {scheme.group_size for _, scheme in used}
        if len(sizes) > 1:
            raise PlanError(
                f"format 'autoawq' holds one group size, but the recipe has {sorted(map(str, sizes))}: choose one with --set."
            )


def _named(items: Sequence[tuple[str, Scheme]]) -> str:
    """For display: "attention is fp8-channel and dense_mlp is int8-g128"."""
    return " and ".join(f"{role} is {scheme}" for role, scheme in items)
