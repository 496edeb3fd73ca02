"""A conversion whose recipe is fitted to a budget: measure, choose, hand the recipe over. Each of the two passes is said beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..running.progress import ShowProgress
from .fitting import Answer, Asked, answer, budget_of

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..planning.plan import Plan


def asked_of(
    budget: int | str | None, node: str | None, serving: Mapping[str, Any], sensitivity: Path | None, recipe_given: bool
) -> Asked | None:
    """The question that these options ask; None without --budget and --fit. Raises OptionError where they do not go together."""
    given = {name: value for name, value in serving.items() if value is not None}
    if budget is None and node is None:
        if extra := [*given, *(["sensitivity"] if sensitivity else [])]:
            raise OptionError(
                f"--{extra[0].replace('_', '-')} is about fitting: give --budget SIZE or --fit NODE with it."
            )
        return None
    if budget is not None and node is not None:
        raise OptionError("--budget and --fit are both given: a node is a budget worked out; give one.")
    if given and node is None:
        raise OptionError(f"--{next(iter(given)).replace('_', '-')} says how a node serves: give --fit NODE with it.")
    if recipe_given:
        raise OptionError(
            "--budget and --fit make the recipe: leave --to, --recipe, --set and --format out, or write it with "
            "m3quant fit --recipe-out, edit it, and convert with --recipe."
        )
    return Asked(budget=budget_of(budget), node=node, serving=given, sensitivity=sensitivity)


def fitted(
    checkpoint: Checkpoint, src: str, dst: Path, asked: Asked, enough: Callable[[Plan], Plan], device: str, corpus: tuple[str, ...],
    dry_run: bool, progress: ShowProgress, cache_disk: int | None,
) -> Answer:  # fmt: skip
    """The recipe for this budget, measured first where there is no sensitivity file. Refusals come before measuring.

    enough: a plan with as much text as the machine has time for. dry_run: nothing is measured. cache_disk: as of `measure_file`.
    """
    from .measuring import measure_file

    path = asked.sensitivity or dst.with_name(f"{dst.name}.sensitivity.json")
    asked = replace(asked, sensitivity=None)
    first = answer(checkpoint, src, asked)
    assert first.plan is not None
    asked = replace(asked, data=enough(first.plan).recipe.data.model_dump())
    if dry_run and not path.exists():
        _say(progress, f"{path} does not exist: the plan is by bytes alone; the conversion measures first.")
        return answer(checkpoint, src, asked)
    _check_places(first.plan, dst, cache_disk)
    if path.exists():
        _say(progress, f"sensitivity: {path}")
    else:
        _say(
            progress,
            f"two passes over the weights: the first measures what each scheme costs in each layer ({path}), the second converts",
        )
        measure_file(checkpoint, path, device, corpus, progress=progress, cache_disk=cache_disk)
    return answer(checkpoint, src, replace(asked, sensitivity=path, corpus=corpus))


def _check_places(plan: Plan, dst: Path, cache_disk: int | None) -> None:
    from ..convert.conversion import check_places
    from ..convert.job import Settings

    check_places(plan, dst, Settings(cache_disk=cache_disk))


def _say(progress: ShowProgress, line: str) -> None:
    with progress("fit") as shown:
        shown.say(line)
