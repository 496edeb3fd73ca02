"""Recipes: which role gets which scheme, in which format, calibrated or not. Roles and layers, never regexes.

Precedence: options on the command line beat the recipe file, the file beats the defaults here. Within a recipe a layer's
own scheme (`layers`) beats the role's (`schemes`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from ..checkpoint.bounded import read_yaml
from ..errors import RecipeError
from ..families.base import KEPT, QUANTIZABLE, Family
from ..running.complaints import complaint, given, key_of
from ..schemes import KEEP, Scheme, parse_scheme
from .layer_ranges import parse_layers, show_layers
from .nearest import meant

Rounding = Literal["nearest", "awq", "feedback"]
CALIBRATION_OF = {"nearest": "none", "awq": "awq", "feedback": "text"}  # the `calibration` key that goes with each


class AwqOptions(BaseModel):
    """Knobs of the scale and range search. The fixtures' figures were made with the defaults."""

    model_config = ConfigDict(extra="forbid")

    smooth: bool = True  # search a fold scale per norm, and per expert w3 -> w2 where that is exact
    range_search: bool = True  # search the rounding range of every group
    signed_scales: bool = True  # a negative scale where a group's largest weight is positive (symmetric schemes)
    n_grid: int = Field(default=20, ge=1, le=200)  # ratios tried, evenly from 0 to 1, identity besides
    duo_scaling: bool = True  # s = x^r / w^(1-r), w the weights' own mean magnitude, as AutoAWQ does, instead of x^r


class FeedbackOptions(BaseModel):
    """Knobs of rounding with error feedback. The fixtures' figures were made with the defaults."""

    model_config = ConfigDict(extra="forbid")

    source_targets: bool = True  # aim at the outputs of the source model's stream, not at the weight's own
    residual: bool = True  # o_proj and w2 compensate the residual stream's error too
    # Of coordinate descent and scale refit after the first sweep; None: as many as pay at a weight's bits (planning/quantizers.py).
    rounds: int | None = Field(default=None, ge=0, le=100)
    refit: bool = True  # least-squares scales for fixed codes
    signed_scales: bool = True  # a negative scale where a group's largest weight is positive (symmetric schemes)


SHORTEST_WINDOW = 16  # tokens


class CalibrationOptions(BaseModel):
    """How much text the calibrated path uses."""

    model_config = ConfigDict(extra="forbid")

    windows: int = Field(default=128, ge=1)
    window_length: int = Field(default=512, ge=SHORTEST_WINDOW)
    heldout_windows: int = Field(
        default=16, ge=0
    )  # more windows, never used for statistics: perplexity before and after
    min_expert_tokens: int = Field(default=32, ge=0)
    seed: int = 0
    # mixed: some windows are joined with those after them (planning/calibration_text.py); held-out ones are not
    lengths: Literal["one", "mixed"] = "one"

    @model_serializer(mode="wrap")
    def _without_one_length(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes older than `lengths` are written as they were."""
        out: dict[str, Any] = handler(self)
        return {key: value for key, value in out.items() if key != "lengths" or value != "one"}


class ModelOfLayers(BaseModel):
    """The model whose layers a recipe numbers: its config's model_type and number of layers."""

    model_config = ConfigDict(extra="forbid")

    type: str
    layers: int = Field(ge=1)

    @classmethod
    def of(cls, family: Family) -> ModelOfLayers:
        return cls(type=family.model_type, layers=family.num_layers)


class Recipe(BaseModel):
    """A validated recipe. `schemes` maps a role to a scheme name; roles without one stay unquantized.

    `layers` maps layers ("0-3,7") to the roles that have another scheme there. It is held in one form, whatever was
    written: each layer in one entry, together with the layers of the same schemes, in the order of the first layer.
    `model` says which model they are of; another one refuses the recipe.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = "custom"
    model: ModelOfLayers | None = None
    format: Literal["compressed-tensors", "autoawq", "fp8"] = "compressed-tensors"
    calibration: Literal["awq", "text", "none"] = "none"
    rounding: Rounding = "nearest"
    schemes: dict[str, str] = Field(default_factory=dict)
    layers: dict[str, dict[str, str]] = Field(default_factory=dict)
    awq: AwqOptions = Field(default_factory=lambda: AwqOptions())
    feedback: FeedbackOptions = Field(default_factory=lambda: FeedbackOptions())
    data: CalibrationOptions = Field(default_factory=lambda: CalibrationOptions())
    requantize: bool = False  # take a source whose weights are integers already
    native: bool = False  # keep every weight as the source stores it, and describe that to engines (planning/native.py)
    _asked: frozenset[str] = PrivateAttr(default=frozenset())  # roles that the user gave a scheme outside the document

    @model_validator(mode="before")
    @classmethod
    def _complete_rounding(cls, document: Any) -> Any:
        """`rounding` and `calibration` follow from one another; recipes older than `rounding` name the latter alone."""
        if not isinstance(document, Mapping):
            return document
        calibration, rounding = document.get("calibration"), document.get("rounding")
        if rounding is None:
            rounding = {"awq": "awq", "text": "feedback"}.get(str(calibration), "nearest")
            return {**document, "rounding": rounding}
        fitting = CALIBRATION_OF.get(str(rounding))
        if fitting and calibration is None:
            return {**document, "calibration": fitting}
        if fitting and calibration in ("none", "awq", "text") and calibration != fitting:
            raise RecipeError(
                f"recipe keys 'rounding: {rounding}' and 'calibration: {calibration}' contradict one another: leave "
                f"'calibration' out, or write '{fitting}'."
            )
        return document

    @model_validator(mode="after")
    def _check_lengths(self) -> Recipe:
        if self.data.lengths == "mixed" and self.rounding != "feedback":
            raise RecipeError(
                f"windows of mixed lengths go with rounding: feedback, but recipe '{self.name}' has rounding: {self.rounding}: leave "
                "'lengths' (--window-lengths) out, or choose another rounding."
            )
        return self

    @model_validator(mode="after")
    def _check_native(self) -> Recipe:
        """A native recipe rounds nothing, so that whatever else it said about weights would not happen."""
        said = {
            "schemes (--set)": bool(self.schemes or self.layers),
            f"format {self.format} (--format)": self.format != "compressed-tensors",
            f"rounding: {self.rounding}": self.calibrated,
        }
        if self.native and (idle := [words for words, given in said.items() if given]):
            raise RecipeError(
                f"recipe '{self.name}' keeps every weight as the source stores it, in compressed-tensors' words: leave "
                f"{' and '.join(idle)} out, or choose another recipe (--to awq)."
            )
        return self

    def __eq__(self, other: object) -> bool:
        """Whether both are written in the same way; which options gave a scheme does not count."""
        return isinstance(other, Recipe) and self.dump() == other.dump()

    @property
    def calibrated(self) -> bool:
        """Whether rounding reads calibration text, and layers therefore depend on one another."""
        return self.rounding != "nearest"

    @field_validator("schemes")
    @classmethod
    def _check_schemes(cls, schemes: dict[str, str]) -> dict[str, str]:
        return {check_role(role): parse_scheme(text).name for role, text in schemes.items()}

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, layers: Any) -> dict[str, dict[str, str]]:
        return join_layers(split_layers(layers))

    @model_serializer(mode="wrap")
    def _without_what_follows(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys without content are left out: no layers, options of another rounding, and a rounding that `calibration`
        implies, so that recipes older than these keys are written as they were."""
        out: dict[str, Any] = handler(self)
        empty = {
            "model": self.model is None,
            "layers": not self.layers,
            "feedback": self.rounding != "feedback",
            "awq": self.rounding == "feedback",
            "rounding": self.rounding != "feedback",
            "requantize": not self.requantize,
            "native": not self.native,
        }
        return {key: value for key, value in out.items() if not empty.get(key, False)}

    @cached_property
    def layer_schemes(self) -> dict[int, dict[str, Scheme]]:
        """layer -> role -> scheme, of the layers in `layers`. Engines fuse attention and the indexer, so that a layer's
        indexer follows its attention unless it is named too."""
        found: dict[int, dict[str, Scheme]] = {}
        for layer, roles in split_layers(self.layers).items():
            found[layer] = {role: parse_scheme(text) for role, text in roles.items()}
            if "attention" in roles:
                found[layer].setdefault("indexer", found[layer]["attention"])
        return found

    def scheme(self, role: str, layer: int | None = None) -> Scheme:
        """The scheme of a role, in a layer if one is given. The indexer follows attention unless it is named, because
        engines fuse the two."""
        own = self.layer_schemes.get(layer, {}) if layer is not None else {}
        if role in own:
            return own[role]
        if role == "indexer" and role not in self.schemes:
            role = "attention"
        return parse_scheme(self.schemes[role]) if role in self.schemes else KEEP

    def schemes_of(self, role: str) -> set[Scheme]:
        """Every scheme that the recipe gives to this role in any layer, its default included."""
        return {self.scheme(role), *(self.scheme(role, layer) for layer in self.layer_schemes)}

    def dump(self) -> str:
        """The recipe as YAML: what `recipe.yaml` of every output holds."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def for_family(recipe: Recipe, family: Family) -> tuple[Recipe, list[str]]:
    """The recipe applied to this model, and notes on what that changes.

    Where a model has no routed experts, its dense MLPs are the bulk of its weights and take the experts' scheme, unless
    the user gave them their own; attention keeps what the recipe says. The result no longer names routed experts, so that
    it means the same when it is read again. Raises RecipeError for a recipe that is fitted to another model.
    """
    own = ModelOfLayers.of(family)
    if recipe.model not in (None, own):
        raise RecipeError(
            f"recipe '{recipe.name}' is fitted to {recipe.model.type} with {recipe.model.layers} layers, but this model is "
            f"{own.type} with {own.layers}: make one for it with m3quant fit, or take 'model' and 'layers' out of the recipe."
        )
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


def split_layers(layers: object) -> dict[int, dict[str, str]]:
    """`layers` of a recipe by layer: {layer: {role: scheme name}}. Raises RecipeError for anything else, and where one
    layer is given two schemes for a role."""
    if layers is None:
        return {}
    if not isinstance(layers, Mapping):
        raise RecipeError(f"recipe key 'layers' {_LAYERS_FORM} (got {_short(layers)}).")
    found: dict[int, dict[str, str]] = {}
    for text, roles in layers.items():
        if not isinstance(roles, Mapping):
            raise RecipeError(f"recipe key 'layers.{_short(text)}' {_LAYERS_FORM} (got {_short(roles)}).")
        named = {check_role(str(role)): parse_scheme(str(scheme)).name for role, scheme in roles.items()}
        for layer in parse_layers(str(text), "recipe key 'layers'"):
            own = found.setdefault(layer, {})
            if twice := sorted(named.keys() & own.keys()):
                raise RecipeError(
                    f"recipe key 'layers' gives layer {layer} two schemes for {twice[0]}: {own[twice[0]]} and {named[twice[0]]}; keep one."
                )
            own.update(named)
    return found


def join_layers(by_layer: Mapping[int, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """The inverse of `split_layers`: layers with the same schemes in one entry, in the order of their first layer."""
    alike: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for layer in sorted(by_layer):
        if by_layer[layer]:
            roles = sorted(by_layer[layer].items(), key=lambda item: QUANTIZABLE.index(item[0]))
            alike.setdefault(tuple(roles), []).append(layer)
    return {show_layers(layers): dict(roles) for roles, layers in alike.items()}


_LAYERS_FORM = 'must map layers to roles and schemes, for example "0-3,7": {routed_experts: int3-g128-asym}'


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_role(role: str) -> str:
    """The role itself, or a RecipeError that names the nearest valid role or says why this one is kept."""
    if role in QUANTIZABLE:
        return role
    if re.fullmatch(r"(?:routed_)?experts?\W.*|w[123]", role):
        raise RecipeError(
            f"'{role[:60]}' is a part of routed_experts: w1, w2 and w3 of all experts of a layer have one scheme, "
            "because engines run them as one module. Give routed_experts a scheme; layers may differ (key 'layers')."
        )
    if role in KEPT:
        raise RecipeError(f"role '{role}' cannot be given a scheme: {KEPT[role]}. Leave it out of the recipe.")
    near = next((known for known in QUANTIZABLE if role and role in known), None)
    near = near or difflib.get_close_matches(role, QUANTIZABLE, n=1, cutoff=0.0)[0]
    raise RecipeError(f"unknown role '{role}': did you mean '{near}'? Roles: {', '.join(QUANTIZABLE)}.")


RELEASE_NAMES = ("native",)  # only a release of M3.1 is in the layouts that it is about


def recipe_folder() -> Path:
    from importlib.resources import files

    return Path(str(files("m3quant.recipes")))


def recipe_names() -> list[str]:
    """Names that `--to` takes for any model. Recipes of one release (`fit-`, and those of `RELEASE_NAMES`) and choices for serving
    (`serve-`) are not among them."""
    names = sorted(p.stem for p in recipe_folder().glob("*.yaml") if not p.stem.startswith(("fit-", "serve-")))
    return [name for name in names if name not in RELEASE_NAMES]


def fitted_names() -> list[str]:
    """Names that `--to` takes for one release: its layers fitted to a node by `m3quant fit`, whose command heads each file."""
    return sorted(p.stem for p in recipe_folder().glob("fit-*.yaml"))


def every_name() -> list[str]:
    """All names that `--to` takes."""
    return [*recipe_names(), *fitted_names(), *RELEASE_NAMES]


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """The YAML mapping in `path`. Raises RecipeError with the parser's line for anything else."""
    if not Path(path).exists():
        raise RecipeError(
            f"recipe {path} does not exist: give a YAML file, or --to with one of {', '.join(recipe_names())}."
        )
    document = read_yaml(Path(path), "recipe", error=RecipeError)
    if not isinstance(document, dict):
        raise RecipeError(f"recipe {path} holds no mapping: it needs keys such as 'schemes' and 'format'.")
    return document


def named_recipe(name: str) -> dict[str, Any]:
    """The document of a recipe in the package."""
    known = every_name()
    if name not in known:
        raise RecipeError(f"no recipe called '{name[:60]}': {meant(name, known)} Known: {', '.join(known)}.")
    return read_recipe_file(recipe_folder() / f"{name}.yaml")


def scheme_recipe(text: str) -> dict[str, Any]:
    """The document of one scheme for every role, by llm-compressor's name or ours: all linear layers but router and head.

    Raises RecipeError with the nearest name.
    """
    from .llmcompressor_schemes import is_preset, preset_scheme

    scheme = preset_scheme(text, "--scheme") if is_preset(text) else parse_scheme(text)
    rounding = "feedback" if scheme.kind == "int" else "nearest"
    return {"name": scheme.name, "rounding": rounding, "schemes": dict.fromkeys(QUANTIZABLE, scheme.name)}


def build_recipe(document: Mapping[str, Any], *, settings: Iterable[str] = (), format: str | None = None) -> Recipe:
    """Validate `document` with `--set role=scheme` settings and a `--format` applied."""
    schemes = document.get("schemes") or {}
    if not isinstance(schemes, Mapping):
        raise RecipeError(
            f"recipe key 'schemes' must map roles to schemes, for example routed_experts: int4-g128 (got {schemes!r})."
        )
    settings = list(settings)
    merged = {**document, "schemes": dict(schemes)}
    if settings:
        by_layer = split_layers(document.get("layers"))
        for setting in settings:
            _lay_over(setting, merged["schemes"], by_layer, {"".join(s.partition("=")[0].split()) for s in settings})
        merged["layers"] = join_layers(by_layer)
    if format is not None:
        merged["format"] = format
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(_sentence(error)) from None
    recipe._asked = frozenset(setting.partition("=")[0].strip() for setting in settings)
    return recipe


def with_requantize(recipe: Recipe, requantize: bool) -> Recipe:
    """The recipe as it takes sources whose weights are integers already, if `requantize`; else itself."""
    return recipe.model_copy(update={"requantize": True}) if requantize else recipe


def with_data(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other calibration options. Raises RecipeError as `build_recipe`."""
    changed = build_recipe({**recipe.model_dump(), "data": {**recipe.data.model_dump(), **changes}})
    changed._asked = recipe._asked
    return changed


def _lay_over(setting: str, schemes: dict[str, str], by_layer: dict[int, dict[str, str]], given: set[str]) -> None:
    """One `--set role=scheme` or `--set role@layers=scheme`. A role's scheme for all layers replaces those of single
    layers in the file. given: the left sides of all settings, without blanks."""
    target, separator, scheme = (part.strip() for part in setting.partition("="))
    role, at, layers = (part.strip() for part in target.partition("@"))
    if not separator or (at and not layers):
        raise RecipeError(
            f"--set {setting}: write role=scheme, for example --set routed_experts=int4-g32, or role@layers=scheme, for "
            "example --set routed_experts@0-3=int3-g128-asym."
        )
    roles = [check_role(role)]
    if role == "attention" and "".join(f"indexer{at}{layers}".split()) not in given:
        roles.append("indexer")  # follows attention: one fused projection in the engine
    if at:
        for layer in parse_layers(layers, f"--set {setting}"):
            own = by_layer.setdefault(layer, {})
            own[role] = scheme
            for follower in roles[1:]:
                own.pop(follower, None)
        return
    schemes[role] = scheme
    for follower in roles[1:]:
        schemes.pop(follower, None)
    for own in by_layer.values():
        for name in roles:
            own.pop(name, None)


def _sentence(error: ValidationError) -> str:
    """The first complaint of pydantic as one sentence with the nearest valid key."""
    first = error.errors()[0]
    where = key_of(first)
    if first["type"] == "extra_forbidden":
        keys = [
            *Recipe.model_fields,
            *AwqOptions.model_fields,
            *FeedbackOptions.model_fields,
            *CalibrationOptions.model_fields,
        ]
        near = difflib.get_close_matches(str(first["loc"][-1]), keys, n=1, cutoff=0.0)[0]
        return f"recipe has an unknown key '{where}': did you mean '{near}'?"
    return complaint(f"recipe key '{where}'", first) + f"{given(first)}."
