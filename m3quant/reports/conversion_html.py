"""report.html: what a calibrated conversion did, for people. One file, no script, nothing loaded from elsewhere.

`page` is a pure function of what the run recorded. Light or dark as the reader's system says; paper is always light.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..schemes import NOT_ROUNDED
from .charts import heatmap, line_chart, number

Json = Mapping[str, Any]

STYLE = """
:root{--page:#fff;--ink:#1c2128;--soft:#57606a;--rule:#d8dee4;--band:#f6f8fa;--accent:#1f6fc4;--warn:#d9480f;
--zero:#e4e1da;--h0:#d9e8f8;--h1:#b7d3f0;--h2:#92bbe6;--h3:#6ba2da;--h4:#4888ca;--h5:#2e6db3;--h6:#1d5394;--h7:#123a6f}
@media screen and (prefers-color-scheme:dark){:root{--page:#14171c;--ink:#e3e7ec;--soft:#9aa4b0;--rule:#313842;
--band:#1c2128;--accent:#6cb0f5;--warn:#ff8f3f;--zero:#3a3833;--h0:#142c48;--h1:#1b426c;--h2:#24598f;--h3:#3172b0;
--h4:#4a8ccc;--h5:#6fa8e0;--h6:#9cc5ef;--h7:#d2e6fb}}
:root{color-scheme:light dark}
*{box-sizing:border-box}
body{margin:0 auto;padding:28px 24px 48px;max-width:1060px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:19px;margin:36px 0 6px;padding-top:14px;border-top:1px solid var(--rule);break-after:avoid}
h3{font-size:15px;margin:20px 0 4px;break-after:avoid}
p{margin:4px 0 10px;max-width:78ch}
.soft,figcaption,caption{color:var(--soft);font-size:13.5px}
p.soft{max-width:none}
.warn{color:var(--warn);font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px;margin:8px 0}
caption{text-align:left;caption-side:bottom;padding-top:6px}
th,td{padding:4px 14px 4px 0;text-align:right;vertical-align:top;border-bottom:1px solid var(--rule);white-space:nowrap}
th{font-weight:600;color:var(--soft);vertical-align:bottom}
td.text,th.text{text-align:left}
td.wrap{text-align:left;white-space:normal;overflow-wrap:anywhere}
tbody tr:hover{background:var(--band)}
tr{break-inside:avoid}
thead{display:table-header-group}
figure{margin:10px 0;break-inside:avoid}figcaption{margin-top:6px;max-width:90ch}
svg{display:block;max-width:100%;height:auto;font:12px system-ui,"DejaVu Sans",sans-serif}
svg.wide{width:100%}
.tick{fill:var(--soft)}.label{fill:var(--ink);font-weight:600}.end{text-anchor:end}.mid{text-anchor:middle}
.grid{stroke:var(--rule)}
.line{fill:none;stroke:var(--accent);stroke-width:2;stroke-linejoin:round}
.dot{fill:var(--accent);stroke:var(--page);stroke-width:1.5}
.starved{fill:none;stroke:var(--warn);stroke-width:1.5;vector-effect:non-scaling-stroke}
.zero{fill:var(--zero)}.h0{fill:var(--h0)}.h1{fill:var(--h1)}.h2{fill:var(--h2)}.h3{fill:var(--h3)}
.h4{fill:var(--h4)}.h5{fill:var(--h5)}.h6{fill:var(--h6)}.h7{fill:var(--h7)}
@media print{body{max-width:none;padding:0;font-size:10pt}table{font-size:8.5pt}svg *{print-color-adjust:exact}
.scroll{overflow:visible}}
"""

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
    title = f"{report.model} to {report.recipe['name']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        '<p class="soft">' + "<br>".join(f"{escape(label)}: {escape(text)}" for label, text in report.made) + "</p>",
        _roles(report.roles),
        _heldout(report.facts["heldout"]),
        _stream(report.facts["stream_error"]),
        _layers(report),
        _coverage(report),
        _corpus(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} - m3quant report</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, text: Sequence[int] = (), caption: str = "") -> str:
    """An HTML table; cells are escaped. text: columns that read from the left; the others are numbers."""

    def cell(tag: str, column: int, value: Any) -> str:
        kind = ' class="text"' if column in text else ""
        shown = value if isinstance(value, str) else number(value)
        return f"<{tag}{kind}>{escape(shown)}</{tag}>"

    def row(tag: str, values: Sequence[Any]) -> str:
        return "<tr>" + "".join(cell(tag, i, v) for i, v in enumerate(values)) + "</tr>"

    below = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(row("td", values) for values in rows)
    return f'<div class="scroll"><table>{below}<thead>{row("th", head)}</thead>\n<tbody>{body}</tbody></table></div>'


def _roles(roles: Sequence[Json]) -> str:
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
    return "<h2>What was made</h2>" + table(
        ["role", "stored as", "tensors", "bytes in", "bytes out"], rows, text=(0, 1)
    )


def _heldout(heldout: Json | None) -> str:
    if heldout is None:
        return (
            "<h2>Held-out quality</h2><p>Not measured: the recipe holds no windows out (data.heldout_windows is 0).</p>"
        )
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
    return "<h2>Held-out quality</h2>" + table(["measure", "value"], rows, text=(0,), caption=caption)


def _stream(errors: Mapping[str, float | None]) -> str:
    points = [(int(layer), error) for layer, error in errors.items() if error is not None]
    if not points:
        return ""
    chart = line_chart(sorted(points), "Stream error", lambda layer, error: f"layer {layer}: {number(error)}")
    return (
        f'<h2>Stream error</h2><figure class="scroll">{chart}<figcaption>Relative error of the hidden states after each layer: '
        "the norm of (quantized - source) over the norm of source, over all windows. It accumulates from layer to layer."
        "</figcaption></figure>"
    )


def _layers(report: Report) -> str:
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
    return "<h2>What was chosen, layer by layer</h2>" + table(head, rows, text=(0, 1, 2), caption=caption)


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


def _coverage(report: Report) -> str:
    coverage = report.facts["coverage"]
    if coverage is None or not report.ledgers:
        return ""
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
    return (
        f"<h2>Expert coverage</h2><p>{_overall(coverage)}</p>"
        f"<h3>Tokens per expert</h3><figure class='scroll'>{maps[0]}<figcaption>Rows are layers, columns are experts: the "
        "tokens that the router itself sent there. Point at a cell for its numbers.</figcaption></figure>"
        f"<h3>Gate mass per expert</h3><figure class='scroll'>{maps[1]}<figcaption>The sum of the routing weights of "
        "those tokens: how much of the output each expert carried.</figcaption></figure>"
        + table(head, rows, text=(0,), caption="Tokens per expert of each layer, as routed, before topping up.")
        + _starved(report, starved)
    )


def _overall(coverage: Json) -> str:
    count = sum(map(len, coverage["starved"].values()))
    total, floor = coverage["experts"], coverage["floor"]
    if not count:
        return (
            f"Every one of {total:,} experts saw at least {coverage['least_tokens']:,} tokens; the floor is {floor:,}."
        )
    return (
        f'<span class="warn">{count:,} of {total:,} experts saw fewer than {floor:,} tokens.</span> Each was given the '
        "tokens with the highest router score for it; they calibrate that expert only and never enter the layer's output."
    )


def _starved(report: Report, starved: Sequence[Sequence[int]]) -> str:
    if not any(starved):
        return ""
    rows = []
    for ledger, experts in zip(report.ledgers, starved, strict=True):
        if experts:
            natural, added = ledger["natural"], ledger["topped_up"]
            shown = ", ".join(f"{e} ({natural[e]} + {added[e]})" for e in experts)
            rows.append(f'<tr><td class="text">{ledger["layer"]}</td><td class="wrap">{escape(shown)}</td></tr>')
    head = '<tr><th class="text">layer</th><th class="text">expert (tokens routed + tokens added)</th></tr>'
    return f"<h3>Starved experts</h3><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _corpus(report: Report) -> str:
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
    body = "".join(f'<tr><td class="text">{escape(k)}</td><td class="wrap">{escape(str(v))}</td></tr>' for k, v in rows)
    return f"<h2>Calibration data</h2><table><tbody>{body}</tbody></table>"
