"""The report's pictures as inline SVG: a line over the layers, and heatmaps of layers x experts.

Pure functions from numbers to markup. Colours are CSS classes (see report_html.STYLE), so that the same picture is
right on a light screen, a dark one and paper. No xmlns: the markup stands inside HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

SHADES = 8  # classes h0 .. h7 of the heatmap's colour ramp
WIDTH = 1000
_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 64, 56, 14, 40, 270


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits for a person; a dash for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def line_chart(points: Sequence[tuple[int, float]], y_title: str, point_title: Callable[[int, float], str]) -> str:
    """One line over the layers, from 0 up. points: (layer, value) in order of layers; at least one."""
    top = max(value for _, value in points) or 1.0
    step = _nice(top / 4)
    top = step * math.ceil(top / step)
    first, last = points[0][0], points[-1][0]
    width, height = WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(layer: int) -> float:
        return _LEFT + width * ((layer - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return _TOP + height * (1 - value / top)

    out = [
        f'<svg class="wide" viewBox="0 0 {WIDTH} {_HEIGHT}" role="img"><title>{escape(y_title)}, layer by layer</title>'
    ]
    for tick in range(round(top / step) + 1):
        at = y(tick * step)
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(f'<text class="tick end" x="{_LEFT - 8}" y="{at + 4:.1f}">{tick * step:.6g}</text>')
    every = max(1, math.ceil(len(points) / 16))
    for layer, _ in points[::every]:
        out.append(f'<text class="tick mid" x="{x(layer):.1f}" y="{_HEIGHT - _BOTTOM + 18}">{layer}</text>')
    out.append(f'<text class="tick mid" x="{_LEFT + width / 2}" y="{_HEIGHT - 4}">layer</text>')
    path = " ".join(f"{x(layer):.1f},{y(value):.1f}" for layer, value in points)
    out.append(f'<polyline class="line" points="{path}"/>')
    for layer, value in points:
        title = escape(point_title(layer, value))
        out.append(
            f'<circle class="dot" cx="{x(layer):.1f}" cy="{y(value):.1f}" r="3.5"><title>{title}</title></circle>'
        )
    layer, value = points[-1]
    out.append(f'<text class="label" x="{x(layer) + 8:.1f}" y="{y(value) + 4:.1f}">{value:.4f}</text>')
    return "".join(out) + "</svg>"


def heatmap(
    layers: Sequence[int],
    rows: Sequence[Sequence[float]],
    outlined: Sequence[Sequence[int]],
    title: str,
    unit: str,
    cell_title: Callable[[int, int], str] | None = None,
) -> str:
    """One rectangle per layer and expert, shaded by the logarithm of its value; zero has a shade of its own.

    rows[i][e]: value of expert e in layers[i]. outlined[i]: experts of layers[i] to outline, ascending; neighbours share
    an outline. cell_title(i, e): what a
    pointer over the cell shows; without it, cells of one shade share a path, which keeps the file small.
    """
    experts = max(len(row) for row in rows)
    across, down = min(28.0, 930 / experts), 18 if len(rows) <= 16 else 9
    width, height = max(620, 58 + across * experts), 4 + down * len(rows)  # the legend needs 620
    shade = _shades(rows)
    size = f'width="{width:.0f}" height="{height + 44}" viewBox="0 0 {width:.0f} {height + 44}"'
    out = [f'<svg {size} role="img"><title>{escape(title)}</title>']
    every = max(1, math.ceil(13 / down))
    for i in range(0, len(rows), every):
        out.append(f'<text class="tick end" x="42" y="{4 + down * (i + 0.5) + 4:.1f}">{layers[i]}</text>')
    columns = max(1, 2 ** math.ceil(math.log2(26 / across)))
    for e in range(0, experts, columns):
        out.append(f'<text class="tick mid" x="{48 + across * (e + 0.5):.1f}" y="{height + 13}">{e}</text>')
    out.append(f'<g transform="translate(48 4) scale({across:.4f} {down})" shape-rendering="crispEdges">')
    out.append(_cells(rows, shade, cell_title) if cell_title else _areas(rows, shade))
    edges = "".join(f"M{e} {i}h{n}v1h-{n}z" for i, chosen in enumerate(outlined) for e, n in _runs(chosen))
    out.append(f'<path class="starved" d="{edges}"/></g>' if edges else "</g>")
    out.append(_legend(rows, height + 26, unit, bool(edges)))
    return "".join(out) + "</svg>"


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of every run of consecutive numbers in an ascending sequence."""
    runs: list[tuple[int, int]] = []
    for n in numbers:
        if runs and sum(runs[-1]) == n:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((n, 1))
    return runs


def _cells(rows: Sequence[Sequence[float]], shade: Callable[[float], str], title: Callable[[int, int], str]) -> str:
    out = []
    for i, row in enumerate(rows):
        out.append(f'<g transform="translate(0 {i})">')
        for e, value in enumerate(row):
            out.append(f'<path class="{shade(value)}" d="M{e} 0h1v1h-1z"><title>{escape(title(i, e))}</title></path>')
        out.append("</g>")
    return "".join(out)


def _areas(rows: Sequence[Sequence[float]], shade: Callable[[float], str]) -> str:
    """One path per shade; neighbours of one shade are one rectangle."""
    paths: dict[str, list[str]] = {}
    for i, row in enumerate(rows):
        start = 0
        for e in range(1, len(row) + 1):
            if e == len(row) or shade(row[e]) != shade(row[start]):
                paths.setdefault(shade(row[start]), []).append(f"M{start} {i}h{e - start}v1h-{e - start}z")
                start = e
    return "".join(f'<path class="{name}" d="{"".join(parts)}"/>' for name, parts in sorted(paths.items()))


def _span(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The smallest and largest positive value; (1, 1) where there is none."""
    positive = [value for row in rows for value in row if value > 0]
    return (min(positive), max(positive)) if positive else (1.0, 1.0)


def _shades(rows: Sequence[Sequence[float]]) -> Callable[[float], str]:
    low, high = _span(rows)
    scale = SHADES / math.log(high / low) if high > low else 0.0

    def shade(value: float) -> str:
        if value <= 0:
            return "zero"
        return f"h{min(SHADES - 1, int(scale * math.log(value / low)))}"

    return shade


def _legend(rows: Sequence[Sequence[float]], y: float, unit: str, starved: bool) -> str:
    """The ramp from the smallest to the largest value, then what zero and an outline mean."""
    low, high = _span(rows)
    out, x = [f'<text class="tick" x="48" y="{y + 11}">{number(low, 3)}</text>'], 48 + 7 * len(number(low, 3)) + 8
    for i in range(SHADES):
        out.append(f'<rect class="h{i}" x="{x + 18 * i}" y="{y}" width="18" height="13"/>')
    x += 18 * SHADES + 8
    text = f"{number(high, 3)} {unit} (logarithmic)"
    out.append(f'<text class="tick" x="{x}" y="{y + 11}">{escape(text)}</text>')
    x += 7 * len(text) + 16
    if any(value <= 0 for row in rows for value in row):
        out.append(f'<rect class="zero" x="{x}" y="{y}" width="13" height="13"/>')
        out.append(f'<text class="tick" x="{x + 19}" y="{y + 11}">none</text>')
        x += 68
    if starved:
        out.append(f'<rect class="starved" x="{x}" y="{y}" width="13" height="13"/>')
        out.append(f'<text class="tick" x="{x + 19}" y="{y + 11}">below the floor</text>')
    return "".join(out)


def _nice(value: float) -> float:
    """The nearest of 1, 2, 2.5, 5 and 10 times a power of ten that is not below `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 2.5, 5, 10) if power * step >= value * (1 - 1e-9))
