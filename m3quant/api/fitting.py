"""fit: the best recipe within a number of bytes or on a node, from planning's choices and a node's room for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..engines import engine_named
from ..errors import DoesNotFit, OptionError, PlanError
from ..planning.fit import Fitting, Point
from ..planning.plan import Plan
from ..planning.sensitivity import Sensitivity, check_source, check_text, load_sensitivity
from ..recipe.recipe import Recipe
from ..running.progress import ShowProgress, quietly
from ..running.words import human_bytes, parse_size, size_of
from ..runtime.fit import MIN_CONTEXT, Ask, Fit, assess
from ..runtime.hardware import Node, parse_node
from ..runtime.model import Subject, open_subject
from ..runtime.room import NodeRooms, check_context, does_not_hold, nearest_node, node_rooms, unread, unsplittable
from .arguments import check_count, check_file, check_place, check_serving, check_size, check_texts, check_word
from .planning import open_source

DEFAULT_CONTEXT = 32768  # tokens, where a node is given without --context


@dataclass(frozen=True)
class Asked:
    """budget: bytes of the output. node: its name. serving: fields of runtime.fit.Ask. Of budget and node at most one."""

    budget: int | None = None
    node: str | None = None
    serving: Mapping[str, Any] = field(default_factory=dict)
    sensitivity: Path | None = None
    corpus: tuple[str, ...] | None = None  # of --calibration; None: whatever the sensitivity file was measured on
    revision: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)  # of the recipe

    def with_sensitivity(self, path: Path) -> Asked:
        return replace(self, sensitivity=path)


@dataclass(frozen=True)
class Row:
    """A point of the frontier, and what a node serves with it."""

    point: Point
    longest_context: int | None


@dataclass(frozen=True)
class Answer:
    """recipe, plan, chosen: of the budget; None where none was given. verdict: what the node serves with it."""

    checkpoint: Checkpoint
    asked: Asked
    ask: Ask | None
    sensitivity: Sensitivity | None
    rows: list[Row]
    refused: Mapping[tuple[str, str], str]
    chosen: Point | None = None
    plan: Plan | None = None
    verdict: Fit | None = None

    @property
    def recipe(self) -> Recipe | None:
        return self.plan.recipe if self.plan else None


def option_of(name: str) -> str:
    """The option of the command line that is this field of runtime.fit.Ask."""
    return {"utilization": "--gpu-memory-utilization", "release": "--engine-release"}.get(
        name, f"--{name.replace('_', '-')}"
    )


def budget_of(budget: int | str | None) -> int | None:
    """Bytes, or a size such as "118.4GiB". Raises OptionError."""
    try:
        return parse_size(budget) if isinstance(budget, str) else budget
    except ValueError as error:
        raise OptionError(f"--budget: {error}.") from None


def fit(
    src: str | Path | Checkpoint,
    *,
    budget: int | str | None = None,
    node: str | None = None,
    serving: Mapping[str, Any] | None = None,
    sensitivity: str | Path | None = None,
    measure: bool = False,
    calibration: Sequence[str] = (),
    windows: int | None = None,
    heldout_windows: int | None = None,
    device: str = "auto",
    revision: str | None = None,
    progress: ShowProgress = quietly,
    cache_disk: int | str | None = None,
) -> Answer:
    """The best recipe for `src` (a folder, a Hub repo, or a config.json alone), layer by layer.

    budget: bytes of the output ("8MB", "118.4GiB"). node ("1xH200") with `serving` (fields of runtime.fit.Ask: context,
    concurrency, kv_dtype, ...): what it holds. With neither, only the frontier. "Best" is the least predicted KL divergence
    from the file `sensitivity`; without one, bits are spread evenly. measure: write that file first (NAME.sensitivity.json if
    it has no name), on `windows` and `heldout_windows` of `calibration`; this reads every weight and needs torch.
    cache_disk ("60GB", or bytes): what shards of a source on the Hub or in an object store may take on the disk at a time meanwhile.
    Raises OptionError, PlanError for a budget below the least, DoesNotFit for a node.
    """
    check_word(node=node, device=device, revision=revision)
    check_file(sensitivity=sensitivity)
    check_texts(calibration=calibration)
    check_count(windows=windows, heldout_windows=heldout_windows)
    check_size(budget=budget, cache_disk=cache_disk)
    check_serving(serving)
    given = dict(serving or {})
    if budget is not None and node is not None:
        raise OptionError("--budget and --on are both given: a node is a budget worked out; give one.")
    if given and node is None:
        raise OptionError(f"{option_of(next(iter(given)))} says how a node serves: add --on NODE.")
    if not measure and (windows or heldout_windows):
        raise OptionError("--windows and --heldout-windows say how to measure: add --measure.")
    if not measure and cache_disk is not None:
        raise OptionError("--cache-disk is about shards that are read to measure: add --measure.")
    asked = Asked(
        budget=budget_of(budget),
        node=node,
        serving=given,
        sensitivity=None if sensitivity is None else Path(sensitivity),
        corpus=tuple(calibration) or None,
        revision=revision,
    )
    if not isinstance(src, Checkpoint):
        check_place(src=src)
    checkpoint = src if isinstance(src, Checkpoint) else open_source(src, revision)
    where = checkpoint.root if isinstance(src, Checkpoint) else str(src)
    if measure:
        from .measuring import measure_file

        path = asked.sensitivity or Path(f"{Path(where).resolve().name}.sensitivity.json")
        measure_file(
            checkpoint, path, device, tuple(calibration), windows, heldout_windows, progress, size_of(cache_disk)
        )
        asked = asked.with_sensitivity(path)
    return answer(checkpoint, where, asked)


def ask_of(given: Mapping[str, Any], subject: Subject) -> Ask:
    """How the node is to serve. Raises NodeError for a context beyond config.json's."""
    most = subject.stored.max_positions or DEFAULT_CONTEXT
    ask = Ask(**{"context": min(DEFAULT_CONTEXT, most), **given})
    check_context(subject, ask)
    return ask


def answer(checkpoint: Checkpoint, src: str, asked: Asked) -> Answer:
    """Raises PlanError for a budget below the least, DoesNotFit for a node, OptionError for a file of another source or text."""
    node = parse_node(asked.node) if asked.node is not None else None
    subject = open_subject(src, asked.revision)
    ask = ask_of(asked.serving, subject) if node else None
    sensitivity = _sensitivity(checkpoint, subject, asked)
    fitting = Fitting(checkpoint, asked.data, sensitivity)
    if node is None:
        rows = _rows(fitting, None, None, None)
        found = Answer(checkpoint, asked, None, sensitivity, rows, fitting.choices.refused)
        return found if asked.budget is None else _within_output(found, fitting, subject, asked.budget)
    assert ask is not None
    rooms = _rooms(fitting, subject, node, ask)
    chosen = fitting.within_rooms(rooms.rooms, rooms.costs)
    if chosen is None:
        raise does_not_hold(subject, rooms, ask, fitting.recipe(fitting.least), fitting.choices.refused)
    plan = fitting.plan(chosen)
    verdict = assess(subject.converted(plan.recipe), node, ask)
    if not verdict.fits:
        raise DoesNotFit(f"{node.name}: {verdict.why_not}.")
    point = replace(fitting.point(chosen), nbytes=plan.output_bytes)
    rows = _rows(fitting, subject, node, ask, rooms)
    return Answer(checkpoint, asked, ask, sensitivity, rows, fitting.choices.refused, point, plan, verdict)


def _sensitivity(checkpoint: Checkpoint, subject: Subject, asked: Asked) -> Sensitivity | None:
    if asked.sensitivity is None:
        return None
    found = load_sensitivity(asked.sensitivity)
    check_source(found, asked.sensitivity, checkpoint, subject.family.model_type)
    if asked.corpus is not None:
        check_corpus(found, asked.sensitivity, checkpoint, asked.corpus)
    return found


def check_corpus(found: Sensitivity, path: Path, checkpoint: Checkpoint, corpus: tuple[str, ...]) -> None:
    """Raise OptionError unless `found` was measured on this text, given as of --calibration."""
    from ..calibration.corpus import load_tokenizer, tokenizer_sha256
    from ..calibration.mixture import mixture_sha256, parse_mixture

    tokenizer = load_tokenizer(checkpoint.root)
    names = ", ".join(Path(spec).name for spec in corpus) or "the bundled corpus"
    check_text(found, path, mixture_sha256(parse_mixture(corpus)), tokenizer_sha256(tokenizer), names)


def _rooms(fitting: Fitting, subject: Subject, node: Node, ask: Ask) -> NodeRooms:
    if why := engine_named(ask.engine).release_refusal(subject.family, (), ask.release):
        raise DoesNotFit(f"{subject.where} on {node.name}: {why}.")
    fitting.refuse(unread(subject, ask, fitting.choices.by_role))
    least = fitting.recipe(fitting.least)
    first = assess(subject.converted(least), node, ask)
    fitting.refuse(unsplittable(subject, first, fitting.choices.by_role))
    return node_rooms(subject, node, ask, fitting.recipe(fitting.least), fitting.choices)


def _within_output(found: Answer, fitting: Fitting, subject: Subject, budget: int) -> Answer:
    best = fitting.within_output(budget)
    if best is None:
        least = fitting.plan(fitting.least)
        near = nearest_node(subject, Ask(context=_least_context(subject), kv_dtype="fp8"), least.recipe)
        holds = f" The nearest standard node that serves it is {near}." if near else ""
        raise PlanError(
            f"--budget {budget:,}: the smallest output of {found.checkpoint.root} has {least.output_bytes:,} bytes "
            f"({human_bytes(least.output_bytes)}), so that {least.output_bytes - budget:,} bytes are missing.{holds}"
        )
    chosen, plan = best
    return replace(found, chosen=replace(fitting.point(chosen), nbytes=plan.output_bytes), plan=plan)


def _least_context(subject: Subject) -> int:
    return min(MIN_CONTEXT, subject.stored.max_positions or MIN_CONTEXT)


MOST_ROWS = 16


def _rows(
    fitting: Fitting, subject: Subject | None, node: Node | None, ask: Ask | None, rooms: NodeRooms | None = None
) -> list[Row]:
    """Points of the frontier, at most MOST_ROWS at about equal distances in bytes."""
    points = [fitting.point(chosen) for chosen in fitting.frontier(rooms.costs if rooms else None)]
    rows = []
    for point in _spread(points):
        longest = None
        if subject and node and ask:
            recipe = fitting.recipe_of(point.schemes)
            longest = assess(subject.converted(recipe), node, ask).longest_context
        rows.append(Row(point, longest))
    return rows


def _spread(points: list[Point]) -> list[Point]:
    if len(points) <= MOST_ROWS:
        return points
    first, last = points[0].nbytes, points[-1].nbytes
    kept: dict[int, Point] = {}
    for point in points:
        kept.setdefault(int((MOST_ROWS - 1) * (point.nbytes - first) / max(1, last - first)), point)
    return [*kept.values()]
