"""compare.html: several checkpoints of one source side by side. `page` is a pure function of their records and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any

from ..artifact.eval_record import EvalRecord, Result
from ..checkpoint import make_folder, write_bytes_atomic
from ..running.words import human_bytes
from .charts import bucket_chart, number, size_chart
from .evaluation_html import CELL_LEGEND, SHARES, buckets, share_cell
from .pages import Figure, Grid, Heading, Page, Part, Section, Table, Text
from .shapes import (
    floor_of,
    is_by_length,
    is_by_position,
    is_divergence,
    is_grid,
    is_measured_divergence,
    is_noise,
    is_perplexity,
)
from .verdict import LEVEL_WORDS, Finding, Verdict, change, level, of_evaluation

PAGE_FILE = "compare.html"
APART = 2.0  # standard errors between two mean divergences from which on they are called different


@dataclass(frozen=True)
class Compared:
    """A checkpoint of the comparison. nbytes: of its tensors."""

    name: str
    nbytes: int
    record: EvalRecord

    @property
    def run(self) -> list[Result]:
        return [result for result in self.record.results if result.not_run is None]

    @property
    def divergence(self) -> Result | None:
        return next(filter(is_measured_divergence, self.run), None)

    @property
    def kl(self) -> float | None:
        return self.divergence.metrics["kl_mean"] if self.divergence else None

    @property
    def floor(self) -> float | None:
        floor = floor_of(self.divergence, self.run) if self.divergence else None
        return floor.metrics["kl_mean"] if floor else None


def write_comparison(compared: Sequence[Compared], folder: Path) -> Path:
    """Write `page` into the folder, whole or not at all; returns the file. Raises StoppedError on a full disk."""
    make_folder(folder)
    path = folder / PAGE_FILE
    write_bytes_atomic(path, page(compared).encode())
    return path


def page(compared: Sequence[Compared]) -> str:
    """The comparison as one HTML document. compared: at least two, of one suite."""
    first = compared[0].record
    sections: list[tuple[str, list[Part]]] = [
        ("Size and divergence", _sizes(compared)),
        ("KL divergence by share of tokens", _by_share(compared)),
        ("KL divergence by position", _by_position(compared)),
        *_retrieval(compared),
        ("Error of every layer", _layers(compared)),
        ("Checkpoints", [_checkpoints(compared)]),
        ("Figures", _figures(compared)),
    ]
    source = f"against {first.source.name}" if first.source else "without a source"
    made = [f"suite {first.suite}, {source}", f"{first.finished} on {first.device}", f"m3quant {first.m3quant}"]
    title = " / ".join(one.name for one in compared)
    return Page(title, "comparison", made, [Section(*one) for one in sections], of_comparison(compared)).html()


def of_comparison(compared: Sequence[Compared]) -> Verdict:
    """Which is the closest, which the smallest, and which another one beats in both."""
    every = [of_evaluation(one.record) for one in compared]
    left = list(dict.fromkeys(line for verdict in every for line in verdict.not_tested))
    smallest = min(compared, key=lambda one: one.nbytes)
    findings = [_finding(one, compared, verdict) for one, verdict in zip(compared, every, strict=True)]
    measured = [one for one in compared if one.kl is not None]
    if len(measured) < len(compared):
        return Verdict(
            f"{smallest.name} is the smallest; how far each is from its source was not measured.", findings, left
        )
    closest = min(measured, key=lambda one: one.kl or 0.0)
    equal = [one.name for one in measured if one is not closest and not _apart(one, closest)]
    if unknown := [verdict for verdict in every if verdict.headline.startswith("No conclusion")]:
        headline = unknown[0].headline
    elif smallest is closest:
        headline = f"{closest.name} is both the smallest and the closest to the source."
    else:
        headline = f"{closest.name} is the closest to the source, {smallest.name} the smallest."
    if equal and not unknown:
        headline += f" {', '.join(equal)} cannot be told from {closest.name} by their divergence."
    return Verdict(headline, findings, left, LEVEL_WORDS)


def _finding(one: Compared, compared: Sequence[Compared], verdict: Verdict) -> Finding:
    """Size and divergence of one checkpoint; what stands out is named, and explained on its own page."""
    bad = [f"{finding.label}: {finding.value}" for finding in verdict.findings if finding.bad]
    stands_out = f"Stands out: {'; '.join(bad)}." if bad else ""
    size = human_bytes(one.nbytes)
    if one.kl is None:
        return Finding(one.name, size, stands_out or verdict.headline, bool(bad))
    better = [other.name for other in compared if _beats(other, one)]
    beaten = f"{' and '.join(better)} {'is' if len(better) == 1 else 'are'} smaller and closer." if better else ""
    perplexity = [f", perplexity {finding.value}" for finding in verdict.findings if finding.label.startswith("change")]
    value = f"{size}, KL {number(one.kl, 3)}{''.join(perplexity)}"
    said = [f"{level(one.kl, one.floor, 'It')}.", beaten, stands_out]
    return Finding(one.name, value, " ".join(filter(None, said)), bool(bad))


def _beats(other: Compared, one: Compared) -> bool:
    """Whether `other` is no larger and measurably closer, or smaller and no further."""
    if other is one or other.kl is None or one.kl is None:
        return False
    closer = other.kl < one.kl and _apart(other, one)
    return (other.nbytes <= one.nbytes and closer) or (other.nbytes < one.nbytes and other.kl <= one.kl)


def _apart(one: Compared, other: Compared) -> bool:
    """Whether two mean divergences differ by more than their standard errors explain."""
    if one.kl is None or other.kl is None or one.divergence is None or other.divergence is None:
        return False
    errors = [r.metrics.get("kl_mean_error", 0.0) for r in (one.divergence, other.divergence)]
    return abs(one.kl - other.kl) > APART * hypot(*errors)


def _sizes(compared: Sequence[Compared]) -> list[Part]:
    points = [(one.name, one.nbytes, one.kl) for one in compared if one.kl is not None]
    frontier = [one.name for one in compared if not any(_beats(other, one) for other in compared)]
    floor = next((one.floor for one in compared if one.floor is not None), None)
    chart = size_chart(points, frontier, floor)
    if not chart:
        return []
    curves = ["nothing here is both smaller and closer", *(["noise floor"] if floor else [])]
    caption = "Mean KL divergence from the source in nats per token, logarithmic; a divergence of exactly 0 has no dot."
    return [Figure(chart, caption, curves, ["a checkpoint"])]


def _by_share(compared: Sequence[Compared]) -> list[Part]:
    first = compared[0].divergence
    names = [name for name in SHARES if first is not None and name in first.metrics]
    if len(names) < 2:
        return []
    series = {one.name: [one.divergence.metrics.get(n) for n in names] for one in compared if one.divergence}
    title = "KL divergence that a share of the tokens stays below"
    chart = bucket_chart([SHARES[n] for n in names], series, title, logarithmic=True, below="share of the tokens")
    return [Figure(chart, "What that share of the predicted tokens stays below, nats, logarithmic.", list(series))]


def _by_position(compared: Sequence[Compared]) -> list[Part]:
    cells = {one.name: one.divergence.cells for one in compared if one.divergence and one.divergence.cells}
    if len(cells) < len(compared):
        return []
    series = {name: [cell.get("kl_mean") for cell in own] for name, own in cells.items()}
    chart = bucket_chart(
        buckets(next(iter(cells.values()))), series, "Mean KL divergence by position", logarithmic=True
    )
    return [Figure(chart, "Mean over the bucket's tokens, nats, logarithmic.", list(series))]


def _retrieval(compared: Sequence[Compared]) -> list[tuple[str, list[Part]]]:
    """A grid per task: checkpoints down, lengths across; depths of a length are taken together."""
    sections: list[tuple[str, list[Part]]] = []
    for result in compared[0].run:
        if not (is_grid(result) or is_by_length(result)):
            continue
        lengths = sorted({cell["length"] for cell in result.cells})
        rows = []
        for one in compared:
            own = next((r for r in one.run if r.task == result.task), None)
            cells = own.cells if own else []
            rows.append((one.name, [share_cell([c for c in cells if c["length"] == length]) for length in lengths]))
        grid = Grid("checkpoint", [f"{length:,}" for length in lengths], rows)
        sections.append((f"Retrieval: {result.label}", [grid, Text([CELL_LEGEND], soft=True)]))
    return sections


def _layers(compared: Sequence[Compared]) -> list[Part]:
    layers = [int(one["layer"]) for one in compared[0].record.layers]
    if not layers:
        return []
    every = max(1, -(-len(layers) // 20))
    series: dict[str, list[float | None]] = {}
    for one in compared:
        errors = {int(own["layer"]): own["relative_error"] for own in one.record.layers}
        series[one.name] = [errors.get(layer) for layer in layers[::every]]
    names = [str(layer) for layer in layers[::every]]
    chart = bucket_chart(names, series, "Relative error of the hidden states", logarithmic=True, below="layer")
    caption = "Norm of (checkpoint - source) over norm of source of the hidden states after a layer, logarithmic."
    return [Figure(chart, caption, list(series))]


def _checkpoints(compared: Sequence[Compared]) -> Table:
    rows = [[one.name, one.record.checkpoint.stored or "-", human_bytes(one.nbytes), one.nbytes] for one in compared]
    return Table(["checkpoint", "stored as", "size", "bytes"], rows, text=(0, 1))


def _figures(compared: Sequence[Compared]) -> list[Part]:
    """One table per result, so that conventions never meet in one: figures down, source and checkpoints across."""
    parts: list[Part] = []
    for result in compared[0].run:
        if is_noise(result):
            continue
        columns = [
            next((r for r in one.run if (r.task, r.convention) == (result.task, result.convention)), None)
            for one in compared
        ]
        source = result.source_metrics
        floor = floor_of(result, compared[0].run) if is_divergence(result) else None
        beside = source or (floor.metrics if floor else None)
        head = [
            "figure",
            *([("source" if source else "noise floor")] if beside else []),
            *(one.name for one in compared),
        ]
        rows = []
        for name in result.metrics:
            row: list[Any] = [name.replace("_", " "), *([number(beside.get(name))] if beside else [])]
            rows.append(row + [_value(own, name) for own in columns])
        small = Text([f"convention {result.convention}; {result.tokens:,} predicted tokens"], soft=True)
        parts += [Heading(result.label), Table(head, rows, text=(0,)), small]
    return parts


def _value(result: Result | None, name: str) -> str:
    if result is None or name not in result.metrics:
        return "-"
    value, before = result.metrics[name], (result.source_metrics or {}).get(name)
    compared = before and (is_perplexity(result) or is_by_position(result))
    return f"{number(value)} ({change(value, before)})" if before and compared else number(value)
