"""convert --budget and --fit: measure, choose, and hand the recipe over; each of the two passes is said beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import OptionError
from ..runtime.hardware import MAX_COUNT
from .fit_question import Answer, Asked, answer, budget_of

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..planning.plan import Plan
    from ..recipe.recipe import CalibrationOptions

F = TypeVar("F", bound=Callable[..., Any])

SERVING = ("context", "concurrency", "kv_dtype")


def fit_options(function: F) -> F:
    """--budget, --fit and what belongs to them."""
    tokens = click.IntRange(1, MAX_COUNT)
    for option in reversed((
        click.option("--budget", metavar="SIZE", default=None, help="Bytes of the output: the best bits for every layer within them."),
        click.option("--fit", "node", metavar="NODE", default=None, help="The same for a node: what it holds beside --context."),
        click.option("--context", type=tokens, default=None, help="With --fit: tokens of one request. [32768]"),
        click.option("--concurrency", type=tokens, default=None, help="With --fit: requests of that length at once. [1]"),
        click.option("--kv-dtype", default=None, help="With --fit: auto, bfloat16, fp8, fp8_e4m3 or fp8_e5m2. [auto]"),
        click.option(
            "--sensitivity", "sensitivity_file", type=click.Path(path_type=Path), default=None,
            help="With --budget or --fit: read it if it exists, else measure and write it. [DST.sensitivity.json]",
        ),
    )):  # fmt: skip
        function = option(function)
    return function


def asked_of(
    budget: str | None, node: str | None, serving: dict[str, Any], sensitivity: Path | None, recipe_given: bool
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
    checkpoint: Checkpoint, src: str, dst: Path, asked: Asked, data: CalibrationOptions, enough: Callable[[Plan], Plan], device: str,
    corpus: tuple[str, ...], dry_run: bool,
) -> Answer:  # fmt: skip
    """The recipe for this budget, measured first where there is no sensitivity file. Refusals come before measuring.

    data: of the recipe. enough: a plan with as much text as the machine has time for. dry_run: nothing is measured.
    """
    from .fit_measure import measure_file

    path = asked.sensitivity or dst.with_name(f"{dst.name}.sensitivity.json")
    asked = replace(asked, sensitivity=None, data=data.model_dump())
    first = answer(checkpoint, src, asked)
    assert first.plan is not None
    asked = replace(asked, data=enough(first.plan).recipe.data.model_dump())
    if dry_run and not path.exists():
        click.echo(f"{path} does not exist: the plan is by bytes alone; the conversion measures first.", err=True)
        return answer(checkpoint, src, asked)
    _check_places(first.plan, dst)
    if path.exists():
        click.echo(f"sensitivity: {path}", err=True)
    else:
        click.echo(
            f"two passes over the weights: the first measures what each scheme costs in each layer ({path}), the second converts",
            err=True,
        )
        measure_file(checkpoint, path, device, corpus)
    return answer(checkpoint, src, replace(asked, sensitivity=path, corpus=corpus))


def _check_places(plan: Plan, dst: Path) -> None:
    from ..convert.conversion import check_places

    check_places(plan, dst)


def predicted_line(found: Answer, manifest: dict[str, Any]) -> str:
    """Predicted beside measured KL divergence, for a person."""
    kl = found.chosen.kl if found.chosen else None
    quality = manifest.get("heldout")
    if kl is None or not quality:
        return ""
    return f"KL divergence: predicted {kl:.5f}, measured {quality['kl_mean']:.5f} on the held-out windows"
