"""The pictures of every page as inline SVG: curves over layers, positions and bytes, and heatmaps of layers x experts.

Pure functions from numbers to markup. Colours are CSS classes (templates/style.css), so that the same picture works on a light
screen, a dark one and paper. No xmlns: the markup is inside HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from ..running.words import human_bytes

SHADES = 8  # classes h0 .. h7 of the heatmap's colour ramp
WIDTH = 1000
CURVES = 6  # classes c0 .. c5 of curves, each a colour and a dash of its own
# Shades on which the ink or the page's colour reads with a contrast of 4.5 and more, light and dark; h3 and h4 do not.
_SHADES = ("h0", "h1", "h2", "h5", "h6", "h7")


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits for display; a dash for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def heat(share: float) -> str:
    """The class of a cell for a share of 0 to 1; none and all have shades of their own."""
    if share <= 0:
        return "zero"
    return _SHADES[-1] if share >= 1 else _SHADES[min(int(share * 5), 4)]


def curve_class(which: int) -> str:
    """The class of the curve of that number, and of its mark in a legend; colours repeat after CURVES."""
    return f"c{which % CURVES}"


def heat_key() -> list[tuple[str, str]]:
    """(class, what it stands for) of every shade of `heat`, in order."""
    shares = ("none", "under 20 %", "under 40 %", "under 60 %", "under 80 %", "under 100 %", "all")
    return list(zip(("zero", *_SHADES), shares, strict=True))


@dataclass(frozen=True)
class _Axes:
    """The frame of a chart, in units of its drawing; shares run from 0 to 1, rightwards and upwards."""

    height: int
    left: int = 74
    right: int = 30
    top: int = 26
    bottom: int = 56

    def x(self, share: float) -> float:
        return self.left + (WIDTH - self.left - self.right) * share

    def y(self, share: float) -> float:
        return self.top + (self.height - self.top - self.bottom) * (1 - share)

    def drawn(
        self,
        title: str,
        across: Iterable[tuple[float, str]],
        up: Iterable[tuple[float, str]],
        below: str,
        curves: Iterable[str],
    ) -> Markup:
        """The whole drawing. across, up: (share, text) of the ticks; a line of the grid for each of the latter."""
        out = [f'<svg class="wide" viewBox="0 0 {WIDTH} {self.height}" role="img"><title>{escape(title)}</title>']
        for share, text in up:
            at = self.y(share)
            out.append(f'<line class="grid" x1="{self.left}" x2="{WIDTH - self.right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            out.append(f'<text class="tick end" x="{self.left - 8}" y="{at + 4:.1f}">{escape(text)}</text>')
        for share, text in across:
            y = self.height - self.bottom + 18
            out.append(f'<text class="tick mid" x="{self.x(share):.1f}" y="{y}">{escape(text)}</text>')
        out.append(f'<text class="tick mid" x="{self.x(0.5):.1f}" y="{self.height - 6}">{escape(below)}</text>')
        return Markup("".join([*out, *curves, "</svg>"]))

    def line(self, points: Sequence[tuple[float, float]], kind: str = "") -> str:
        """A curve through (share, share)."""
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline class="line{kind}" points="{path}"/>'

    def dot(self, point: tuple[float, float], kind: str, radius: float, title: str) -> str:
        """A point whose title a pointer shows."""
        at = f'cx="{self.x(point[0]):.1f}" cy="{self.y(point[1]):.1f}"'
        return f'<circle class="{kind}" {at} r="{radius}"><title>{escape(title)}</title></circle>'

    def text(self, point: tuple[float, float], kind: str, right: float, down: float, text: str) -> str:
        """A text that far from a point."""
        at = f'x="{self.x(point[0]) + right:.1f}" y="{self.y(point[1]) + down:.1f}"'
        return f'<text class="{kind}" {at}>{escape(text)}</text>'


def line_chart(points: Sequence[tuple[int, float]], y_title: str, point_title: Callable[[int, float], str]) -> Markup:
    """One line over the layers, from 0 up. points: (layer, value) in order of layers; at least one."""
    axes = _Axes(270, left=64, right=56, top=14, bottom=40)
    top = max(value for _, value in points) or 1.0
    step = _nice(top / 4)
    top = step * math.ceil(top / step)
    first, last = points[0][0], points[-1][0]

    def at(layer: int, value: float) -> tuple[float, float]:
        return ((layer - first) / (last - first) if last > first else 0.5), value / top

    up = [(tick * step / top, f"{tick * step:.6g}") for tick in range(round(top / step) + 1)]
    every = max(1, math.ceil(len(points) / 16))
    across = [(at(layer, 0)[0], str(layer)) for layer, _ in points[::every]]
    curve = [axes.line([at(*point) for point in points])]
    curve += [axes.dot(at(*point), "dot", 3.5, point_title(*point)) for point in points]
    curve.append(axes.text(at(*points[-1]), "label", 8, 4, f"{points[-1][1]:.4f}"))
    return axes.drawn(f"{y_title}, layer by layer", across, up, "layer", curve)


def bucket_chart(
    buckets: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    title: str,
    *,
    logarithmic: bool,
    below: str = "position of the predicted token",
) -> Markup:
    """Curves over buckets; of one or two every value is printed. A logarithmic axis leaves out what is not positive. below: of the axis."""
    values = [v for row in series.values() for v in row if v is not None and (v > 0 or not logarithmic)]
    if not values:
        return Markup("")
    axes = _Axes(300)
    ticks = _log_ticks(values) if logarithmic else _ticks(values)
    low, high = ticks[0], ticks[-1]

    def up(value: float) -> float:
        return math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)

    def across(i: int) -> float:
        return (i + 0.5) / len(buckets)

    curves = []
    for which, (name, row) in enumerate(series.items()):
        kind = curve_class(which)
        points = [(i, v) for i, v in enumerate(row) if v is not None and (v > 0 or not logarithmic)]
        curves.append(axes.line([(across(i), up(v)) for i, v in points], f" {kind}"))
        for i, value in points:
            at, shown = (across(i), up(value)), number(value, 3)
            curves.append(axes.dot(at, f"dot {kind}", 4, f"{name}, {buckets[i]}: {shown}"))
            if len(series) <= 2:  # the second curve's numbers stand under it, so that they do not run into the first's
                curves.append(axes.text(at, "value mid", 0, 20 if which else -10, shown))
    marks = [(across(i), name) for i, name in enumerate(buckets)]
    lines = [(up(tick), f"{tick:.6g}") for tick in ticks]
    return axes.drawn(title, marks, lines, below, curves)


def bytes_chart(points: Sequence[tuple[int, float, str]], chosen: tuple[int, float, str] | None) -> Markup:
    """KL divergence, by its logarithm, over bytes. points: (bytes, KL, what it is); those without a divergence are left out; at least one."""
    shown = [point for point in points if point[1] > 0]
    marked = [chosen] if chosen and chosen[1] > 0 else []
    plane = _OverBytes.around([(nbytes, kl) for nbytes, kl, _ in [*shown, *marked]])
    curves = [plane.axes.line([plane.at(nbytes, kl) for nbytes, kl, _ in shown])]
    for kind, radius, some in (("dot", 4, shown), ("chosen", 6, marked)):
        for nbytes, kl, what in some:
            title = f"{human_bytes(nbytes)}: KL {number(kl)} nats a token; {what}"
            curves.append(plane.axes.dot(plane.at(nbytes, kl), kind, radius, title))
    return plane.drawn("KL divergence by bytes", "bytes of the output", curves)


def size_chart(points: Sequence[tuple[str, int, float]], frontier: Sequence[str], floor: float | None) -> Markup:
    """Checkpoints by bytes and KL divergence. points: (name, bytes, KL); those without a divergence are left out.

    frontier: names that a line joins. floor: the noise floor, a line across.
    """
    shown = sorted((point for point in points if point[2] > 0), key=lambda point: point[1])
    if not shown:
        return Markup("")
    low = [(shown[0][1], floor)] if floor else []
    plane = _OverBytes.around([*((nbytes, kl) for _, nbytes, kl in shown), *low], margin=0.06)
    curves = [plane.axes.line([plane.at(nbytes, kl) for name, nbytes, kl in shown if name in frontier])]
    if floor:
        height = plane.at(plane.left, floor)[1]
        curves.append(plane.axes.line([(0.0, height), (1.0, height)], " c1"))
    for name, nbytes, kl in shown:
        at = plane.at(nbytes, kl)
        curves.append(plane.axes.dot(at, "dot", 5, f"{name}: {human_bytes(nbytes)}, KL {number(kl)} nats a token"))
        right = at[0] > 0.66
        curves.append(plane.axes.text(at, f"label{' end' if right else ''}", -10 if right else 10, -8, name))
    return plane.drawn("KL divergence by size", "bytes of the checkpoint", curves)


@dataclass(frozen=True)
class _OverBytes:
    """A plane of bytes across and the logarithm of a divergence up. left, right: bytes; low, high: powers of ten."""

    left: float
    right: float
    low: int
    high: int
    axes: _Axes = _Axes(360, right=44, top=20, bottom=48)

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]], margin: float = 0.0) -> _OverBytes:
        left, right = min(p[0] for p in points), max(p[0] for p in points)
        low, high = (f(math.log10(p[1]) for p in points) for f in (min, max))
        bottom = math.floor(low)
        room = margin * (right - left)
        return cls(left - room, right + room, bottom, max(math.ceil(high), bottom + 1))

    def at(self, nbytes: float, kl: float) -> tuple[float, float]:
        share = (nbytes - self.left) / (self.right - self.left) if self.right > self.left else 0.5
        return share, (math.log10(kl) - self.low) / (self.high - self.low)

    def drawn(self, title: str, below: str, curves: Iterable[str]) -> Markup:
        steps = (1, 2, 5) if self.high - self.low <= 3 else (1,)
        values = [d * 10.0**e for e in range(self.low, self.high + 1) for d in (steps if e < self.high else (1,))]
        up = [(self.at(self.left, value)[1], f"{value:g}") for value in values]
        width = self.right - self.left
        across = [
            (i / 5 if width else 0.5, human_bytes(int(self.left + width * i / 5))) for i in range(6 if width else 1)
        ]
        return self.axes.drawn(title, across, up, below, curves)


def heatmap(
    layers: Sequence[int],
    rows: Sequence[Sequence[float]],
    outlined: Sequence[Sequence[int]],
    title: str,
    unit: str,
    cell_title: Callable[[int, int], str] | None = None,
) -> Markup:
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
    return Markup("".join(out) + "</svg>")


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
