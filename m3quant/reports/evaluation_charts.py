"""The pictures of an evaluation's page: curves over position buckets as inline SVG, and a grid with its numbers in the cells.

Pure functions from numbers to markup; colours are the CSS classes of m3quant.reports.conversion_html.STYLE and STYLE here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from .charts import WIDTH, number

STYLE = """
.heat{border-collapse:separate;border-spacing:3px}
.heat th,.heat td{border:0;padding:6px 8px;text-align:center;vertical-align:middle}
.heat th.row{text-align:right;color:var(--soft);white-space:nowrap}
.heat td{min-width:92px;border-radius:4px;font-weight:600}
.heat td small{display:block;font-weight:400;font-size:12px}
.heat tbody tr:hover{background:none}
td.zero{background:var(--zero);color:var(--ink)}
td.h0{background:var(--h0);color:var(--ink)}td.h1{background:var(--h1);color:var(--ink)}
td.h2{background:var(--h2);color:var(--ink)}td.h5{background:var(--h5);color:var(--page)}
td.h6{background:var(--h6);color:var(--page)}td.h7{background:var(--h7);color:var(--page)}
.line.second{stroke:var(--warn);stroke-dasharray:6 4}.dot.second{fill:var(--warn)}
.value{fill:var(--ink);stroke:var(--page);stroke-width:4px;paint-order:stroke}
.chip{display:inline-block;width:22px;height:0;border-top:3px solid var(--accent);vertical-align:middle;margin:0 6px 2px 0}
.chip.second{border-top:3px dashed var(--warn)}
.key span+span{margin-left:18px}
td.wrap{min-width:180px}
@media (max-width:640px){body{padding:16px 12px 32px}h1{font-size:21px}svg.wide{min-width:700px}svg.wide text{font-size:15px}th,td{padding-right:10px}
.heat td{min-width:78px;padding:5px 4px}.heat th.row{white-space:normal}}
"""
# Shades on which the ink or the page's colour reads with a contrast of 4.5 and more, light and dark; h3 and h4 do not.
_SHADES = ("h0", "h1", "h2", "h5", "h6", "h7")
_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 74, 30, 26, 56, 300


def heat(share: float) -> str:
    """The class of a cell for a share of 0 to 1; none and all have shades of their own."""
    if share <= 0:
        return "zero"
    return _SHADES[-1] if share >= 1 else _SHADES[min(int(share * 5), 4)]


def grid(
    corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[float, str, str] | None]]]
) -> str:
    """A table of cells (share, number, small print), shaded by share; None is an empty cell."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = []
    for name, cells in rows:
        shown = "".join(
            "<td></td>"
            if cell is None
            else f'<td class="{heat(cell[0])}">{escape(cell[1])}<small>{escape(cell[2])}</small></td>'
            for cell in cells
        )
        body.append(f'<tr><th class="row" scope="row">{escape(name)}</th>{shown}</tr>')
    return (
        f'<div class="scroll"><table class="heat"><thead><tr><th class="row">{escape(corner)}</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def bucket_chart(
    buckets: Sequence[str], series: Mapping[str, Sequence[float | None]], title: str, *, logarithmic: bool
) -> str:
    """One or two curves over position buckets, every value printed; a logarithmic axis leaves out what is not positive."""
    values = [v for row in series.values() for v in row if v is not None and (v > 0 or not logarithmic)]
    if not values:
        return ""
    ticks = _log_ticks(values) if logarithmic else _ticks(values)
    low, high = ticks[0], ticks[-1]
    width, height = WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(i: int) -> float:
        return _LEFT + width * (i + 0.5) / len(buckets)

    def y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return _TOP + height * (1 - share)

    out = [f'<svg class="wide" viewBox="0 0 {WIDTH} {_HEIGHT}" role="img"><title>{escape(title)}</title>']
    for tick in ticks:
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        out.append(f'<text class="tick end" x="{_LEFT - 8}" y="{y(tick) + 4:.1f}">{tick:.6g}</text>')
    for i, name in enumerate(buckets):
        out.append(f'<text class="tick mid" x="{x(i):.1f}" y="{_HEIGHT - _BOTTOM + 20}">{escape(name)}</text>')
    out.append(
        f'<text class="tick mid" x="{_LEFT + width / 2}" y="{_HEIGHT - 8}">position of the predicted token</text>'
    )
    for number_, (name, row) in enumerate(series.items()):
        kind = " second" if number_ else ""
        points = [(i, v) for i, v in enumerate(row) if v is not None and (v > 0 or not logarithmic)]
        path = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in points)
        out.append(f'<polyline class="line{kind}" points="{path}"/>')
        for i, value in points:
            shown = number(value, 3)
            out.append(
                f'<circle class="dot{kind}" cx="{x(i):.1f}" cy="{y(value):.1f}" r="4">'
                f"<title>{escape(f'{name}, {buckets[i]}: {shown}')}</title></circle>"
            )
            # The second curve's numbers stand under it, so that they do not run into the first's.
            out.append(
                f'<text class="value mid" x="{x(i):.1f}" y="{y(value) + (20 if kind else -10):.1f}">{shown}</text>'
            )
    return "".join(out) + "</svg>"


def key(names: Sequence[str]) -> str:
    """What the curves of a chart are."""
    marks = ('<i class="chip"></i>', '<i class="chip second"></i>')
    return (
        '<p class="soft key">'
        + "".join(f"<span>{m}{escape(n)}</span>" for m, n in zip(marks, names, strict=False))
        + "</p>"
    )


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten around the values, with room for the numbers above and below."""
    low = math.floor(math.log10(min(values) / 3))
    high = math.ceil(math.log10(max(values) * 2))
    return [10.0**power for power in range(low, max(high, low + 1) + 1)]


def _ticks(values: Sequence[float]) -> list[float]:
    """Four or five round numbers around the values."""
    spread = (max(values) - min(values)) or abs(max(values)) or 1.0
    low, high = min(values) - 0.15 * spread, max(values) + 0.2 * spread
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k * 4 >= (high - low) * 0.9)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, last + 1)]
