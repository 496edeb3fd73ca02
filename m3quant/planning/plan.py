"""The plan: recipe x checkpoint from headers alone. Every output byte and every refusal is known before a weight is read.

A plan is made of units: unit 0 holds what belongs to no layer, unit L+1 holds layer L. One unit is one output shard and
the grain of resuming.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from ..checkpoint import DTYPE_BYTES, Checkpoint, Entry, TensorInfo, aligned_order, entry_bytes, file_size
from ..checkpoint.listing import DRAFT_FOLDERS
from ..engines.rules import activation_notes, check_family_format, integer_notes, lookup_problems, zero_point_notes
from ..errors import PlanError
from ..families import KEPT, QUANTIZABLE, Family, Role, family_of
from ..families.spec import is_index
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
from .source_tensors import check_complete, source_tensors

T = TypeVar("T")

WARNING = "WARNING: "  # what a note begins with that nobody may overlook
SHARD_METADATA = {"format": "pt"}  # transformers refuses shards without it
RECIPE_FILE = "recipe.yaml"
INDEX_FILE = "model.safetensors.index.json"
# Files that describe the source and would be wrong of the output, which has or gets its own.
REPLACED_FILES = (RECIPE_FILE, "m3quant.json", "eval.json", "SHA256SUMS", HF_QUANT_CONFIG)


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to be written: safetensors dtype code and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PlannedTensor:
    """What happens to one source tensor.

    action: "copy" (byte for byte), "dequantize" (quantized source kept: BF16 out), or "quantize" to `scheme`.
    """

    source: SourceTensor
    role: Role
    action: str
    scheme: Scheme
    reason: str
    outputs: tuple[OutputTensor, ...]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def read(self) -> tuple[TensorInfo, ...]:
        """What is read of the source: all that it stores of a tensor that is copied, else what its values need."""
        return self.source.stored if self.action == "copy" else self.source.parts

    def parts(self, stored: Mapping[str, T]) -> dict[str, T]:
        """This tensor's own of `stored`, by suffix, as `quant.formats.decompress` takes them."""
        return {o.name.removeprefix(f"{self.module}."): stored[o.name] for o in self.outputs}


@dataclass(frozen=True)
class Unit:
    """One shard of the output and one step of the conversion. layer is None for unit 0."""

    index: int
    layer: int | None
    shard: str
    tensors: tuple[PlannedTensor, ...]

    @cached_property
    def entries(self) -> list[Entry]:
        """What the shard's header lists, in file order: source order, unless a tensor would start unaligned, which
        safetensors' torch reader refuses (odd sizes only)."""
        entries: list[Entry] = [(o.name, o.dtype, o.shape) for t in self.tensors for o in t.outputs]
        offset = 0
        for entry in entries:
            if offset % DTYPE_BYTES[entry[1]]:
                return aligned_order(entries)
            offset += entry_bytes(entry)
        return entries

    @property
    def bytes_in(self) -> int:
        return sum(t.source.stored_bytes for t in self.tensors)

    @cached_property
    def bytes_out(self) -> int:
        return file_size(self.entries, SHARD_METADATA)

    @property
    def label(self) -> str:
        return "embeddings, head and the rest" if self.layer is None else f"layer {self.layer}"


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

    @property
    def sources(self) -> dict[str, SourceTensor]:
        """Every source tensor by name, as planned."""
        return {t.name: t.source for t in self.tensors}

    @cached_property
    def modules(self) -> dict[str, Scheme]:
        """on-disk module -> scheme, for every weight of a quantizable role."""
        return {t.module: t.scheme for t in self.tensors if t.role.kind in QUANTIZABLE and t.role.is_weight}

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
        return sum(nbytes(o) for t in self.tensors for o in t.outputs)

    @cached_property
    def copied_files(self) -> list[str]:
        """Files beside the weights that are carried over byte for byte."""
        return [f for f in self.checkpoint.other_files if f not in REPLACED_FILES]

    @cached_property
    def output_bytes(self) -> int:
        """Exact size of the finished checkpoint: shards, index, config, recipe and carried files (not m3quant's own manifest, eval.json and report)."""
        own = len(self.config_bytes) + len(self.index_bytes) + len(self.recipe.dump().encode())
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


def nbytes(tensor: OutputTensor) -> int:
    """Bytes of one output tensor."""
    return entry_bytes((tensor.name, tensor.dtype, tensor.shape))


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Plan the conversion. Raises CheckpointError or PlanError, with the tensor and the remedy, for whatever would fail later."""
    family = family_of(checkpoint.config, f"{checkpoint.root}/config.json")
    recipe, recipe_notes = for_family(recipe, family)
    _check_roles(recipe, family)
    check_format(recipe, family)
    check_family_format(family, recipe.format)
    tensors = source_tensors(checkpoint)
    problem = requantize_problem(checkpoint.root, {t.kind for t in tensors.values()})
    if problem and not recipe.requantize:
        raise PlanError(problem)
    if recipe.requantize and not problem:
        recipe = recipe.model_copy(update={"requantize": False})  # nothing to take: the output is what it is without
    notes = [*checkpoint.warnings, *recipe_notes, *check_complete(checkpoint, family, tensors)]
    notes += _calibration_notes(family, recipe) + _source_notes(checkpoint, {} if recipe.native else tensors)
    layers = family.num_layers
    by_unit: list[list[PlannedTensor]] = [[] for _ in range(layers + 1)]
    for name in sorted(tensors, key=_natural):
        role = family.role(name)
        by_unit[0 if role.layer is None else role.layer + 1].append(_plan_tensor(tensors[name], role, recipe))
    units = [
        Unit(i, None if i == 0 else i - 1, f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors", tuple(group))
        for i, group in enumerate(by_unit)
    ]
    plan = Plan(checkpoint, family, recipe, units, None, notes)
    _check_layers(recipe, units)
    if recipe.native:
        plan.quantization = native_section(family, tensors)
        plan.notes.append(NATIVE_NOTE)
        return plan
    schemes = {kind: role_schemes(plan, kind) for kind in QUANTIZABLE}
    plan.notes += activation_notes(family, schemes["routed_experts"], recipe.format)
    others = {scheme for kind, own in schemes.items() if kind != "routed_experts" for scheme in own}
    plan.notes += integer_notes(schemes["routed_experts"], others)
    plan.notes += zero_point_notes(schemes["routed_experts"], recipe.format)
    if any(scheme.quantizes for scheme in plan.modules.values()):
        stored = (
            TensorInfo(o.name, o.dtype, o.shape, "", 0, 0)
            for t in plan.tensors
            if not t.scheme.quantizes
            for o in t.outputs
        )
        kept = kept_linears(family, stored, recipe.format)
        plan.quantization = quantization_config(recipe, family, plan.modules, kept)
        plan.notes += _scaled_extras_notes(plan)
        _check_engine_rules(plan)
    elif all(t.action == "copy" for t in plan.tensors):
        raise PlanError(
            "the recipe quantizes nothing in this checkpoint: give at least one role a scheme, e.g. --set routed_experts=int4-g128."
        )
    return plan


def _scaled_extras_notes(plan: Plan) -> list[str]:
    """Passed-through FP8 weights lie in the output with scales that its quantization_config has no word for."""
    scaled = [t.name for t in plan.tensors if t.role.kind in PASSED_THROUGH and t.source.scale]
    if not scaled or plan.recipe.format == "fp8":
        return []
    return [
        f"{len(scaled)} passed-through weights are quantized in the source and are copied with their scales, first {scaled[0]}: engines skip them, "
        "and one that builds them from this checkpoint would read the codes without the scales"
    ]


def _calibration_notes(family: Family, recipe: Recipe) -> list[str]:
    covered, length = family.selected_tokens, recipe.data.window_length
    if not recipe.calibrated or length > covered or recipe.data.lengths == "mixed":
        return []
    return [
        f"calibration windows of {length} tokens never exercise block selection, which begins past {covered} tokens: the error of "
        f"the index projections enters neither the search nor the held-out figures; --window-length {covered * 3 // 2} does"
    ]


def _source_notes(checkpoint: Checkpoint, tensors: Mapping[str, SourceTensor]) -> list[str]:
    """What a source's own precision, its scales of activations and a draft beside it mean for the output."""
    notes, kinds = [], sorted({t.kind for t in tensors.values()} & set(FOUR_BIT))
    if kinds:
        notes.append(
            f"the source holds {' and '.join(WORDS[kind] for kind in kinds)}: its rounding is in every output beside the output's own, and "
            "figures against the source do not show it; where there is a BF16 release, start from that"
        )
    if integers := integers_among(t.kind for t in tensors.values()):
        quantized = [t for t in tensors.values() if t.kind in integers]
        share = sum(t.numel for t in quantized) / sum(t.numel for t in tensors.values())
        notes.append(
            f"{WARNING}the source is itself quantized, {share:.0%} of its weights to {' and '.join(map(words_of, integers))}: every output has "
            "its rounding error and the output's own on top of it, and figures against the source show only the second; start from the BF16 "
            "or FP8 release wherever there is one"
        )
    if unread := sum(len(t.unread) for t in tensors.values()):
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


def _natural(name: str) -> list[Any]:
    """Sort key that puts layer 10 after layer 9."""
    return [(0, int(part), "") if is_index(part) else (1, 0, part) for part in name.split(".")]


def _check_roles(recipe: Recipe, family: Family) -> None:
    if recipe.rounding == "awq" and not any(
        scheme.kind == "int" for r in QUANTIZABLE if r in family.targets for scheme in recipe.schemes_of(r)
    ):
        raise PlanError(
            "rounding 'awq' needs at least one role in integers: it does not calibrate FP8 weights; use --to fp8, or set rounding: feedback or nearest."
        )


def _check_layers(recipe: Recipe, units: list[Unit]) -> None:
    """Raise PlanError for a layer, or a role in a layer, that the recipe names and the checkpoint does not have."""
    present = {unit.layer: {tensor.role.kind for tensor in unit.tensors} for unit in units}
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
    shapes = {t.module: t.source.shape for t in plan.tensors}
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
    """Per role and scheme: tensors and bytes in and out, and why; and which layers, where the recipe tells layers apart.

    Rows in a fixed order for tables and --json.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    layers: dict[tuple[str, str, str], set[int]] = {}
    for tensor in plan.tensors:
        key = (tensor.role.kind, tensor.action, tensor.scheme.name)
        row = rows.setdefault(
            key,
            {
                "role": key[0],
                "action": key[1],
                "scheme": key[2],
                "tensors": 0,
                "bytes_in": 0,
                "bytes_out": 0,
                "reason": tensor.reason,
            },
        )
        row["tensors"] += 1
        row["bytes_in"] += tensor.source.stored_bytes
        row["bytes_out"] += sum(nbytes(o) for o in tensor.outputs)
        if plan.recipe.layers and tensor.role.kind in QUANTIZABLE:
            layers.setdefault(key, set()).add(tensor.role.layer or 0)
    for key, own in layers.items():
        rows[key]["layers"] = show_layers(own)
    order = {role: i for i, role in enumerate((*QUANTIZABLE, *KEPT))}
    return [rows[key] for key in sorted(rows, key=lambda k: (order[k[0]], k[1], k[2]))]


def role_schemes(plan: Plan, role: str) -> list[Scheme]:
    """The schemes that weights of a role get, in the order of the layers that have them first."""
    return list(dict.fromkeys(t.scheme for t in plan.tensors if t.role.kind == role and t.role.is_weight))


def passed_through(plan: Plan) -> list[str]:
    """Names of tensors that no family rule explains: MTP and unknown extras, copied byte for byte."""
    return [t.name for t in plan.tensors if t.role.kind in PASSED_THROUGH]


def bits_per_weight(plan: Plan) -> float:
    """Stored bits per quantized weight, scales and zero points included."""
    quantized = [t for t in plan.tensors if t.scheme.quantizes or (plan.recipe.native and t.source.kind != PLAIN)]
    bits = 8 * sum(nbytes(o) for t in quantized for o in t.outputs)
    return bits / sum(t.source.numel for t in quantized)
