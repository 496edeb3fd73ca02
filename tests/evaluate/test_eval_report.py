"""The evaluation's page: everything measured is on it, nothing is fetched, and its colours can be read."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from m3quant.artifact.eval_record import EvalRecord, Measured
from m3quant.reports.charts import bucket_chart, heat
from m3quant.reports.evaluation_html import page, write_report
from tests.support.evaluate.sample_record import sample_record

VOID = {"meta", "br"}
STYLE = (resources.files("m3quant.reports") / "templates" / "style.css").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Text by section, and a check that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: dict[str, str] = {}
        self.heading = ""
        self.attributes: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [f"{name}={value}" for name, value in attrs]
        if tag == "td":
            self.cells.append(dict(attrs).get("class") or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.heading = data
        elif "style" not in self.open:
            self.sections[self.heading] = self.sections.get(self.heading, "") + " " + data


def read(record: EvalRecord) -> Reader:
    reader = Reader()
    reader.feed(page(record))
    reader.close()
    assert not reader.open
    return reader


def test_everything_measured_is_on_the_page() -> None:
    record = sample_record()
    reader = read(record)
    text, headings = " ".join(reader.sections.values()), " ".join(reader.sections)
    for result in record.results:
        assert result.label in text + headings or result.not_run, result.label
        assert all(note in text for note in result.notes)
    assert "11.374" in reader.sections["Perplexity"] and "+1.726 %" in reader.sections["Perplexity"]
    assert "gptq-windows-2048" in reader.sections["Perplexity"] and "lm-eval" in reader.sections["Perplexity"]
    divergence = reader.sections["Divergence from the source"]
    assert "0.02134" in divergence and "2.371e-05" in divergence and "noise floor" in divergence
    needles = reader.sections["Retrieval: needle grid, length x depth"]
    for cell in (cell for result in record.results for cell in result.cells if "depth" in cell):
        assert f"{cell['hits']}/{cell['samples']}" in needles and f"{cell['length']:,}" in needles
    assert "2,048 *" in needles and "4,096 *" not in needles
    assert "does not exercise MSA" in reader.sections["Data and notes"]
    assert "needs probabilities" in reader.sections["Not run"]
    assert "18 of 7296 experts" in reader.sections["Expert coverage of the conversion"]
    assert "layer 59" in reader.sections["Error of every layer"]
    assert "5d" * 32 in reader.sections["Data and notes"]


def test_nothing_is_fetched_and_nothing_is_markup_by_accident() -> None:
    html = page(sample_record())
    assert not re.search(r"https?://|src=|@import|url\(|<script|<link", html)
    assert "a figure of another shape &lt;script&gt;" in html


def test_a_record_with_a_single_figure_has_no_empty_section() -> None:
    record = sample_record()
    few = record.model_copy(
        update={"results": record.results[:1], "layers": [], "coverage": None, "source": None, "notes": []}
    )
    assert set(read(few).sections) == {"", "Perplexity", "Data and notes"}
    none = few.model_copy(update={"results": [], "checkpoint": Measured(name="<b>x</b>")})
    assert set(read(none).sections) == {""} and "&lt;b&gt;x" in page(none)


def test_write_report_makes_the_folder(tmp_path: Path) -> None:
    written = write_report(sample_record(), tmp_path / "new" / "report")
    assert written.name == "eval.html" and written.read_text() == page(sample_record())


def colours_of(scheme: str) -> dict[str, str]:
    light, dark = STYLE.split("@media screen and (prefers-color-scheme:dark)")
    return dict(re.findall(r"--(\w+):(#[0-9a-f]{3,6})", light if scheme == "light" else dark))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_curves_have_contrast(scheme: str) -> None:
    """WCAG AA: 4.5 between a text, or a curve, and the page or the verdict's box."""
    colours = colours_of(scheme)
    for ink in ("ink", "soft", "warn", "accent", "c2", "c3", "c4", "c5"):
        for ground in ("page", "band"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_in_cells_have_contrast(scheme: str) -> None:
    """WCAG AA: 4.5 between the text and the shade that it stands on."""
    colours = colours_of(scheme)
    ink = dict(re.findall(r"td\.(\w+)\{background:var\(--\w+\);color:var\(--(\w+)\)", STYLE))
    used = {heat(share / 100) for share in range(101)}
    assert used == set(ink)
    for shade, text in ink.items():
        assert contrast(colours[shade], colours[text]) >= 4.5, (shade, text, contrast(colours[shade], colours[text]))


def contrast(one: str, other: str) -> float:
    a, b = sorted((luminance(one), luminance(other)), reverse=True)
    return (a + 0.05) / (b + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_shades_grow_with_the_share_and_the_ends_are_their_own() -> None:
    order = [heat(share) for share in (0.0, 0.05, 0.3, 0.5, 0.7, 0.95, 1.0)]
    assert order == ["zero", "h0", "h1", "h2", "h5", "h6", "h7"]


def test_a_logarithmic_chart_leaves_out_zero_and_prints_the_rest() -> None:
    chart = bucket_chart(["a", "b", "c"], {"kl": [0.0, 0.01, None]}, "t", logarithmic=True)
    assert chart.count("<circle") == 1 and "0.0100" in chart
    assert bucket_chart(["a"], {"kl": [0.0]}, "t", logarithmic=True) == ""
