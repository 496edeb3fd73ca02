"""The plan: recipe x checkpoint from headers alone. Every output byte and every refusal is known before a weight is read.

A plan is made of units: unit 0 holds what belongs to no layer, unit L+1 holds layer L. One unit is one output shard and
the grain of resuming.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from ..checkpoint import Checkpoint, TensorInfo
from ..checkpoint.listing import DRAFT_FOLDERS
from ..engines.rules import activation_notes, check_family_format, integer_notes, lookup_problems, zero_point_notes
from ..errors import PlanError
from ..families import KEPT, QUANTIZABLE, Family, Role, family_of
from ..recipe.layer_ranges import show_layers
from ..recipe.recipe import Recipe, for_family, split_layers
from ..schemes import FP8_BLOCK, KEEP, Scheme
from .engine_config import check_format, quantization_config
from .engine_kept import PASSED_THROUGH, kept_linears
from .integer_kinds import integers_among, words_of
from .layout import check_divisible, tensors_of
from .native import NOTE as NATIVE_NOTE
from .native import native_section
from .source_format import HF_QUANT_CONFIG, requantize_problem
from .source_layouts import FOUR_BIT, PLAIN, WORDS, SourceTensor
from .source_layouts import FP8_BLOCK as FP8_BLOCK_SOURCE
from .source_units import Deferred, SourceUnit, SourceUnits, source_units
from .unit import OutputTensor, PlannedTensor, Unit, nbytes

WARNING = "WARNING: "  # the beginning of a note that must not be overlooked
RECIPE_FILE = "recipe.yaml"
INDEX_FILE = "model.safetensors.index.json"
# Files that describe the source and would be wrong of the output, which has or gets its own.
REPLACED_FILES = (RECIPE_FILE, "m3quant.json", "eval.json", "SHA256SUMS", HF_QUANT_CONFIG)


@dataclass
class Plan:
    """The whole conversion. Made by `make_plan`; pure data."""

    checkpoint: Checkpoint
    family: Family
    recipe: Recipe
    units: list[Unit]
    quantization: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> Iterable[PlannedTensor]:
        return (t for unit in self.units for t in unit.tensors)

    @cached_property
    def kinds(self) -> list[tuple[Unit, int]]:
        """One unit of each kind, in order, and how many there are of it."""
        firsts = [unit.like or unit for unit in self.units]
        counts = Counter(map(id, firsts))
        return [(first, counts[key]) for key, first in {id(first): first for first in firsts}.items()]

    def prefix(self, unit: Unit) -> str:
        return "" if unit.layer is None else self.family.layer_prefix(unit.layer)

    @property
    def sources(self) -> dict[str, SourceTensor]:
        """Every source tensor by name, as planned."""
        return {t.name: t.source for t in self.tensors}

    @cached_property
    def modules(self) -> dict[str, Scheme]:
        """on-disk module -> scheme, for every weight of a quantizable role."""
        out: dict[str, Scheme] = {}
        weights: dict[int, list[tuple[str, Scheme]]] = {}
        for unit in self.units:
            first = unit.like or unit
            before, after = self.prefix(first), self.prefix(unit)
            if id(first) not in weights:
                own = (t for t in first.tensors if t.role.kind in QUANTIZABLE and t.role.is_weight)
                weights[id(first)] = [(t.module[len(before) :], t.scheme) for t in own]
            out |= {f"{after}{rest}": scheme for rest, scheme in weights[id(first)]}
        return out

    @cached_property
    def config_bytes(self) -> bytes:
        """config.json of the output: the source's own, with quantization_config set (or taken out) and nothing else changed."""
        config = unquantized(self.checkpoint.config)
        if self.quantization:
            config["quantization_config"] = self.quantization
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()

    @cached_property
    def index_bytes(self) -> bytes:
        weight_map = {o.name: unit.shard for unit in self.units for t in unit.tensors for o in t.outputs}
        index = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        return (json.dumps(index, indent=2) + "\n").encode()

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of all output tensors, without headers."""
        return sum(unit.tensor_bytes for unit in self.units)

    @cached_property
    def index_size(self) -> int:
        """Bytes of `index_bytes`, without making it."""
        empty = json.dumps({"metadata": {"total_size": self.tensor_bytes}, "weight_map": {}}, indent=2)
        return len(empty) + len("\n  ") + sum(unit.index_bytes for unit in self.units) - len(",") + len("\n")

    @cached_property
    def copied_files(self) -> list[str]:
        """Files next to the weights that are carried over byte for byte."""
        return [f for f in self.checkpoint.other_files if f not in REPLACED_FILES]

    @cached_property
    def output_bytes(self) -> int:
        """Exact size of the finished checkpoint: shards, index, config, recipe and carried files (not m3quant's own manifest, eval.json and report)."""
        own = len(self.config_bytes) + self.index_size + len(self.recipe.dump().encode())
        carried = sum(self.checkpoint.file_size(f) for f in self.copied_files)
        return sum(unit.bytes_out for unit in self.units) + own + carried

    def fingerprint(self) -> str:
        """sha256 over the source's headers and config, the resolved recipe, and the layout of the output."""
        digest = hashlib.sha256()
        for part in (
            self.checkpoint.fingerprint(),
            self.recipe.dump(),
            self.config_bytes.decode(),
            self.index_bytes.decode(),
        ):
            digest.update(part.encode() + b"\0")
        return digest.hexdigest()


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without quantization_config, at the top or in text_config (`source_format` reads either)."""
    sections = ("quantization_config", "compression_config")
    out = {key: value for key, value in config.items() if key not in sections}
    text = out.get("text_config")
    if isinstance(text, Mapping) and any(section in text for section in sections):
        out["text_config"] = {key: value for key, value in text.items() if key not in sections}
    return out


def make_plan(checkpoint: Checkpoint, recipe: Recipe, source: SourceUnits | None = None) -> Plan:
    """Plan the conversion. Raises CheckpointError or PlanError, with the tensor and the remedy, for whatever would fail later.

    source: of the checkpoint, where several recipes are planned for one.
    """
    family = source.family if source else family_of(checkpoint.config, f"{checkpoint.root}/config.json")
    recipe, recipe_notes = for_family(recipe, family)
    _check_roles(recipe, family)
    check_format(recipe, family)
    check_family_format(family, recipe.format)
    source = source or source_units(checkpoint)
    problem = requantize_problem(checkpoint.root, {t.kind for unit, _ in source.kinds for t, _ in unit.tensors})
    if problem and not recipe.requantize:
        raise PlanError(problem)
    if recipe.requantize and not problem:
        recipe = recipe.model_copy(update={"requantize": False})  # nothing to take: the output is what it is without
    notes = [*checkpoint.warnings, *recipe_notes, *source.notes]
    notes += _calibration_notes(family, recipe) + _source_notes(checkpoint, None if recipe.native else source)
    units = _plan_units(source, recipe)
    plan = Plan(checkpoint, family, recipe, units, None, notes)
    _check_layers(recipe, units)
    if recipe.native:
        native_section(family, {t.name: t for unit, _ in source.kinds for t, _ in unit.tensors})  # refuses most sources
        plan.quantization = native_section(family, {t.name: t for unit in source.units for t, _ in unit.tensors})
        plan.notes.append(NATIVE_NOTE)
        return plan
    schemes = {kind: role_schemes(plan, kind) for kind in QUANTIZABLE}
    plan.notes += activation_notes(family, schemes["routed_experts"], recipe.format)
    others = {scheme for kind, own in schemes.items() if kind != "routed_experts" for scheme in own}
    plan.notes += integer_notes(schemes["routed_experts"], others)
    plan.notes += zero_point_notes(schemes["routed_experts"], recipe.format)
    if any(scheme.quantizes for scheme in plan.modules.values()):
        kept = kept_linears(family, _unquantized_outputs(plan), recipe.format)
        plan.quantization = quantization_config(recipe, family, plan.modules, kept)
        plan.notes += _scaled_extras_notes(plan)
        _check_engine_rules(plan)
    elif all(t.action == "copy" for unit, _ in plan.kinds for t in unit.tensors):
        raise PlanError(
            "the recipe quantizes nothing in this checkpoint: give at least one role a scheme, e.g. --set routed_experts=int4-g128."
        )
    return plan


def shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _plan_units(source: SourceUnits, recipe: Recipe) -> list[Unit]:
    """The units, of which those are alike that are alike in the source and get the same schemes."""
    first: dict[object, Unit] = {}
    units: list[Unit] = []
    for index, own in enumerate(source.units):
        kind = own.like, *(recipe.scheme(role, own.layer) for role in QUANTIZABLE)
        if own.like == index:
            unit = first[kind] = Unit(
                index, own.layer, shard_name(index, len(source.units)), _plan_tensors(own, recipe)
            )
        else:
            if kind not in first:
                first[kind] = _first_of_kind(source, own, recipe)
            like = first[kind]
            listed = Deferred(len(like.tensors), partial(_plan_tensors, own, recipe))
            unit = Unit(index, own.layer, shard_name(index, len(source.units)), listed, like)
        units.append(unit)
    return units


def _first_of_kind(source: SourceUnits, unit: SourceUnit, recipe: Recipe) -> Unit:
    """The first layer of the same tensors, planned in the schemes of this one, which differ from its own. It is part of no plan."""
    shown = source.units[unit.like]
    try:
        tensors = tuple(_plan_tensor(tensor, replace(role, layer=unit.layer), recipe) for tensor, role in shown.tensors)
    except PlanError:
        _plan_tensors(unit, recipe)  # the same refusal, with the names of this layer
        raise
    return Unit(unit.like, shown.layer, shard_name(unit.like, len(source.units)), tensors)


def _plan_tensors(unit: SourceUnit, recipe: Recipe) -> tuple[PlannedTensor, ...]:
    return tuple(_plan_tensor(source, role, recipe) for source, role in unit.tensors)


def _unquantized_outputs(plan: Plan) -> Iterator[TensorInfo]:
    """What is stored without a scheme of the recipe's."""
    for unit in plan.units:
        first = unit.like or unit
        before, after = plan.prefix(first), plan.prefix(unit)
        for tensor in first.tensors:
            if not tensor.scheme.quantizes:
                for output in tensor.outputs:
                    name = f"{after}{output.name[len(before) :]}"
                    yield TensorInfo(name, output.dtype, output.shape, "", 0, 0)


def _scaled_extras_notes(plan: Plan) -> list[str]:
    """Passed-through FP8 weights are in the output with scales that its quantization_config cannot express."""
    having = [unit for unit in plan.units if _has_scaled_extras(unit.like or unit)]
    scaled = [t.name for unit in having for t in unit.tensors if _is_scaled_extra(t)]
    if not scaled or plan.recipe.format == "fp8":
        return []
    return [
        f"{len(scaled)} passed-through weights are quantized in the source and are copied with their scales, first {scaled[0]}: engines skip them, "
        "and one that builds them from this checkpoint would read the codes without the scales"
    ]


def _has_scaled_extras(unit: Unit) -> bool:
    return any(map(_is_scaled_extra, unit.tensors))


def _is_scaled_extra(tensor: PlannedTensor) -> bool:
    return tensor.role.kind in PASSED_THROUGH and tensor.source.scale is not None


def _calibration_notes(family: Family, recipe: Recipe) -> list[str]:
    covered, length = family.selected_tokens, recipe.data.window_length
    if not recipe.calibrated or length > covered or recipe.data.lengths == "mixed":
        return []
    return [
        f"calibration windows of {length} tokens never exercise block selection, which begins past {covered} tokens: the error of "
        f"the index projections enters neither the search nor the held-out figures; --window-length {covered * 3 // 2} does"
    ]


def _source_notes(checkpoint: Checkpoint, source: SourceUnits | None) -> list[str]:
    """What a source's own precision, its scales of activations and a draft model next to it mean for the output. source: None where all of it stays."""
    tensors = [(t, count) for unit, count in source.kinds for t, _ in unit.tensors] if source else []
    notes, kinds = [], sorted({t.kind for t, _ in tensors} & set(FOUR_BIT))
    if kinds:
        notes.append(
            f"the source holds {' and '.join(WORDS[kind] for kind in kinds)}: its rounding is in every output in addition to the output's own, and "
            "figures against the source do not show it; where there is a BF16 release, start from that"
        )
    if integers := integers_among(t.kind for t, _ in tensors):
        quantized = sum(t.numel * count for t, count in tensors if t.kind in integers)
        share = quantized / sum(t.numel * count for t, count in tensors)
        notes.append(
            f"{WARNING}the source is itself quantized, {share:.0%} of its weights to {' and '.join(map(words_of, integers))}: every output has "
            "its rounding error and the output's own on top of it, and figures against the source show only the second; start from the BF16 "
            "or FP8 release wherever there is one"
        )
    if unread := sum(len(t.unread) * count for t, count in tensors):
        notes.append(
            f"{unread} scales of activations in the source are left out: no weight needs them, and the output has its own scheme"
        )
    drafts = [name for name in checkpoint.other_files if name.partition("/")[0] in DRAFT_FOLDERS and "/" in name]
    if drafts:
        size = sum(checkpoint.file_size(name) for name in drafts)
        notes.append(
            f"a draft model lies in {drafts[0].partition('/')[0]}/ ({size:,} bytes): it is carried over byte for byte, with its own "
            "quantization, and guesses for the source's weights"
        )
    return notes


def _check_roles(recipe: Recipe, family: Family) -> None:
    if recipe.rounding == "awq" and not any(
        scheme.kind == "int" for r in QUANTIZABLE if r in family.targets for scheme in recipe.schemes_of(r)
    ):
        raise PlanError(
            "rounding 'awq' needs at least one role in integers: it does not calibrate FP8 weights; use --to fp8, or set rounding: feedback or nearest."
        )


def _check_layers(recipe: Recipe, units: list[Unit]) -> None:
    """Raise PlanError for a layer, or a role in a layer, that the recipe names and the checkpoint does not have."""
    if not recipe.layers:
        return
    firsts = {id(first): first for first in (unit.like or unit for unit in units)}
    kinds = {key: {tensor.role.kind for tensor in first.tensors} for key, first in firsts.items()}
    present = {unit.layer: kinds[id(unit.like or unit)] for unit in units}
    for layer, roles in split_layers(recipe.layers).items():
        if layer not in present:
            raise PlanError(
                f"the recipe gives layer {layer} a scheme, but the model has layers 0 to {len(units) - 2}: correct 'layers'."
            )
        for role in roles:
            if role not in present[layer]:
                having = show_layers(n for n, kinds in present.items() if n is not None and role in kinds)
                where = f"only layers {having} have" if having else "no layer has"
                raise PlanError(
                    f"the recipe gives {role} of layer {layer} a scheme, but {where} {role}: correct 'layers'."
                )


def _plan_tensor(source: SourceTensor, role: Role, recipe: Recipe) -> PlannedTensor:
    info, shape = source.info, source.shape
    if recipe.native:
        return PlannedTensor(source, role, "copy", KEEP, "the source's own, byte for byte", _as_stored(source))
    scheme = recipe.scheme(role.kind, role.layer) if role.kind in QUANTIZABLE else KEEP
    if role.kind in QUANTIZABLE and not role.is_weight:
        scheme, reason = KEEP, "a companion of a quantized weight that the family does not know: passed through"
    elif not scheme.quantizes:
        reason = KEPT.get(role.kind, "the recipe keeps this role")
    else:
        reason = f"recipe '{recipe.name}'"
    if not scheme.quantizes:
        if source.kind == PLAIN or role.kind in PASSED_THROUGH:
            return PlannedTensor(source, role, "copy", KEEP, reason, _as_stored(source))
        out = (OutputTensor(source.name, "BF16", shape),)
        return PlannedTensor(source, role, "dequantize", KEEP, f"{reason}; stored as {source.kind} in the source", out)
    if (
        scheme.block
        and recipe.format == "fp8"
        and source.kind == FP8_BLOCK_SOURCE
        and source.scale
        and source.scale.dtype == "F32"
    ):
        return PlannedTensor(source, role, "copy", scheme, "already in this format", _as_stored(source))
    if len(shape) != 2:
        raise PlanError(
            f"{info.shard}: tensor '{info.name}' has shape {list(shape)}: only two-dimensional weights can be {scheme}; --set {role.kind}=keep."
        )
    try:
        check_divisible(shape, scheme, recipe.format)
    except PlanError as error:
        raise PlanError(f"{info.shard}: tensor '{info.name}': {error} (--set {role.kind}=...)") from None
    stem = source.name.removesuffix(".weight")
    outputs = tuple(
        OutputTensor(f"{stem}.{suffix}", dtype, shape)
        for suffix, (dtype, shape) in tensors_of(shape, scheme, recipe.format, role.joined).items()
    )
    return PlannedTensor(source, role, "quantize", scheme, reason, outputs)


def _as_stored(source: SourceTensor) -> tuple[OutputTensor, ...]:
    return tuple(OutputTensor(part.name, part.dtype, part.shape) for part in source.stored)


def _check_engine_rules(plan: Plan) -> None:
    """What engines demand of a layer: fused modules share a scheme, names resolve, fused blocks are aligned."""
    assert plan.quantization is not None
    problems = lookup_problems(plan.family, plan.quantization, plan.modules)
    if problems:
        more = f" ({len(problems) - 1} more of this kind)" if len(problems) > 1 else ""
        raise PlanError(problems[0] + more)
    shapes = {
        f"{plan.prefix(unit)}{t.module[len(plan.prefix(unit.like or unit)) :]}": t.source.shape
        for unit in plan.units
        for t in (unit.like or unit).tensors
        if t.scheme.block and t.role.kind != "routed_experts"
    }
    for module in plan.family.engine_modules():
        if len(module.members) < 2 or ".experts." in module.members[0]:
            continue
        for member in module.members:
            scheme = plan.modules.get(member, KEEP)
            if scheme.block and shapes[member][0] % FP8_BLOCK:
                raise PlanError(
                    f"{member} has {shapes[member][0]} rows, not a multiple of {FP8_BLOCK}: the engine fuses it into {module.fused_name}, "
                    "where a 128x128 block may not span two tensors. Use fp8-channel for this role."
                )


def role_table(plan: Plan) -> list[dict[str, Any]]:
    """Per role and scheme: tensors and bytes in and out, and why; and which layers, if the recipe distinguishes layers.

    Rows in a fixed order for tables and --json.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    layers: dict[tuple[str, str, str], set[int]] = {}
    like: dict[int, set[tuple[str, str, str]]] = {}
    for unit, count in plan.kinds:
        for tensor in unit.tensors:
            key = (tensor.role.kind, tensor.action, tensor.scheme.name)
            counts = {"tensors": 0, "bytes_in": 0, "bytes_out": 0, "reason": tensor.reason}
            row = rows.setdefault(key, dict(zip(("role", "action", "scheme"), key, strict=True)) | counts)
            row["tensors"] += count
            row["bytes_in"] += count * tensor.source.stored_bytes
            row["bytes_out"] += count * sum(nbytes(o) for o in tensor.outputs)
            like.setdefault(id(unit), set()).add(key)
    for unit in plan.units if plan.recipe.layers else ():
        for key in like[id(unit.like or unit)]:
            if key[0] in QUANTIZABLE:
                layers.setdefault(key, set()).add(unit.layer or 0)
    for key, own in layers.items():
        rows[key]["layers"] = show_layers(own)
    order = {role: i for i, role in enumerate((*QUANTIZABLE, *KEPT))}
    return [rows[key] for key in sorted(rows, key=lambda k: (order[k[0]], k[1], k[2]))]


def role_schemes(plan: Plan, role: str) -> list[Scheme]:
    """The schemes that weights of a role get, in the order of the layers that have them first."""
    tensors = (t for unit, _ in plan.kinds for t in unit.tensors)
    return list(dict.fromkeys(t.scheme for t in tensors if t.role.kind == role and t.role.is_weight))


def passed_through(plan: Plan) -> list[str]:
    """Names of tensors that no family rule explains: MTP and unknown extras, copied byte for byte."""
    having = {id(unit) for unit, _ in plan.kinds if any(t.role.kind in PASSED_THROUGH for t in unit.tensors)}
    units = [unit for unit in plan.units if id(unit.like or unit) in having]
    return [t.name for unit in units for t in unit.tensors if t.role.kind in PASSED_THROUGH]


def bits_per_weight(plan: Plan) -> float:
    """Stored bits per quantized weight, scales and zero points included."""
    native = plan.recipe.native
    tensors = [(t, count) for unit, count in plan.kinds for t in unit.tensors]
    quantized = [(t, count) for t, count in tensors if t.scheme.quantizes or (native and t.source.kind != PLAIN)]
    bits = 8 * sum(count * nbytes(o) for t, count in quantized for o in t.outputs)
    return bits / sum(count * t.source.numel for t, count in quantized)
