"""eval.html: the page of an evaluation.

`page` is a pure function of the record in eval.json, so that a page can be made again from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..artifact.eval_record import EvalRecord, Result
from ..checkpoint import make_folder, write_bytes_atomic
from ..evaluate.intervals import wilson
from .charts import bucket_chart, line_chart, number
from .pages import Figure, Grid, Heading, Page, Part, Section, Table, Text, pairs
from .shapes import (
    floor_of,
    is_by_length,
    is_by_position,
    is_divergence,
    is_grid,
    is_noise,
    is_perplexity,
    of_perplexity,
)
from .verdict import of_evaluation

PAGE_FILE = "eval.html"


def write_report(record: EvalRecord, folder: Path) -> Path:
    """Write `page` into the folder, whole or not at all; returns the file. Raises StoppedError on a full disk."""
    make_folder(folder)
    path = folder / PAGE_FILE
    write_bytes_atomic(path, page(record).encode())
    return path


def page(record: EvalRecord) -> str:
    """The whole evaluation as one HTML document: the verdict, then pictures, then tables; a section without figures is left out."""
    run = [result for result in record.results if result.not_run is None]
    sections: list[tuple[str, list[Part]]] = [
        ("KL divergence by position", _kl_by_position(run)),
        ("KL divergence by share of tokens", _kl_by_share(run)),
        ("Perplexity by position", _loss_by_position(run)),
        *((f"Retrieval: {result.label}", _needle(result)) for result in run if is_grid(result)),
        ("Retrieval by length", _lengths([r for r in run if is_by_length(r)])),
        ("Error of every layer", _layers(record)),
        ("Perplexity", _perplexity(run)),
        ("Divergence from the source", _divergence(run)),
        ("Perplexity by position, in numbers", _loss_in_numbers(run)),
        ("Retrieval by length, in words", _lengths_in_words([r for r in run if is_by_length(r)])),
        ("Expert coverage of the conversion", _coverage(record)),
        ("Other figures", _others(run)),
        ("Not run", _not_run(record)),
        ("Data and notes", _data(record)),
    ]
    verdict = of_evaluation(record)
    return Page(
        record.checkpoint.name, "evaluation", _made(record), [Section(*one) for one in sections], verdict
    ).html()


def _made(record: EvalRecord) -> list[str]:
    stored = [f"{m.name}: {m.stored}" for m in (record.checkpoint, record.source) if m and m.stored]
    against = f"against {record.source.name}" if record.source else "without a source to compare with"
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return [
        f"suite {record.suite}, {against}",
        *(["stored as " + "; ".join(stored)] if stored else []),
        f"{record.finished}, {record.seconds:,.0f} s on {record.device}",
        f"m3quant {record.m3quant}" + (f", {versions}" if versions else ""),
    ]


def _perplexity(run: Sequence[Result]) -> list[Part]:
    """One table per convention, so that figures that cannot be compared are never in one table."""
    shown = list(filter(is_perplexity, run))
    lead = Text(["Each table is a convention of its own: its figures compare with no other table's."])
    return [lead, *(part for result in shown for part in _figures(result))] if shown else []


def _figures(result: Result) -> list[Part]:
    return [Heading(result.label), _metrics_table(result), _small(result)]


def _metrics_table(result: Result) -> Table:
    source = result.source_metrics
    head = ["figure", "checkpoint", *(["source", "change"] if source else [])]
    rows = []
    for name in filter(of_perplexity, result.metrics) if is_divergence(result) else result.metrics:
        value = result.metrics[name]
        row: list[Any] = [name.replace("_", " "), number(value, 5)]
        if source:
            before = source.get(name)
            row += [number(before, 5), _change(value, before)]
        rows.append(row)
    return Table(head, rows, text=(0,))


def _change(value: float, before: float | None) -> str:
    return "-" if not before else f"{100 * (value / before - 1):+.3f} %"


def _small(result: Result) -> Text:
    """The convention and the amount behind a figure, under it."""
    return Text([f"convention {result.convention}; {result.tokens:,} predicted tokens", *result.notes], soft=True)


def _divergence(run: Sequence[Result]) -> list[Part]:
    parts: list[Part] = []
    for result in run:
        if not is_divergence(result) or is_noise(result):
            continue
        floor = floor_of(result, run)
        head = ["per predicted token", "checkpoint", *(["noise floor"] if floor else [])]
        rows = []
        for name, value in result.metrics.items():
            if of_perplexity(name):  # is in the section above, with the source's
                continue
            noise = [number(floor.metrics.get(name), 4)] if floor else []
            rows.append([name.replace("_", " "), number(value, 4), *noise])
        parts += [Heading(result.label), Table(head, rows, text=(0,)), _small(result)]
        if floor:
            near = f"{floor.label}; {floor.tokens:,} tokens. A difference near this floor is rounding."
            parts.append(Text([near], soft=True))
    return parts


def _kl_by_position(run: Sequence[Result]) -> list[Part]:
    parts: list[Part] = []
    for result in run:
        cells = [cell for cell in result.cells if "kl_mean" in cell and "start" in cell]
        if not cells or is_noise(result):
            continue
        series: dict[str, list[float | None]] = {"KL(source || checkpoint)": [cell["kl_mean"] for cell in cells]}
        floor = floor_of(result, run)
        if floor:
            by_start = {cell["start"]: cell.get("kl_mean") for cell in floor.cells}
            series["noise floor"] = [by_start.get(cell["start"]) for cell in cells]
        chart = bucket_chart(buckets(cells), series, "Mean KL divergence by position", logarithmic=True)
        caption = f"{result.label}. Mean over the bucket's tokens, nats, logarithmic; a bucket of exactly 0 has no dot."
        parts.append(Figure(chart, caption, list(series)))
    return parts


SHARES = {
    "kl_median": "half", "kl_p75": "75 %", "kl_p90": "90 %", "kl_p95": "95 %", "kl_p99": "99 %", "kl_p99.9": "99.9 %", "kl_max": "all",
}  # fmt: skip


def _kl_by_share(run: Sequence[Result]) -> list[Part]:
    """Whether a mean comes from all tokens or from few."""
    parts: list[Part] = []
    for result in run:
        names = [name for name in SHARES if name in result.metrics]
        if not is_divergence(result) or is_noise(result) or len(names) < 2:
            continue
        series: dict[str, list[float | None]] = {"KL(source || checkpoint)": [result.metrics[name] for name in names]}
        if floor := floor_of(result, run):
            series["noise floor"] = [floor.metrics.get(name) for name in names]
        title = "KL divergence that a share of the tokens stays below"
        chart = bucket_chart([SHARES[n] for n in names], series, title, logarithmic=True, below="share of the tokens")
        caption = f"{result.label}. What that share of the predicted tokens stays below, nats, logarithmic."
        parts.append(Figure(chart, caption, list(series)))
    return parts


def _loss_by_position(run: Sequence[Result]) -> list[Part]:
    parts: list[Part] = []
    for result in filter(is_by_position, run):
        series: dict[str, list[float | None]] = {"checkpoint": [cell["perplexity"] for cell in result.cells]}
        if "perplexity_source" in result.cells[0]:
            series["source"] = [cell["perplexity_source"] for cell in result.cells]
        chart = bucket_chart(buckets(result.cells), series, "Perplexity by position", logarithmic=False)
        parts.append(Figure(chart, f"{result.label}; the axis does not begin at 0.", list(series)))
    return parts


def _loss_in_numbers(run: Sequence[Result]) -> list[Part]:
    parts: list[Part] = []
    for result in filter(is_by_position, run):
        against = "perplexity_source" in result.cells[0]
        head = ["positions", "tokens", "perplexity", *(["source", "change"] if against else [])]
        rows = []
        for name, cell in zip(buckets(result.cells), result.cells, strict=True):
            before = cell.get("perplexity_source")
            after = [number(before, 5), _change(cell["perplexity"], before)] if against else []
            rows.append([name, f"{cell['tokens']:,}", number(cell["perplexity"], 5), *after])
        parts += [Heading(result.label), Table(head, rows, text=(0,)), _small(result)]
    return parts


def buckets(cells: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{_short(cell['start'])}-{_short(cell['stop'] - 1)}" for cell in cells]


def _short(position: int) -> str:
    """1023 stays, 16384 is 16K and 16383 is 16K as well: bucket names are for axes, tables hold the numbers."""
    return str(position) if position < 10_000 else f"{round(position / 1024)}K"


CELL_LEGEND = "In a cell: answers exactly right of samples, then Wilson's 95 % interval in per cent, then the source where there is one."


def _needle(result: Result) -> list[Part]:
    """The grid: columns are lengths, rows are depths from the beginning of the text down to its end."""
    cells = {(cell["length"], cell["depth"]): cell for cell in result.cells}
    lengths = sorted({length for length, _ in cells})
    depths = sorted({depth for _, depth in cells})
    rows = [
        (f"{100 * depth:g}\u00a0%", [_share(cells.get((length, depth))) for length in lengths]) for depth in depths
    ]  # fmt: skip
    columns = [_column(cells, length, depths) for length in lengths]
    total = result.metrics["accuracy"]
    lead = f"Found: {100 * total:.1f} % (95 %: {100 * result.metrics['accuracy_low']:.1f} to {100 * result.metrics['accuracy_high']:.1f} %)"
    if result.source_metrics:
        lead += f"; the source {100 * result.source_metrics['accuracy']:.1f} %"
    legend = f"Depth of the fact down, tokens of prompt and answer across. {CELL_LEGEND}"
    return [Text([f"{lead}."]), Grid("depth", columns, rows), Text([legend], soft=True), _small(result)]


def _column(cells: dict[tuple[int, float], dict[str, Any]], length: int, depths: Sequence[float]) -> str:
    cell = next(cells[length, depth] for depth in depths if (length, depth) in cells)
    return f"{length:,}" + (" *" if cell.get("exercises_msa") is False else "")


def share_cell(cells: Sequence[dict[str, Any]]) -> tuple[float, str, str] | None:
    """One cell of a grid: cells of a result taken together, with Wilson's interval."""
    if not cells:
        return None
    hits, samples = (sum(cell[key] for cell in cells) for key in ("hits", "samples"))
    low, high = wilson(hits, samples)
    small = f"{100 * low:.0f}-{100 * high:.0f} %"
    if all("hits_source" in cell for cell in cells):
        small += f", source {sum(cell['hits_source'] for cell in cells)}"
    return hits / samples, f"{hits}/{samples}", small


def _share(cell: dict[str, Any] | None) -> tuple[float, str, str] | None:
    return None if cell is None else share_cell([cell])


def _lengths(results: Sequence[Result]) -> list[Part]:
    """Tasks down, lengths across."""
    if not results:
        return []
    lengths = sorted({cell["length"] for result in results for cell in result.cells})
    rows = []
    for result in results:
        by_length = {cell["length"]: cell for cell in result.cells}
        rows.append((result.label, [_share(by_length.get(length)) for length in lengths]))
    short = {cell["length"] for r in results for cell in r.cells if cell.get("exercises_msa") is False}
    columns = [f"{length:,}" + (" *" if length in short else "") for length in lengths]
    return [Grid("task", columns, rows), Text([CELL_LEGEND], soft=True)]


def _lengths_in_words(results: Sequence[Result]) -> list[Part]:
    """Shares of single values, and the convention and phrasing of every task."""
    if not results:
        return []
    values = [
        [r.label, number(r.metrics["values_given_prefix"]), *([number(r.source_metrics["values_given_prefix"])] if r.source_metrics else [])]
        for r in results
        if "values_given_prefix" in r.metrics
    ]  # fmt: skip
    parts: list[Part] = []
    if values:
        head = ["values right after the true prefix", "checkpoint", *(["source"] if len(values[0]) > 2 else [])]
        caption = "Share of single values of tasks that ask for several."
        parts.append(Table(head, values, text=(0,), caption=caption))
    about = [(r.label, "; ".join([r.convention, f"{r.tokens:,} predicted tokens", *r.notes])) for r in results]
    return [*parts, pairs(about)]


def _layers(record: EvalRecord) -> list[Part]:
    points = sorted((int(layer["layer"]), layer["relative_error"]) for layer in record.layers)
    if not points:
        return []
    chart = line_chart(points, "Relative error of the hidden states", lambda layer, e: f"layer {layer}: {number(e)}")
    caption = (
        "Norm of (checkpoint - source) over norm of source of the hidden states after each layer. It carries the errors of the "
        "layers before it."
    )
    return [Figure(chart, caption, ["checkpoint against source"])]


def _coverage(record: EvalRecord) -> list[Part]:
    coverage = record.coverage
    if not coverage:
        return []
    sentence = str(coverage.get("sentence", "")).split("; by layer:")[0]
    starved: dict[str, list[int]] = coverage.get("starved") or {}
    said = Text([f"{sentence[:1].upper()}{sentence[1:]}."])
    if not starved:
        return [said]
    rows = [
        (layer, len(experts), ", ".join(map(str, experts)))
        for layer, experts in sorted(starved.items(), key=lambda item: int(item[0]))
    ]
    return [said, Table(("layer", "count", "experts below the floor"), rows, text=(0,), wrap=(2,))]


def _others(run: Sequence[Result]) -> list[Part]:
    """Results of a shape that has no section above: nothing that was measured is left out."""
    known = (is_grid, is_by_length, is_divergence, is_by_position, is_perplexity)
    rest = [result for result in run if not any(is_one(result) for is_one in known)]
    return [part for result in rest for part in _figures(result)]


def _not_run(record: EvalRecord) -> list[Part]:
    rows = [(r.task, r.not_run) for r in record.results if r.not_run is not None]
    return [pairs(rows)] if rows else []


def _data(record: EvalRecord) -> list[Part]:
    tasks: dict[str, list[str]] = {}
    for result in record.results:
        if result.data:
            licence = f", {result.data.licence}" if result.data.licence else ""
            tasks.setdefault(f"{result.data.name}{licence}; sha256 {result.data.sha256}", []).append(result.task)
    rows = [("data", f"{data}; of {', '.join(dict.fromkeys(names))}") for data, names in tasks.items()]
    measured = [("checkpoint", record.checkpoint), *([("source", record.source)] if record.source else [])]
    rows += [(f"fingerprint of the {name}", one.fingerprint) for name, one in measured if one.fingerprint]
    if any(cell.get("exercises_msa") is False for result in record.results for cell in result.cells):
        rows.append(("*", "does not exercise MSA: block-sparse attention reads a context of this length whole"))
    rows += [("note", note) for note in record.notes]
    return [pairs(list(dict.fromkeys(rows)))] if rows else []
