"""llm-compressor recipes, read as m3quant's own: modifiers, targets and ignore lists resolved onto the roles of a family.

Accepted: stages as users write them and as llm-compressor writes them into recipe.yaml, AWQModifier (with its own
scheme, or before a QuantizationModifier) and QuantizationModifier. Targets resolve as in compressed-tensors
(`utils/match.py`: an exact name before a regex, a regex before a class; of several regexes the first in alphabetical
order; ignore beats targets; a later modifier beats an earlier one), against a module's on-disk name and its names in
the transformers tree. What m3quant cannot do is refused with the reason; nothing is ignored. Torch-free.

An AWQModifier becomes m3quant's calibrated path: scales on the family's exact fold set with `n_grid` and
`duo_scaling`, then the range search, which stays off if the recipe asks for a min-max observer by `weight_observer`
or `observer`. (`observer: minmax` inside config_groups is what llm-compressor fills in by itself.)
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.name_list import NameList
from ..checkpoint.patterns import Allowance, BoundedPattern
from ..errors import RecipeError
from ..families.base import KEPT, QUANTIZABLE, Family
from ..schemes import KEEP, Scheme
from .llmcompressor_schemes import group_scheme, is_preset, preset_scheme, weight_observer
from .recipe import join_layers

AWQ, QUANTIZATION = "AWQModifier", "QuantizationModifier"

_QUANTIZATION_KEYS = (
    "scheme", "config_groups", "targets", "ignore", "kv_cache_scheme", "weight_observer", "input_observer",
    "output_observer", "observer",
)  # fmt: skip
_AWQ_KEYS = ("mappings", "n_grid", "duo_scaling")
# How llm-compressor runs, and what it writes of itself; none of it changes what is stored.
_WITHOUT_EFFECT = ("index", "group", "requires_calibration_data", "offload_device", "sequential_targets", "bypass_divisibility_checks")  # fmt: skip
_INSTEAD = {
    "GPTQ": "use AWQModifier before QuantizationModifier, m3quant's calibrated path",
    "AutoRound": "use AWQModifier before QuantizationModifier, m3quant's calibrated path",
    "SmoothQuant": "it smooths for integer activations, which m3quant does not write; use FP8_DYNAMIC without it",
    "SparseGPT": "m3quant does not prune; take it out",
    "Pruning": "m3quant does not prune; take it out",
}
_MINMAX = ("minmax", "memoryless_minmax", "static_minmax")
_SEARCHING = ("mse", "memoryless_mse", "imatrix_mse")
_SHORTER = "Write fewer targets and entries of 'ignore': a regex names many modules at once."


@dataclass(frozen=True)
class _Module:
    """A linear of the checkpoint: its role and layer, all names a recipe may use for it, and its class."""

    name: str
    role: str
    layer: int | None
    names: tuple[str, ...]
    torch_class: str


@dataclass
class _Quantization:
    """One modifier that quantizes: target -> scheme (a later group beats an earlier one), and what it leaves unquantized."""

    where: str
    schemes: dict[str, Scheme] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)
    observers: list[str] = field(default_factory=list)
    minmax: bool = False  # the user asked for the full range


def is_llmcompressor(document: Mapping[str, Any]) -> bool:
    """Whether the document holds llm-compressor modifiers, and not m3quant's own keys."""
    return any(_is_stage(key) for key in document) or any(True for _ in _modifiers(document))


def translate(document: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The same recipe as a document for `m3quant.recipe.recipe.build_recipe`.

    Raises RecipeError for anything that m3quant would do differently or not at all, with what to change in `where`.
    """
    modifiers = _checked_modifiers(document, where)
    awq = next((options for name, options in modifiers if name == AWQ), None)
    quantizations = [_quantization(options, f"{where}: {name}") for name, options in modifiers if _quantizes(options)]
    schemes, layers = _roles(family, quantizations, where)
    out: dict[str, Any] = {
        "name": f"{Path(where).stem} (llm-compressor)",
        "format": "compressed-tensors",
        "calibration": "none" if awq is None else "awq",
        "schemes": schemes,
        "layers": layers,
    }
    if awq is not None:
        out["awq"] = _awq_options(awq, quantizations, f"{where}: {AWQ}")
    else:
        _check_round_to_nearest(quantizations)
    return out


# --- the document ---


def _is_stage(key: object) -> bool:
    """'default_stage', 'quant_modifiers', 'AWQModifier'; llm-compressor numbers stages that it appends to one another."""
    return re.search(r"(_stage(_\d+)?|_modifiers|Modifier)$", str(key)) is not None


def _modifiers(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, options) of every modifier in order, at any level: top, group or stage."""
    for key, value in document.items():
        if str(key).endswith("Modifier"):
            yield str(key), value
        elif isinstance(value, list) and str(key).endswith("modifiers"):
            for entry in value:
                if isinstance(entry, Mapping):
                    yield from _modifiers(entry)
        elif isinstance(value, Mapping):
            yield from _modifiers(value)


def _checked_modifiers(document: Mapping[str, Any], where: str) -> list[tuple[str, dict[str, Any]]]:
    """The modifiers with options that are set (null means unset), all of kinds that m3quant has."""
    for key, value in document.items():
        holds_modifiers = isinstance(value, Mapping) and any(True for _ in _modifiers(value))
        if key not in ("args", "modifiers", "version") and not _is_stage(key) and not holds_modifiers:
            raise RecipeError(f"{where}: key '{key}' is no stage and no modifier of llm-compressor; remove it.")
    if document.get("args"):
        raise RecipeError(f"{where}: 'args' are not substituted by m3quant; write the values out and remove 'args'.")
    out: list[tuple[str, dict[str, Any]]] = []
    for name, options in _modifiers(document):
        if name not in (AWQ, QUANTIZATION):
            instead = next((v for k, v in _INSTEAD.items() if k in name), f"use {AWQ} and {QUANTIZATION} only")
            raise RecipeError(f"{where}: {name} is not something m3quant does: {instead}.")
        if not isinstance(options, Mapping | None):
            raise RecipeError(f"{where}: {name} is {options!r}; write a mapping of its options.")
        given = {str(key): value for key, value in (options or {}).items() if value is not None}
        _check_keys(given, name, f"{where}: {name}")
        out.append((name, given))
    if not any(_quantizes(options) for _, options in out):
        raise RecipeError(
            f"{where} gives no scheme: {AWQ} only transforms; add a {QUANTIZATION} with a scheme after it."
        )
    if sum(name == AWQ for name, _ in out) > 1:
        raise RecipeError(f"{where} has {AWQ} more than once; keep one.")
    return out


def _check_keys(options: Mapping[str, Any], name: str, where: str) -> None:
    allowed = (*_QUANTIZATION_KEYS, *(_AWQ_KEYS if name == AWQ else ()), *_WITHOUT_EFFECT)
    for key in options:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            remedy = f": did you mean '{near[0]}'?" if near else "; remove it."
            raise RecipeError(f"{where} has an option '{key}' that m3quant does not know{remedy}")
    if name == QUANTIZATION and not _quantizes(options):
        raise RecipeError(f"{where} gives neither 'scheme' nor 'config_groups', so it would quantize nothing; add one.")
    if name == AWQ and not _quantizes(options) and options.get("ignore"):
        raise RecipeError(f"{where} has 'ignore' but no scheme; move 'ignore' to the {QUANTIZATION}.")


def _quantizes(options: Mapping[str, Any]) -> bool:
    return bool(options.get("scheme") or options.get("config_groups"))


# --- schemes, targets, observers ---


def _quantization(options: Mapping[str, Any], where: str) -> _Quantization:
    if options.get("scheme") and options.get("config_groups"):
        raise RecipeError(f"{where} has both 'scheme' and 'config_groups'; keep one.")
    if options.get("kv_cache_scheme"):
        raise RecipeError(f"{where}: kv_cache_scheme needs KV-cache scales, which m3quant does not measure; remove it.")
    for key in ("input_observer", "output_observer"):
        if options.get(key):
            raise RecipeError(
                f"{where}: {key} is without meaning here, as activations are rounded at run time; remove it."
            )
    out = _Quantization(where, ignore=_strings(options.get("ignore", []), f"{where}.ignore"))
    targets = _strings(options.get("targets", ["Linear"]), f"{where}.targets")
    _collect(out, options, targets, where)
    observers = options.get("observer", {})
    if not isinstance(observers, Mapping) or set(observers) - {"weights"}:
        raise RecipeError(f"{where}: observer {observers!r}; m3quant takes a mapping with the key 'weights' only.")
    asked = options.get("weight_observer") or observers.get("weights")
    if asked is not None:
        out.observers, out.minmax = [str(asked).lower()], str(asked).lower() in _MINMAX
    for observer in out.observers:
        if observer not in (*_MINMAX, *_SEARCHING):
            raise RecipeError(
                f"{where}: observer '{observer}' is unknown to m3quant; known: {', '.join((*_MINMAX, *_SEARCHING))}."
            )
    return out


def _collect(out: _Quantization, options: Mapping[str, Any], targets: list[str], where: str) -> None:
    """Fill in target -> scheme from `scheme` or `config_groups`."""
    scheme = options.get("scheme")
    if isinstance(scheme, Mapping) and not any(is_preset(str(key)) for key in scheme):
        groups: dict[str, Any] = {"scheme": {**scheme, "targets": targets}}
    elif isinstance(scheme, Mapping):
        groups = dict(scheme)
    elif scheme:
        groups = {str(scheme): targets}
    else:
        groups = options["config_groups"]
        if not isinstance(groups, Mapping):
            raise RecipeError(f"{where}: config_groups is {groups!r}; write a mapping of groups.")
    for name, group in groups.items():
        here = f"{where}.{name}"
        if not isinstance(group, Mapping):  # preset: [targets]
            found, aimed = preset_scheme(name, where), _strings(group, here)
        else:
            found, aimed = group_scheme(group, here), _strings(group.get("targets", []), f"{here}.targets")
            if observer := weight_observer(group):
                out.observers.append(str(observer).lower())
        if not aimed:
            raise RecipeError(f"{here} has no targets; name some, for example [Linear].")
        out.schemes.update(dict.fromkeys(aimed, found))


def _strings(value: object, where: str) -> list[str]:
    """A name or a list of names; regexes must compile."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise RecipeError(f"{where} is {value!r}; write a list of names, classes or 're:' regexes.")
    for name in names:
        _pattern(name, where)
    return names


def _pattern(name: str, where: str, allowance: Allowance | None = None) -> BoundedPattern | None:
    if not name.startswith("re:"):
        return None
    return BoundedPattern(name.removeprefix("re:"), where, RecipeError, allowance)


def _awq_options(awq: Mapping[str, Any], quantizations: list[_Quantization], where: str) -> dict[str, Any]:
    if awq.get("mappings"):
        raise RecipeError(
            f"{where}: remove 'mappings' (llm-compressor writes those it inferred into recipe.yaml): m3quant folds over "
            "the family's own exact set, router and indexer included."
        )
    out = {key: awq[key] for key in ("n_grid", "duo_scaling") if key in awq}
    if not isinstance(out.get("duo_scaling", True), bool):
        raise RecipeError(
            f"{where}: duo_scaling {out['duo_scaling']!r} searches two grids, m3quant one; set true or false."
        )
    if any(q.minmax for q in quantizations):
        out["range_search"] = False
    return out


def _check_round_to_nearest(quantizations: list[_Quantization]) -> None:
    """Without AWQModifier there is no calibration: full range only."""
    for quantization in quantizations:
        if searching := [o for o in quantization.observers if o in _SEARCHING]:
            raise RecipeError(
                f"{quantization.where}: observer '{searching[0]}' searches ranges, which m3quant does on calibration "
                f"data: add an {AWQ} before it, or remove the observer to round to nearest."
            )


# --- modules and roles ---


def _modules(family: Family) -> list[_Module]:
    """Every linear and embedding that config.json promises."""
    out = []
    for name, expected in family.expected_tensors.items():
        if name.endswith(".weight") and len(expected.shape) == 2:
            module, found = name.removesuffix(".weight"), family.role(name)
            torch_class = "Embedding" if found.kind == "embedding" else "Linear"
            out.append(_Module(module, found.kind, found.layer, _names(family, module, found.kind), torch_class))
    return out


def _names(family: Family, module: str, role: str) -> tuple[str, ...]:
    names = list(family.recipe_aliases(module))
    if role in QUANTIZABLE:  # transformers fuses these two of a GLU into one parameter
        names += [re.sub(r"\.(gate|up)_proj$", ".gate_up_proj", n) for n in names]
    return tuple(dict.fromkeys(names))


class _Matcher:
    """The entries of one target or ignore list, in the order in which compressed-tensors lets them win."""

    def __init__(self, entries: list[str], where: str, allowance: Allowance | None = None) -> None:
        self.patterns = [
            (entry, pattern) for entry in sorted(entries) if (pattern := _pattern(entry, where, allowance))
        ]
        self.plain = {entry for entry in entries if not entry.startswith("re:")}
        self.unused = set(entries)

    def first(self, module: _Module) -> str | None:
        """The entry that decides for this module, or None."""
        matched = sorted(self.plain.intersection(module.names))
        matched += [entry for entry, pattern in self.patterns if any(map(pattern.match, module.names))]
        matched += self.plain & {module.torch_class}
        self.unused.difference_update(matched)
        return matched[0] if matched else None


def _roles(
    family: Family, quantizations: list[_Quantization], where: str
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """role -> scheme name, and the recipe's `layers` where a role's layers differ.

    Raises RecipeError where modules of a role differ within a layer, or a kept role would be quantized.
    """
    modules = _modules(family)
    allowance = Allowance(where, _SHORTER, RecipeError)
    found: dict[str, Scheme] = {module.name: KEEP for module in modules}
    for quantization in quantizations:
        targets = _Matcher(list(quantization.schemes), quantization.where, allowance)
        ignore = _Matcher(quantization.ignore, quantization.where, allowance)
        for module in allowance.timed(modules):
            target = targets.first(module)
            if ignore.first(module) is None and target is not None:
                found[module.name] = quantization.schemes[target]
        if targets.unused:
            raise RecipeError(
                f"{quantization.where}: target '{min(targets.unused)}' matches no linear of this model; correct or remove it."
            )
        quantized = [module for module in modules if found[module.name].quantizes]
        _check_ignore(ignore.unused, quantized, quantization.where, allowance)
    by_role: dict[str, list[_Module]] = defaultdict(list)
    for module in modules:
        by_role["attention" if module.role == "indexer" else module.role].append(module)
    for role, members in by_role.items():
        if role in KEPT:
            _check_kept(family, role, members, found, where)
    schemes: dict[str, str] = {}
    by_layer: dict[int, dict[str, str]] = defaultdict(dict)
    for role in ("routed_experts", "shared_experts", "dense_mlp", "attention"):
        layers: dict[int, list[_Module]] = defaultdict(list)
        for module in by_role.get(role, []):
            layers[module.layer or 0].append(module)
        agreed = {layer: _agreed(role, members, found, where) for layer, members in layers.items()}
        if not agreed:
            continue
        usual = Counter(agreed.values()).most_common(1)[0][0]
        if usual.quantizes:
            schemes[role] = usual.name
        for layer, scheme in agreed.items():
            if scheme != usual:
                by_layer[layer][role] = scheme.name
    return schemes, join_layers(by_layer)


def _check_ignore(unused: set[str], quantized: list[_Module], where: str, allowance: Allowance) -> None:
    """An entry that names part of a path ignores nothing in compressed-tensors, which compares whole names."""
    parts = NameList((entry for entry in unused if not entry.startswith("re:")), allowance)
    first: dict[str, str] = {}  # entry -> the first name that it is part of
    if not parts.exact:
        return
    for module in allowance.timed(quantized):
        for name in module.names:
            for run in parts.runs(name):
                if run in parts.exact:
                    first.setdefault(run, name)
    if first:
        entry, name = min(first.items())
        pattern = rf"re:(.*\.)?{re.escape(entry)}" + ("$" if name.endswith(entry) else r"\..*")
        raise RecipeError(
            f"{where}: ignore entry '{entry}' ignores nothing, because names are compared as a whole, and "
            f"{name} would be quantized; write '{pattern}' if it is to be kept."
        )


def _check_kept(family: Family, role: str, members: list[_Module], found: Mapping[str, Scheme], where: str) -> None:
    target = next((m for m in members if found[m.name].quantizes), None)
    if target is not None:
        names = [name for member in members for name in member.names]
        kept = [e for e in family.always_ignored if any(re.match(e.removeprefix("re:"), name) for name in names)]
        entries = ", ".join(f"'{entry}'" for entry in kept or [target.name])
        raise RecipeError(
            f"{where}: {target.name} ({role}) would become {found[target.name]}, but must stay as it is: {KEPT[role]}. "
            f"Add {entries} to 'ignore'."
        )


def _agreed(role: str, members: list[_Module], found: Mapping[str, Scheme], where: str) -> Scheme:
    first = members[0]
    other = next((m for m in members if found[m.name] != found[first.name]), None)
    if other is None:
        return found[first.name]
    why = (
        "engines fuse q, k, v and the index projections into one weight"
        if "indexer" in (first.role, other.role)
        else "a role has one scheme in a layer, which engines run as one module"
    )
    raise RecipeError(
        f"{where}: role '{role}' gets two schemes: {first.name} is {found[first.name]} and {other.name} is "
        f"{found[other.name]}, but {why}. Let targets and ignore cover all of them alike."
    )
