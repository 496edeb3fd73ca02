"""plan: from headers alone, what a conversion would write and need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checkpoint import Checkpoint
from ..planning.headers import from_config
from ..planning.plan import Plan, make_plan
from ..recipe.choice import RecipeChoice
from .arguments import check_file, check_place, check_texts, check_word


def open_source(src: str | Path, revision: str | None = None) -> Checkpoint:
    """A folder, a Hub repo (a few range requests), or a config.json alone. Raises CheckpointError."""
    return from_config(Path(src)) if str(src).endswith(".json") else Checkpoint.open(src, revision)


def plan(
    src: str | Path | Checkpoint,
    to: str | None = None,
    *,
    recipe: str | Path | None = None,
    settings: Sequence[str] = (),
    format: str | None = None,
    requantize: bool = False,
    scheme: str | None = None,
    revision: str | None = None,
) -> Plan:
    """What happens to every tensor of `src` (kept, quantized to what, dropped, and why), in exact bytes. Reads headers only.

    to: a recipe that ships with m3quant ("awq" without it and without `recipe`). recipe: a YAML file instead, m3quant's or
    llm-compressor's. settings: "role=scheme" or "role@layers=scheme" laid over it. format: of the output. requantize: take a
    source that is in integers already. scheme: one for all roles, in place of a recipe ("W4A16", "int4-g32"). Raises CheckpointError, RecipeError, or PlanError for an engine rule that would be broken.
    """
    if not isinstance(src, Checkpoint):
        check_place(src=src)
    check_word(to=to, format=format, scheme=scheme, revision=revision)
    check_file(recipe=recipe)
    check_texts(settings=settings)
    checkpoint = src if isinstance(src, Checkpoint) else open_source(src, revision)
    choice = RecipeChoice(to, None if recipe is None else Path(recipe), tuple(settings), format, requantize, scheme)
    planned = make_plan(checkpoint, choice.recipe(checkpoint.config))
    choice.check_used(checkpoint.root, planned.recipe.requantize)
    return planned
