"""The parts of a page, and its one template. Light or dark as the reader's system says; paper is always light.

A report is data up to this point: sections of headings, texts, tables, shaded grids and figures. Every text is escaped by the template;
only a chart (`m3quant.reports.charts`) is markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .charts import curve_class, heat, heat_key, number
from .verdict import Verdict


@dataclass(frozen=True)
class Heading:
    kind: ClassVar = "heading"
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph of lines; soft: small print. A warning comes before the lines and is highlighted."""

    kind: ClassVar = "text"
    lines: Sequence[str]
    soft: bool = False
    warning: str = ""


@dataclass(frozen=True)
class Table:
    """A table. text, wrap: columns that read from the left, the latter over several lines; the others are numbers."""

    kind: ClassVar = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    text: Sequence[int] = ()
    wrap: Sequence[int] = ()
    caption: str = ""

    @property
    def many(self) -> bool:
        """Whether it is too wide for a phone, where each of its rows then becomes a list of labels and cells."""
        return len(self.head) > 4


def pairs(rows: Sequence[tuple[str, Any]]) -> Table:
    """A table of a label and what it says, without a head."""
    return Table((), [(label, str(value)) for label, value in rows], text=(0,), wrap=(1,))


@dataclass(frozen=True)
class Grid:
    """A table of cells (share, number, small print), shaded by share; None is an empty cell."""

    kind: ClassVar = "grid"
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[float, str, str] | None]]]


@dataclass(frozen=True)
class Figure:
    """A chart and what it shows. curves: their names, in the order of `charts.curve_class`; a drawing with a legend inside needs none.
    dots: names of single points, in the order of their marks `dot`, `chosen`."""

    kind: ClassVar = "figure"
    chart: Markup
    caption: str
    curves: Sequence[str]
    dots: Sequence[str] = ()


Part = Heading | Text | Table | Grid | Figure


@dataclass(frozen=True)
class Section:
    """Left out of the page without parts."""

    heading: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """kind: of page, behind the title in the browser. made: lines under the title. verdict: before everything else."""

    title: str
    kind: str
    made: Sequence[str]
    sections: Sequence[Section]
    verdict: Verdict | None = None

    def html(self) -> str:
        return _templates().get_template("page.html.jinja").render(page=self)


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("m3quant.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["heat_key"] = heat_key()
    environment.filters |= {
        "shown": lambda value: value if isinstance(value, str) else number(value),
        "heat": heat,
        "curve": curve_class,
    }
    return environment
