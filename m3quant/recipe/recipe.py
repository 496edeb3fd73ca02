"""Recipes: which role gets which scheme, in which format, calibrated or not. Roles, never regexes.

Precedence: options on the command line beat the recipe file, the file beats the defaults here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from ..errors import RecipeError
from ..families.base import KEPT, QUANTIZABLE, Family
from ..schemes import KEEP, Scheme, parse_scheme


class AwqOptions(BaseModel):
    """Knobs of the calibrated path. Defaults are the ones the fixtures' figures were made with."""

    model_config = ConfigDict(extra="forbid")

    smooth: bool = True  # search per-channel scales on the exact fold set
    range_search: bool = True  # search the clipping range of every group
    signed_scales: bool = True  # a negative scale where a group's largest weight is positive (symmetric schemes)
    n_grid: int = Field(default=20, ge=1, le=200)  # ratios tried between 0 and 1, identity besides
    duo_scaling: bool = True  # s = x^r / w^(1-r) instead of x^r


class CalibrationOptions(BaseModel):
    """How much text the calibrated path sees."""

    model_config = ConfigDict(extra="forbid")

    windows: int = Field(default=128, ge=1)
    window_length: int = Field(default=512, ge=16)
    heldout_windows: int = Field(
        default=16, ge=0
    )  # more windows, never used for statistics: perplexity before and after
    min_expert_tokens: int = Field(default=32, ge=0)
    seed: int = 0


class Recipe(BaseModel):
    """A validated recipe. `schemes` maps a role to a scheme name; roles left out are kept as they are."""

    model_config = ConfigDict(extra="forbid")

    name: str = "custom"
    format: Literal["compressed-tensors", "autoawq", "fp8"] = "compressed-tensors"
    calibration: Literal["awq", "none"] = "none"
    schemes: dict[str, str] = Field(default_factory=dict)
    awq: AwqOptions = Field(default_factory=lambda: AwqOptions())
    data: CalibrationOptions = Field(default_factory=lambda: CalibrationOptions())
    _asked: frozenset[str] = PrivateAttr(default=frozenset())  # roles that a person gave a scheme beside the document

    @field_validator("schemes")
    @classmethod
    def _check_schemes(cls, schemes: dict[str, str]) -> dict[str, str]:
        return {check_role(role): parse_scheme(text).name for role, text in schemes.items()}

    def scheme(self, role: str) -> Scheme:
        """The scheme of a role. The indexer follows attention unless it is named, because engines fuse the two."""
        if role == "indexer" and role not in self.schemes:
            role = "attention"
        return parse_scheme(self.schemes[role]) if role in self.schemes else KEEP

    def dump(self) -> str:
        """The recipe as YAML: what `recipe.yaml` of every output holds."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def for_family(recipe: Recipe, family: Family) -> tuple[Recipe, list[str]]:
    """The recipe as this model takes it, and notes on what that changes.

    Where a model has no routed experts, its dense MLPs are the bulk of its weights and take the experts' scheme, unless
    a person gave them their own; attention keeps what the recipe says. The result no longer names routed experts, so that
    it means the same when it is read again.
    """
    experts = recipe.scheme("routed_experts")
    if family.moe is not None or "routed_experts" not in recipe.schemes:
        return recipe, []
    schemes = {role: name for role, name in recipe.schemes.items() if role != "routed_experts"}
    notes = []
    if experts.quantizes and "dense_mlp" not in recipe._asked:
        if schemes.get("dense_mlp") != experts.name:
            notes = [
                f"this model has no routed experts: its dense MLPs take their scheme, {experts} (--set dense_mlp=... for another)"
            ]
        schemes["dense_mlp"] = experts.name
    return recipe.model_copy(update={"schemes": schemes}), notes


def check_role(role: str) -> str:
    """The role itself, or a RecipeError that names the nearest valid role or says why this one is kept."""
    if role in QUANTIZABLE:
        return role
    if role in KEPT:
        raise RecipeError(f"role '{role}' cannot be given a scheme: {KEPT[role]}. Leave it out of the recipe.")
    near = next((known for known in QUANTIZABLE if role and role in known), None)
    near = near or difflib.get_close_matches(role, QUANTIZABLE, n=1, cutoff=0.0)[0]
    raise RecipeError(f"unknown role '{role}': did you mean '{near}'? Roles: {', '.join(QUANTIZABLE)}.")


def recipe_folder() -> Path:
    from importlib.resources import files

    return Path(str(files("m3quant.recipes")))


def recipe_names() -> list[str]:
    """Names that `--to` takes. Recipes for serving nodes carry a `serve-` prefix and are not among them."""
    return sorted(p.stem for p in recipe_folder().glob("*.yaml") if not p.stem.startswith("serve-"))


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """The YAML mapping in `path`. Raises RecipeError with the parser's line for anything else."""
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"recipe {path} does not exist: give a YAML file, or --to with one of {', '.join(recipe_names())}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(document, dict):
        raise RecipeError(f"recipe {path} holds no mapping: it needs keys such as 'schemes' and 'format'.")
    return document


def named_recipe(name: str) -> dict[str, Any]:
    """The document of a recipe that ships with m3quant."""
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.0)
        raise RecipeError(f"no recipe called '{name}': did you mean '{near[0]}'? Known: {', '.join(recipe_names())}.")
    return read_recipe_file(recipe_folder() / f"{name}.yaml")


def build_recipe(document: Mapping[str, Any], *, settings: Iterable[str] = (), format: str | None = None) -> Recipe:
    """Validate `document` with `--set role=scheme` settings and a `--format` laid over it."""
    schemes = document.get("schemes") or {}
    if not isinstance(schemes, Mapping):
        raise RecipeError(
            f"recipe key 'schemes' must map roles to schemes, for example routed_experts: int4-g128 (got {schemes!r})."
        )
    settings = list(settings)
    merged = {**document, "schemes": dict(schemes)}
    for setting in settings:
        role, separator, scheme = setting.partition("=")
        if not separator:
            raise RecipeError(f"--set {setting}: write role=scheme, for example --set routed_experts=int4-g32.")
        merged["schemes"][check_role(role.strip())] = scheme.strip()
        if role.strip() == "attention" and "indexer" not in {s.partition("=")[0].strip() for s in settings}:
            merged["schemes"].pop("indexer", None)  # follows attention: one fused projection in the engine
    if format is not None:
        merged["format"] = format
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(_sentence(error)) from None
    recipe._asked = frozenset(setting.partition("=")[0].strip() for setting in settings)
    return recipe


def with_data(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other calibration options. Raises RecipeError as `build_recipe`."""
    changed = build_recipe({**recipe.model_dump(), "data": {**recipe.data.model_dump(), **changes}})
    changed._asked = recipe._asked
    return changed


def _sentence(error: ValidationError) -> str:
    """The first complaint of pydantic as one sentence with the nearest valid key."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        keys = [*Recipe.model_fields, *AwqOptions.model_fields, *CalibrationOptions.model_fields]
        near = difflib.get_close_matches(str(first["loc"][-1]), keys, n=1, cutoff=0.0)[0]
        return f"recipe has an unknown key '{where}': did you mean '{near}'?"
    return f"recipe key '{where}': {first['msg']} (got {first['input']!r})."
