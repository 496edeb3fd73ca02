"""Everything the model card states, gathered from the output's own files. Nothing here is written by hand or guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import EvalResult

from ..artifact.conversion_eval import output_fingerprint
from ..artifact.eval_record import EvalRecord
from ..checkpoint import Checkpoint
from ..checkpoint.bounded import TEXT_BYTES, read_text
from ..engines import DEFAULT
from ..engines.drafts import Draft
from ..engines.rules import activation_notes
from ..engines.stated import config_schemes
from ..families import Family, family_of
from ..planning.plan import RECIPE_FILE
from ..planning.quantizers import facts_of
from ..recipe.recipe import Recipe, build_recipe
from .base import Base
from .drafts import referenced
from .hub_benchmarks import BenchmarkResult, read_benchmarks
from .licences import Licence
from .results import EvalTable, hub_results, missing, read_eval, tables, tested_tokens

IGNORED_KEYS = ("ignore", "modules_to_not_convert", "ignored_layers")  # by format, in quantization_config
PLACEHOLDER_REPO = "ORG/NAME"


class Speed(Protocol):
    """A `m3quant.runtime.serving_table.MeasuredSpeed`."""

    @property
    def requests(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def sources(self) -> tuple[str, ...]: ...


class Serving(Protocol):
    """A row of `m3quant.runtime.serving_table.serving_table`."""

    @property
    def node(self) -> str: ...
    @property
    def fits(self) -> bool: ...
    @property
    def kv_dtype(self) -> str: ...
    @property
    def pool_tokens(self) -> int: ...
    @property
    def longest_context(self) -> int: ...
    @property
    def command(self) -> str: ...
    @property
    def why_not(self) -> str: ...
    @property
    def speeds(self) -> Sequence[Speed]: ...


@dataclass
class CardFacts:
    """The template's whole context. base and licence are None, with the reason in `unknown`, where a gate refused them."""

    name: str
    repo: str | None
    base: Base | None
    licence: Licence | None
    unknown: dict[str, str]
    manifest: dict[str, Any]
    config: dict[str, Any]
    recipe: Recipe
    recipe_text: str
    family: Family
    excluded: list[str]
    parameters: int
    eval_tables: list[EvalTable]
    eval_about: dict[str, Any] | None
    eval_missing: list[str]
    hub_evals: list[EvalResult]
    benchmarks: list[BenchmarkResult]
    tested_tokens: int | None
    serving: Sequence[Serving]
    notes: list[str] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)

    @property
    def download(self) -> str:
        """How commands name the checkpoint."""
        return self.repo or PLACEHOLDER_REPO

    @property
    def quantized(self) -> list[dict[str, Any]]:
        return [row for row in self.manifest["roles"] if row["action"] != "copy" or row["scheme"] != "keep"]

    @property
    def kept(self) -> list[dict[str, Any]]:
        return [row for row in self.manifest["roles"] if row["action"] == "copy" and row["scheme"] == "keep"]

    @property
    def folded(self) -> bool:
        """Whether kept tensors may hold folded scales."""
        return facts_of(self.recipe.rounding).folds and self.recipe.awq.smooth

    @property
    def engine_notes(self) -> tuple[str, ...]:
        return activation_notes(self.family, self.recipe.schemes_of("routed_experts"), self.recipe.format)

    @property
    def speed_sources(self) -> list[str]:
        """Where the speeds of the serving rows were measured, each once."""
        return list(dict.fromkeys(source for row in self.serving for speed in row.speeds for source in speed.sources))

    @property
    def first_release(self) -> str:
        """The engine's oldest release that reads the checkpoint, as `NAME VERSION`; '' where every known one does."""
        release = DEFAULT.first_release(self.family, config_schemes(self.config))
        return f"{DEFAULT.title} {release}" if release else ""

    @property
    def max_context(self) -> int | None:
        """Longest context that config.json allows, in tokens; None where it does not say."""
        return self.family.max_positions

    @property
    def selected_tokens(self) -> int:
        return self.family.selected_tokens

    @property
    def multimodal(self) -> bool:
        return any(row["role"] == "vision" for row in self.manifest["roles"])


def gather(
    out: Path,
    checkpoint: Checkpoint,
    manifest: dict[str, Any],
    base: Base | None,
    licence: Licence | None,
    unknown: Mapping[str, str],
    repo: str | None,
    serving: Sequence[Serving],
    drafts: Sequence[str] = (),
) -> CardFacts:
    """Read `out`, opened as `checkpoint`, and return what the card says. Raises CheckpointError, RecipeError or PublishError (eval.json, drafts)."""
    record = read_eval(out, output_fingerprint(checkpoint, manifest))
    text = read_text(out / RECIPE_FILE, TEXT_BYTES)
    family = family_of(checkpoint.config, f"{out}/config.json")
    return CardFacts(
        name=repo.split("/")[-1] if repo else out.resolve().name,
        repo=repo,
        base=base,
        licence=licence,
        unknown=dict(unknown),
        manifest=manifest,
        config=checkpoint.config,
        recipe=build_recipe(manifest["recipe"]),
        recipe_text=text.rstrip(),
        family=family,
        excluded=excluded_modules(checkpoint.config),
        parameters=parameters(manifest),
        eval_tables=tables(record) if record else [],
        eval_about=_about(record) if record else None,
        eval_missing=missing(record),
        hub_evals=hub_results(record),
        benchmarks=read_benchmarks(out),
        tested_tokens=tested_tokens(record, manifest),
        serving=serving,
        notes=list(manifest["notes"]),
        drafts=referenced(drafts, family),
    )


def _about(record: EvalRecord) -> dict[str, Any]:
    """The record's head, `computed` as one sentence or None."""
    about: dict[str, Any] = json.loads(record.model_dump_json(exclude={"results", "layers", "coverage", "computed"}))
    return {**about, "computed": record.computed.sentence if record.computed else None}


def excluded_modules(config: Mapping[str, Any]) -> list[str]:
    """Modules, or regexes of them, that engines leave unquantized according to config.json."""
    quantization = config.get("quantization_config") or {}
    return sorted({str(m) for key in IGNORED_KEYS for m in quantization.get(key) or ()})


def parameters(manifest: Mapping[str, Any]) -> int:
    """Elements of all source tensors, scales not counted (the manifest lists a scale with its tensor)."""
    return sum(prod(facts["shape"]) for facts in manifest["source"]["tensors"].values())
