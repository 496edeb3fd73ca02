"""The checkpoint to be served: as it is stored, or what a recipe would make of it. Headers and config.json only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import CONFIG_NAME, Checkpoint
from ..checkpoint.bounded import CONFIG_BYTES, read_bounded
from ..checkpoint.strict_json import parse_object
from ..engines.rules import check_family_format
from ..engines.stated import config_schemes, quantization_of
from ..errors import CheckpointError, PlanError
from ..families import Family, family_of
from ..planning.engine_config import check_format
from ..planning.other_trees import other_tree, read_as_release
from ..planning.plan import unquantized
from ..planning.source_format import SourceFormat, file_format, requantize_problem, source_format, stored_entries
from ..planning.source_layouts import PLAIN
from ..planning.source_tensors import check_complete, source_tensors
from ..recipe.recipe import (
    ModelOfLayers,
    Recipe,
    build_recipe,
    fitted_names,
    for_family,
    named_recipe,
    recipe_names,
    with_requantize,
)
from ..schemes import Scheme
from .weights import Group, bf16_release, checkpoint_groups, converted_groups, gather, model_groups, stored_bytes


@dataclass(frozen=True)
class ServedModel:
    """A model as an engine would read it. where: what `vllm serve` is given; label: its precision (as stored, or a recipe's name).
    schemes: the integer and FP8 schemes of its weights, as its config.json or the recipe states them. problem: why no engine loads it, or ''.
    made: the format of a recipe's output, whose config.json is not written yet."""

    where: str
    label: str
    family: Family
    config: Mapping[str, Any]
    groups: Sequence[Group] = field(repr=False)
    schemes: frozenset[Scheme] = frozenset()
    problem: str = ""
    made: str = ""

    @property
    def method(self) -> str:
        """The format of its weights, as quantization_config names it; '' where nothing is quantized."""
        return self.made or str(quantization_of(self.config).get("quant_method", ""))

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
    """A checkpoint and what can be made of it. refused: why `m3quant convert` would not take it, or ''; requantizable: why it does so with
    --requantize alone, or ''."""

    where: str
    family: Family
    config: Mapping[str, Any]
    stored: ServedModel
    refused: str
    config_only: bool
    source_groups: Sequence[Group] = field(repr=False)
    requantizable: str = ""

    @property
    def convertible(self) -> bool:
        """Whether it is converted without being asked twice."""
        return not (self.refused or self.requantizable)

    def converted(self, recipe: Recipe) -> ServedModel:
        """What `m3quant convert` would write. Raises PlanError where the recipe does not fit the shapes or the family."""
        if problem := self.refused or (not recipe.requantize and self.requantizable):
            raise PlanError(f"no recipe can be applied: {problem}")
        check_family_format(self.family, recipe.format)
        recipe, _ = for_family(recipe, self.family)
        check_format(recipe, self.family)
        groups = converted_groups(self.source_groups, recipe)
        schemes = frozenset(s for role in self.family.targets for s in recipe.schemes_of(role) if s.quantizes)
        where = f"OUTPUT-OF-{recipe.name}"
        return ServedModel(
            where, recipe.name, self.family, unquantized(self.config), groups, schemes, made=recipe.format
        )

    def precisions(self, requantize: bool = False) -> tuple[list[ServedModel], dict[str, str]]:
        """The checkpoint itself and every shipped recipe's output, largest first; and why the other recipes are refused, by name."""
        models, refused = [self.stored], dict[str, str]()
        if self.config_only and self.stored.label != "bf16":
            models.append(ServedModel(self.where, "bf16", self.family, unquantized(self.config), self.source_groups))
        own = ModelOfLayers.of(self.family)
        for name in [*recipe_names(), *fitted_names()] if self.convertible or (requantize and not self.refused) else ():
            recipe = with_requantize(build_recipe(named_recipe(name)), requantize)
            if name == self.stored.label or recipe.model not in (None, own):
                continue  # the checkpoint is stored in this format already, or the recipe is fitted to another model
            try:
                models.append(self.converted(recipe))
            except PlanError as error:
                refused[name] = str(error)
        return sorted(models, key=lambda model: -model.stored_bytes), refused


def open_subject(src: str, revision: str | None = None, checkpoint: Checkpoint | None = None) -> Subject:
    """A local folder, a Hub repo, a config.json, or a folder that holds nothing but one. Raises CheckpointError.

    checkpoint: what `src` is, if it was opened already.
    """
    path = Path(src).expanduser()
    config_alone = path.name.endswith(".json") or (path.is_dir() and not any(path.glob("*.safetensors*")))
    if checkpoint is None and config_alone:
        return _from_config(path if path.suffix == ".json" else path / CONFIG_NAME)
    checkpoint = checkpoint or Checkpoint.open(src, revision)
    family = family_of(checkpoint.config, f"{checkpoint.root}/{CONFIG_NAME}")
    family.check_promised(len(checkpoint.tensors))
    renamed = read_as_release(checkpoint, family)
    if tree := other_tree(checkpoint, family):
        raise CheckpointError(tree)
    found = source_format(checkpoint)
    refused, integers = found.refused, ""
    groups = wanted = checkpoint_groups(checkpoint, family)
    if not refused:
        try:
            check_complete(checkpoint, family, tensors := source_tensors(checkpoint))
            wanted = model_groups(tensors.values(), family)
            integers = requantize_problem(checkpoint.root, {t.kind for t in tensors.values()})
        except CheckpointError as error:  # its weights can be counted, if not converted
            refused = str(error)
    where = checkpoint.root if checkpoint.local else src.partition("@")[0]
    config = _with_section(checkpoint.config, found)
    problem = f"no engine finds weights under these names: convert it ({renamed})." if renamed else ""
    stored = ServedModel(where, found.label, family, config, groups, config_schemes(config), problem)
    return Subject(checkpoint.root, family, config, stored, refused, False, wanted, integers)


def _from_config(path: Path) -> Subject:
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} holds neither {CONFIG_NAME} nor *.safetensors: give a checkpoint's folder or its config.json."
        )
    config = parse_object(
        read_bounded(path, CONFIG_BYTES, follow=True), str(path), "Copy or download it again.", constants=True
    )
    family = family_of(config, str(path))
    found = file_format(path, config)
    if found.refused:
        raise CheckpointError(
            f"{found.refused} Its sizes are in its shards: to plan it as it is, give the folder with the *.safetensors files."
        )
    groups = bf16_release(family)
    stored = groups if found.kind == PLAIN else gather(family, stored_entries(family, found))
    model = ServedModel(str(path.parent), found.label, family, _with_section(config, found), stored)
    integers = requantize_problem(str(path), {found.kind, *found.stated.others})
    return Subject(str(path.parent), family, config, model, "", True, groups, integers)


def _with_section(config: Mapping[str, Any], found: SourceFormat) -> Mapping[str, Any]:
    """The config with its quantization section in the usual place, wherever it was read: the cache's dtype is stated there too."""
    return {**unquantized(config), "quantization_config": dict(found.section)} if found.section else config
