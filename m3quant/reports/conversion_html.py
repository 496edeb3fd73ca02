"""report.html: what a calibrated conversion did. `page` is a pure function of what the run recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..schemes import NOT_ROUNDED
from .charts import heatmap, line_chart, number
from .pages import Figure, Heading, Page, Part, Section, Table, Text, pairs
from .verdict import of_conversion, unknown_text

Json = Mapping[str, Any]

_CHOSEN = {
    "round_to_nearest": "round to nearest",
    "ranges": "ranges",
    "folds_and_ranges": "folds and ranges",
}


@dataclass(frozen=True)
class Report:
    """What the page shows; every number comes from the run's records.

    made: (label, text) lines under the title. roles: rows of plan.role_table. logs, ledgers, summaries: per layer, as
    in calibration.json and experts.json and ExpertLedger.summary(). facts: the manifest's calibration, heldout,
    coverage and stream_error.
    """

    model: str
    recipe: Json
    made: Sequence[tuple[str, str]]
    roles: Sequence[Json]
    logs: Sequence[Json]
    ledgers: Sequence[Json]
    summaries: Sequence[Json]
    facts: Json


def page(report: Report) -> str:
    """The whole report as one HTML document."""
    facts = report.facts
    maps, tables = _coverage(report)
    sections = [
        Section("Stream error", _stream(facts["stream_error"])),
        Section("Expert coverage", maps),
        Section("What was made", [_roles(report.roles)]),
        Section("Held-out quality", [_heldout(facts["heldout"])]),
        Section("What was chosen, layer by layer", [_layers(report)]),
        Section("Expert coverage in numbers", tables),
        Section("Calibration data", [_corpus(report)]),
    ]
    made = [f"{label}: {text}" for label, text in report.made]
    verdict = of_conversion(facts["heldout"], facts["coverage"])
    return Page(f"{report.model} to {report.recipe['name']}", "report", made, sections, verdict).html()


def _roles(roles: Sequence[Json]) -> Table:
    rows = [
        [
            r["role"],
            (r["scheme"] if r["action"] == "quantize" else r["action"])
            + (f" in layers {r['layers']}" if "layers" in r else ""),
            r["tensors"],
            r["bytes_in"],
            r["bytes_out"],
        ]
        for r in roles
    ]
    return Table(["role", "stored as", "tensors", "bytes in", "bytes out"], rows, text=(0, 1))


def _heldout(heldout: Json | None) -> Part:
    if heldout is None:
        return Text(["Not measured: the recipe holds no windows out (data.heldout_windows is 0)."])
    before, after = heldout["perplexity_source"], heldout["perplexity_quantized"]
    rows = [
        ["perplexity, source", before],
        ["perplexity, quantized", after],
        ["change of perplexity", f"{100 * (after / before - 1):+.3f} %"],
        ["KL(source || quantized) per token: mean", f"{number(heldout['kl_mean'])} nats"],
        ["KL: median", f"{number(heldout['kl_median'])} nats"],
        ["KL: largest", f"{number(heldout['kl_max'])} nats"],
        ["same most likely token", f"{100 * heldout['top1_agreement']:.2f} %"],
    ]
    caption = (
        f"{heldout['tokens']:,} predicted tokens that calibration never saw (windows: {heldout['windows']:,} of "
        f"{heldout['window_length']:,} tokens). Weights as stored; activations {heldout.get('activations', NOT_ROUNDED)}."
    )
    if unknown := unknown_text(before):
        caption = f"{caption} {unknown}"
    return Table(["measure", "value"], rows, text=(0,), caption=caption)


def _stream(errors: Mapping[str, float | None]) -> list[Part]:
    points = [(int(layer), error) for layer, error in errors.items() if error is not None]
    if not points:
        return []
    chart = line_chart(sorted(points), "Stream error", lambda layer, error: f"layer {layer}: {number(error)}")
    caption = (
        "Relative error of the hidden states after each layer: the norm of (quantized - source) over the norm of source, over all "
        "windows. It accumulates from layer to layer."
    )
    return [Figure(chart, caption, ["quantized against source"])]


def _layers(report: Report) -> Table:
    """One row per searched block; a layer without one has a row of its own, so that every layer is listed."""
    searched = report.recipe.get("awq", {}).get("range_search", False)
    rows: list[list[Any]] = []
    for log in report.logs:
        blocks = [block for block in log["blocks"] if block.get("block_error")]
        cells = [_block(block, searched) for block in blocks] or [["-", "no integer weights", *["-"] * 6]]
        for i, row in enumerate(cells):
            rows.append([str(log["layer"]), *row, f"{log['seconds']:.1f}" if i == 0 else ""])
    head = [
        "layer",
        "block",
        "kept",
        "error rounded",
        "error kept",
        "cut",
        "mean range",
        "fold ratio",
        "w3 to w2",
        "seconds",
    ]
    caption = (
        "Blocks with integer weights. Errors: of the block's output, squared, relative to its energy, with weights rounded "
        "to nearest and as kept. Mean range: average of the searched ranges, 1 is the full range. Fold ratio: exponent of "
        "the norm's fold that the search found best; identity if none beat no fold. w3 to w2: experts whose own fold was "
        "kept. Seconds: the layer's search."
    )
    return Table(head, rows, text=(0, 1, 2), caption=caption)


def _block(block: Json, searched: bool) -> list[Any]:
    """Cells of one searched block, from its name to its w3 -> w2 folds."""
    chosen, errors = block["chosen"], block["block_error"]
    label = "folds" if chosen == "folds_and_ranges" and not searched else _CHOSEN.get(chosen, chosen)
    before, after = errors["round_to_nearest"], errors[chosen]
    cut = f"{100 * (1 - after / before):.1f} %" if before else "-"
    pair, ranges = block.get("pair"), block.get("ranges")
    pairs = f"{pair['accepted']} of {pair['experts']}" if pair else "-"
    shrink = f"{ranges['mean_shrink']:.3f}" if ranges else "-"
    return [block["block"], label, before, after, cut, shrink, _fold(block.get("groups") or []), pairs]


def _fold(groups: Sequence[Json]) -> str:
    if not groups:
        return "-"
    group = groups[0]
    if group["ratio"] is None:
        return "identity"
    return f"{group['ratio']:.3f}" if group["accepted"] else f"{group['ratio']:.3f} not kept"


def _coverage(report: Report) -> tuple[list[Part], list[Part]]:
    """Pictures, and tables."""
    coverage = report.facts["coverage"]
    if coverage is None or not report.ledgers:
        return [], []
    starved = [[e for e, n in enumerate(ledger["natural"]) if n < ledger["floor"]] for ledger in report.ledgers]
    layers = [ledger["layer"] for ledger in report.ledgers]

    def tokens_title(i: int, e: int) -> str:
        ledger = report.ledgers[i]
        added = f" + {ledger['topped_up'][e]}" if ledger["topped_up"][e] else ""
        return f"L{layers[i]} E{e}: {ledger['natural'][e]}{added} tokens, mass {number(ledger['gate_mass'][e], 3)}"

    tokens = [ledger["natural"] for ledger in report.ledgers]
    mass = [ledger["gate_mass"] for ledger in report.ledgers]
    maps = (
        heatmap(layers, tokens, starved, "Calibration tokens per expert", "tokens", tokens_title),
        heatmap(layers, mass, starved, "Gate mass per expert", "gate mass"),
    )
    head = [
        "layer",
        "experts",
        "tokens",
        "min",
        "median",
        "max",
        "topped up",
        "tokens added",
        "saw none",
        "still below floor",
    ]
    keys = (
        "layer",
        "experts",
        "tokens",
        "min",
        "median",
        "max",
        "topped_up",
        "tokens_added",
        "zero_natural",
        "below_floor",
    )
    rows = [[str(s["layer"]), *(s[key] for key in keys[1:])] for s in report.summaries]
    sent = "Rows are layers, columns are experts: the tokens that the router itself sent there. Point at a cell for its numbers."
    carried = "The sum of the routing weights of those tokens: how much of the output each expert carried."
    pictures: list[Part] = [
        _overall(coverage),
        Heading("Tokens per expert"),
        Figure(maps[0], sent, ()),
        Heading("Gate mass per expert"),
        Figure(maps[1], carried, ()),
    ]
    table = Table(head, rows, text=(0,), caption="Tokens per expert of each layer, as routed, before topping up.")
    return pictures, [table, *_starved(report, starved)]


def _overall(coverage: Json) -> Text:
    count = sum(map(len, coverage["starved"].values()))
    total, floor = coverage["experts"], coverage["floor"]
    if not count:
        least = coverage["least_tokens"]
        return Text([f"Every one of {total:,} experts saw at least {least:,} tokens; the floor is {floor:,}."])
    given = (
        "Each was given the tokens with the highest router score for it; they calibrate that expert only and never enter the "
        "layer's output."
    )
    return Text([given], warning=f"{count:,} of {total:,} experts saw fewer than {floor:,} tokens.")


def _starved(report: Report, starved: Sequence[Sequence[int]]) -> list[Part]:
    if not any(starved):
        return []
    rows = []
    for ledger, experts in zip(report.ledgers, starved, strict=True):
        if experts:
            natural, added = ledger["natural"], ledger["topped_up"]
            rows.append((str(ledger["layer"]), ", ".join(f"{e} ({natural[e]} + {added[e]})" for e in experts)))
    head = ("layer", "expert (tokens routed + tokens added)")
    return [Heading("Starved experts"), Table(head, rows, text=(0,), wrap=(1,))]


def _corpus(report: Report) -> Table:
    record, heldout = report.facts["calibration"], report.facts["heldout"]
    windows, held = record["windows"], heldout["windows"] if heldout else 0
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in record["kind_tokens"].items())
    rows = [
        ("source", record["source"]),
        (
            "windows",
            f"{windows:,} of {record['window_tokens']:,} tokens: {windows - held:,} to calibrate, {held:,} held out",
        ),
        ("tokens by kind", kinds),
        ("seed", str(record["seed"])),
        ("sha256 of the windows", record["sha256"]),
        ("sha256 of the corpus", record["corpus_sha256"]),
        ("sha256 of the tokenizer", record["tokenizer_sha256"]),
        *(("note", note) for note in record["notes"]),
    ]
    return pairs(rows)
