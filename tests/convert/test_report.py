"""The report: numbers as recorded, well-formed, self-contained, escaped, and small enough for a full-size model."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from markupsafe import escape

from m3quant.calibration.experts import ExpertLedger
from m3quant.reports.charts import SHADES, heatmap, line_chart, number
from m3quant.reports.conversion_html import Report, page
from tests.support.convert.common import make_plan_of, make_source, run_plan

VOID = {"meta", "br", "hr", "img", "link", "input"}
FLOOR = 32


class Balanced(HTMLParser):
    """Fails on a tag that closes another one or none; collects text, attributes and table rows."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(document)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def ledger(layer: int, experts: int, draw: random.Random, tokens: int = 65536, top_k: int = 8) -> ExpertLedger:
    """A skewed ledger: some experts starve, one in a hundred sees nothing."""
    weights = [draw.lognormvariate(0, 1.4) if draw.random() > 0.01 else 0.0 for _ in range(experts)]
    natural = [int(w / sum(weights) * tokens * top_k) for w in weights]
    natural[natural.index(max(natural))] += tokens * top_k - sum(natural)
    added = [max(0, FLOOR - n) for n in natural]
    return ExpertLedger(layer, tokens, top_k, FLOOR, natural, [n * draw.uniform(0.1, 0.4) for n in natural], added)


def report(layers: int = 3, experts: int = 16, dense: int = 1, **changes: Any) -> Report:
    """A report as a run of that size would make it, with random figures."""
    draw = random.Random(5)
    logs: list[dict[str, Any]] = []
    for layer in range(layers):
        before = draw.uniform(0.02, 0.06)
        ratio = draw.choice([None, 0.25, 0.4])
        errors = {"round_to_nearest": before, "ranges": before * 0.8, "folds_and_ranges": before * 0.7}
        mlp = {
            "block": "mlp", "chosen": draw.choice(list(errors)), "block_error": errors,
            "groups": [{"group": "mlp", "ratio": ratio, "accepted": draw.random() < 0.5}],
            "pair": {"experts": experts, "accepted": draw.randrange(experts)},
            "ranges": {"mean_shrink": draw.uniform(0.8, 1), "gain": 0.2},
        }  # fmt: skip
        logs.append(
            {
                "layer": layer,
                "blocks": [
                    dict(mlp, block="attention", pair=None)
                    if layers > 20
                    else {"block": "attention", "groups": [], "chosen": "unquantized"},
                    mlp,
                ],
                "seconds": draw.uniform(5, 60),
            }
        )
    ledgers = [ledger(layer, experts, draw) for layer in range(dense, layers)]
    starved = {str(one.layer): one.starved for one in ledgers if one.starved}
    least = min((min(one.natural) for one in ledgers), default=0)
    facts = {
        "calibration": {
            "windows": 144, "window_tokens": 512, "kind_tokens": {"text": 50000, "code": 23728}, "seed": 0,
            "source": "bundled corpus, 300 documents", "notes": ["no chat template"], "sha256": "ab" * 32,
            "corpus_sha256": "cd" * 32, "tokenizer_sha256": "ef" * 32,
        },
        "heldout": {
            "windows": 16, "window_length": 512, "tokens": 8176, "perplexity_source": 5.4321, "perplexity_quantized": 5.5678,
            "kl_mean": 0.01234, "kl_median": 0.00567, "kl_max": 1.5, "top1_agreement": 0.9512,
        },
        "coverage": {"experts": experts * len(ledgers), "floor": FLOOR, "least_tokens": least, "starved": starved} if ledgers else None,
        "stream_error": {str(layer): 0.01 + 0.002 * layer + draw.uniform(0, 0.002) for layer in range(layers)},
    }  # fmt: skip
    roles = [
        {
            "role": "routed_experts",
            "action": "quantize",
            "scheme": "int4-g128",
            "tensors": 4,
            "bytes_in": 4096,
            "bytes_out": 1056,
        }
    ]
    base = Report(
        model="MiniMax-M2", recipe={"name": "awq", "awq": {"range_search": True}}, made=[("recipe", "awq")], roles=roles,
        logs=logs, ledgers=[one.to_json() for one in ledgers], summaries=[one.summary() for one in ledgers], facts=facts,
    )  # fmt: skip
    return replace(base, **changes)


def drawings(document: str) -> list[ElementTree.Element]:
    """The page's SVG elements, parsed as XML."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", document, re.S)]


def text_of(document: str) -> str:
    return " ".join(" ".join(Balanced(document).text).split())


def test_the_report_of_a_run_shows_what_the_run_recorded(tmp_path: Path) -> None:
    plan = make_plan_of(
        make_source(tmp_path / "tiny <m3> & co", "m3"),
        data={"windows": 2, "window_length": 32, "heldout_windows": 1, "min_expert_tokens": 24},
    )
    manifest = run_plan(plan, tmp_path / "out")
    folder = tmp_path / "out" / "m3quant-report"
    assert sorted(p.name for p in folder.iterdir()) == ["calibration.json", "experts.json", "report.html"]
    assert manifest["report"] == "m3quant-report/report.html"
    calibration, experts = (
        json.loads((folder / f"{n}.json").read_text(encoding="utf-8")) for n in ("calibration", "experts")
    )
    assert calibration["schema"] == experts["schema"] == 1
    assert calibration["heldout"] == manifest["heldout"] and calibration["recipe"] == manifest["recipe"]
    assert [log["layer"] for log in calibration["layers"]] == [0, 1]
    document = (folder / "report.html").read_text(encoding="utf-8")
    page_text = text_of(document)
    heldout = manifest["heldout"]
    for value in (heldout["perplexity_source"], heldout["perplexity_quantized"], heldout["kl_mean"], heldout["kl_max"]):
        assert number(value) in page_text
    rows = Balanced(document).rows
    for layer, error in manifest["stream_error"].items():
        assert f"layer {layer}: {number(error)}" in page_text
    errors = calibration["layers"][1]["blocks"][1]["block_error"]
    row = next(r for r in rows if r[:2] == ["1", "mlp"])
    assert row[3:5] == [
        number(errors["round_to_nearest"]),
        number(errors[calibration["layers"][1]["blocks"][1]["chosen"]]),
    ]
    assert ["0", "mlp"] in [r[:2] for r in rows], "M3's dense first layer has a row of its own"
    one = ExpertLedger.from_json(experts["layers"][0])
    assert one.starved, "the floor is set so high that some experts starve"
    for expert in one.starved:
        assert f"{expert} ({one.natural[expert]} + {one.topped_up[expert]})" in page_text
    assert "<h1>tiny &lt;m3&gt; &amp; co to awq</h1>" in document
    assert str(tmp_path) not in document, "no path of this machine"


def test_every_cell_of_the_heatmap_tells_its_numbers() -> None:
    full = report(layers=3, experts=16)
    page_svgs = drawings(page(full))
    assert len(page_svgs) == 3, "stream error, tokens, gate mass"
    titles = [t.text for t in page_svgs[1].iter("title")]
    for one in full.ledgers:
        for expert, count in enumerate(one["natural"]):
            added = f" + {one['topped_up'][expert]}" if one["topped_up"][expert] else ""
            assert (
                f"L{one['layer']} E{expert}: {count}{added} tokens, mass {number(one['gate_mass'][expert], 3)}"
                in titles
            )


def test_starved_experts_are_outlined_listed_and_counted() -> None:
    full = report(layers=5, experts=64)
    starved = {one["layer"]: [e for e, n in enumerate(one["natural"]) if n < FLOOR] for one in full.ledgers}
    count = sum(map(len, starved.values()))
    assert count > 2
    document = page(full)
    for svg in drawings(document)[1:]:
        (outline,) = [p for p in svg.iter("path") if p.get("class") == "starved"]
        runs = [tuple(map(int, run)) for run in re.findall(r"M(\d+) (\d+)h(\d+)v1", outline.get("d", ""))]
        cells = [(y + 1, x + i) for x, y, count in runs for i in range(count)]
        assert sorted(cells) == [(layer, e) for layer, some in starved.items() for e in some]
    shown = text_of(document)
    assert f"{count} of 256 experts saw fewer than 32 tokens" in shown
    for one in full.ledgers:
        for expert in starved[one["layer"]]:
            assert f"{expert} ({one['natural'][expert]} + {one['topped_up'][expert]})" in shown


def test_areas_and_cells_shade_alike() -> None:
    draw = random.Random(1)
    rows = [[0.0 if draw.random() < 0.1 else draw.lognormvariate(0, 2) for _ in range(40)] for _ in range(6)]
    cells = ElementTree.fromstring(heatmap(range(6), rows, [[]] * 6, "t", "u", lambda i, e: f"{i},{e}"))
    by_cell = {p.findtext("title"): p.get("class") for p in cells.iter("path") if p.find("title") is not None}
    areas = ElementTree.fromstring(heatmap(range(6), rows, [[]] * 6, "t", "u"))
    by_area = {}
    for path in areas.iter("path"):
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1", path.get("d", "")):
            for e in range(int(x), int(x) + int(width)):
                assert f"{y},{e}" not in by_area, "no cell is drawn twice"
                by_area[f"{y},{e}"] = path.get("class")
    assert by_area == by_cell and len(by_cell) == 240
    values = sorted((v, by_cell[f"{i},{e}"]) for i, row in enumerate(rows) for e, v in enumerate(row))
    assert [shade for _, shade in values] == sorted(
        (shade for _, shade in values), key=lambda s: -1 if s == "zero" else int(str(s)[1:])
    )
    assert values[-1][1] == f"h{SHADES - 1}" and values[0][1] == "zero"


@pytest.mark.parametrize("make", [report, lambda: report(62, 256, 0), lambda: report(1, 8, 1), lambda: report(2, 8, 0)])
def test_the_page_is_well_formed_and_loads_nothing(make: Callable[[], Report]) -> None:
    document = page(make())
    parsed = Balanced(document)
    drawings(document)
    tags = {tag for tag, _ in parsed.seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in parsed.seen:
        assert not {"src", "srcset", "action", "data", "background"} & set(attributes)
        assert all(not name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"https?:|url\(|@import|//[a-z]", document)
    assert "nan" not in text_of(document).lower().split()


def test_a_model_of_62_layers_and_256_experts_stays_below_two_megabytes() -> None:
    full = report(62, 256, 0)
    assert len(page(full).encode()) < 2_000_000
    starving = [{**one, "natural": [0] * 256, "topped_up": [FLOOR] * 256} for one in full.ledgers]
    assert len(page(replace(full, ledgers=starving)).encode()) < 2_000_000, "every expert starved and listed"


def test_what_a_person_wrote_is_escaped() -> None:
    nasty = "<script>alert(\"x\")</script> & 'quoted'"
    base = report()
    record = {**base.facts["calibration"], "source": nasty, "notes": [nasty], "kind_tokens": {nasty: 1}}
    facts = {**base.facts, "calibration": record}
    document = page(
        replace(
            base,
            model=nasty,
            recipe={**base.recipe, "name": nasty},
            made=[(nasty, nasty)],
            facts=facts,
            roles=[{**base.roles[0], "role": nasty}],
        )
    )
    parsed = Balanced(document)
    assert "script" not in {tag for tag, _ in parsed.seen}
    assert document.count(escape(nasty)) == 10, (
        "title, heading and the line below twice each, role, three of the corpus"
    )
    assert nasty in "".join(parsed.text)


def test_without_heldout_windows_nothing_is_claimed() -> None:
    base = report()
    shown = text_of(page(replace(base, facts={**base.facts, "heldout": None})))
    assert "Not measured" in shown and "perplexity" not in shown
    assert "144 to calibrate, 0 held out" in shown


def test_a_model_without_routed_experts_has_no_coverage_section() -> None:
    shown = text_of(page(report(layers=2, dense=2)))
    assert "Expert coverage" not in shown and "layer by layer" in shown


def test_full_coverage_is_said_in_one_sentence() -> None:
    base = report(layers=2, dense=1)
    even = ExpertLedger(1, 400, 4, FLOOR, [100] * 16, [50.0] * 16, [0] * 16)
    coverage = {"experts": 16, "floor": FLOOR, "least_tokens": 100, "starved": {}}
    full = replace(
        base, ledgers=[even.to_json()], summaries=[even.summary()], facts={**base.facts, "coverage": coverage}
    )
    shown = text_of(page(full))
    assert "Every one of 16 experts saw at least 100 tokens; the floor is 32." in shown
    assert "below the floor" not in shown.replace("still below floor", "")


def test_the_line_goes_through_the_values() -> None:
    values = [0.5, 1.0, 0.25]
    svg = ElementTree.fromstring(line_chart(list(enumerate(values)), "error", lambda layer, value: f"{layer}={value}"))
    points = [tuple(map(float, p.split(","))) for p in svg.find("polyline").get("points").split()]  # type: ignore[union-attr]
    ticks = {t.text: float(t.get("y", 0)) - 4 for t in svg.iter("text") if t.get("class") == "tick end"}
    zero, one = ticks["0"], ticks["1"]
    assert [(zero - y) / (zero - one) for _, y in points] == pytest.approx(values, abs=2e-3)
    assert points[0][0] < points[1][0] < points[2][0]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0, "0"), (1234567, "1,234,567"), (0.037811558, "0.03781"), (5215.6327, "5,216"), (12.3456, "12.35"), (3.2e-7, "3.200e-07"), (2.0, "2")],
)  # fmt: skip
def test_numbers_keep_four_significant_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown
