"""What is to be served: a checkpoint as it is stored, or what a recipe would make of it. Headers and config.json only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import CONFIG_NAME, Checkpoint
from ..checkpoint.bounded import CONFIG_BYTES, read_bounded
from ..checkpoint.strict_json import parse_object
from ..errors import CheckpointError, PlanError
from ..families import QUANTIZABLE, Family, family_of
from ..planning.engine_config import check_format, config_schemes
from ..planning.plan import unquantized
from ..planning.source_tensors import PLAIN, scale_layout, source_kind
from ..recipe.recipe import Recipe, build_recipe, for_family, named_recipe, recipe_names
from ..schemes import Scheme
from .weights import Group, bf16_release, checkpoint_groups, converted_groups, stored_bytes


@dataclass(frozen=True)
class ServedModel:
    """A model as an engine would read it. where: what `vllm serve` is given; label: its precision (as stored, or a recipe's name).
    schemes: the integer and FP8 schemes of its weights, as its config.json or the recipe states them."""

    where: str
    label: str
    family: Family
    config: Mapping[str, Any]
    groups: Sequence[Group] = field(repr=False)
    schemes: frozenset[Scheme] = frozenset()

    @property
    def max_positions(self) -> int:
        """Longest context that config.json allows, in tokens; 0 where it does not say."""
        return self.family.max_positions or 0

    @property
    def stored_bytes(self) -> int:
        return stored_bytes(self.groups)

    @property
    def has_vision(self) -> bool:
        return any(group.role == "vision" for group in self.groups)


@dataclass(frozen=True)
class Subject:
    """A checkpoint and what can be made of it. convertible: recipes apply (it is plain or FP8, not quantized by a tool)."""

    where: str
    family: Family
    config: Mapping[str, Any]
    stored: ServedModel
    convertible: bool
    config_only: bool
    source_groups: Sequence[Group] = field(repr=False)

    def converted(self, recipe: Recipe) -> ServedModel:
        """What `m3quant convert` would write. Raises PlanError where the recipe does not fit the shapes or the family."""
        if not self.convertible:
            raise PlanError(
                f"{self.where} is quantized already: recipes apply to the BF16 or FP8 release. Leave --to out."
            )
        if reason := self.family.refused_formats.get(recipe.format):
            raise PlanError(f"format '{recipe.format}' cannot be served for {self.family.model_type}: {reason}.")
        recipe, _ = for_family(recipe, self.family)
        check_format(recipe)
        groups = converted_groups(self.source_groups, recipe)
        schemes = frozenset(s for role in self.family.targets for s in recipe.schemes_of(role) if s.quantizes)
        where = f"OUTPUT-OF-{recipe.name}"
        return ServedModel(where, recipe.name, self.family, unquantized(self.config), groups, schemes)

    def precisions(self) -> tuple[list[ServedModel], dict[str, str]]:
        """The checkpoint itself and every shipped recipe's output, largest first; and why the other recipes are refused, by name."""
        models, refused = [self.stored], dict[str, str]()
        if self.config_only and self.stored.label != "bf16":
            models.append(ServedModel(self.where, "bf16", self.family, unquantized(self.config), self.source_groups))
        for name in recipe_names() if self.convertible else ():
            if name == self.stored.label:
                continue  # the checkpoint is stored in this format already
            try:
                models.append(self.converted(build_recipe(named_recipe(name))))
            except PlanError as error:
                refused[name] = str(error)
        return sorted(models, key=lambda model: -model.stored_bytes), refused


def open_subject(src: str, revision: str | None = None) -> Subject:
    """A local folder, a Hub repo, a config.json, or a folder that holds nothing but one. Raises CheckpointError."""
    path = Path(src).expanduser()
    if path.name.endswith(".json") or (path.is_dir() and not any(path.glob("*.safetensors*"))):
        return _from_config(path if path.suffix == ".json" else path / CONFIG_NAME)
    checkpoint = Checkpoint.open(src, revision)
    family = family_of(checkpoint.config, f"{checkpoint.root}/{CONFIG_NAME}")
    groups = checkpoint_groups(checkpoint, family)
    kind = _kind(checkpoint.config, checkpoint.root)
    where = checkpoint.root if checkpoint.local else src.partition("@")[0]
    label, schemes = _stored_label(checkpoint.config, kind), config_schemes(checkpoint.config)
    stored = ServedModel(where, label, family, checkpoint.config, groups, schemes)
    return Subject(checkpoint.root, family, checkpoint.config, stored, kind is not None, False, groups)


def _from_config(path: Path) -> Subject:
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} holds neither {CONFIG_NAME} nor *.safetensors: give a checkpoint's folder or its config.json."
        )
    config = parse_object(
        read_bounded(path, CONFIG_BYTES, follow=True), str(path), "Copy or download it again.", constants=True
    )
    family = family_of(config, str(path))
    groups = bf16_release(family)
    kind = _kind(config, str(path.parent))
    if kind is None:
        raise CheckpointError(
            f"{path} describes a quantized checkpoint (quant_method '{config['quantization_config'].get('quant_method')}') whose sizes "
            "are in its shards: give the folder with the *.safetensors files, or the config.json of the BF16 or FP8 release."
        )
    stored = groups if kind == PLAIN else [part for group in groups for part in _as_fp8(group, kind)]
    model = ServedModel(str(path.parent), _stored_label(config, kind), family, config, stored)
    return Subject(str(path.parent), family, config, model, True, True, groups)


def _kind(config: Mapping[str, Any], where: str) -> str | None:
    """PLAIN, an FP8 kind, or None for a checkpoint that a tool quantized."""
    try:
        return source_kind(config, where)
    except CheckpointError:
        return None


def _stored_label(config: Mapping[str, Any], kind: str | None) -> str:
    if kind == PLAIN:
        return "bf16"
    if kind is not None:
        return kind
    return str((config.get("quantization_config") or {}).get("quant_method", "quantized"))


def _as_fp8(group: Group, kind: str) -> list[Group]:
    if group.role not in QUANTIZABLE or group.leaf != "weight" or len(group.shape) != 2:
        return [group]
    shape, dtypes = scale_layout(kind, (group.shape[0], group.shape[1]))
    same = (group.role, group.part, group.layer)
    return [
        Group(*same, "weight", "F8_E4M3", group.shape, group.count, group.per_expert),
        Group(*same, "weight_scale_inv", dtypes[0], shape, group.count, group.per_expert),
    ]
