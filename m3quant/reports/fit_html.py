"""The page of a fit: bytes against predicted KL divergence, and the schemes of every layer. Pure functions and one writer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ..running.words import human_bytes
from .charts import WIDTH, number
from .conversion_html import STYLE, table

_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 74, 30, 20, 48, 360
_CHART_STYLE = ".chosen{fill:var(--warn);stroke:var(--page);stroke-width:1.5}"


@dataclass(frozen=True)
class FitPage:
    """frontier: (bytes, KL, what it is), by rising bytes. chosen: one such point, or None. layers: role -> scheme of
    every layer of the chosen recipe. facts: (label, text) lines under the title."""

    title: str
    facts: Sequence[tuple[str, str]]
    frontier: Sequence[tuple[int, float, str]]
    chosen: tuple[int, float, str] | None
    layers: Sequence[Mapping[str, str]]


def page(fit: FitPage) -> str:
    """One HTML document: nothing is loaded, no script."""
    parts = [
        f"<h1>{escape(fit.title)}</h1>",
        '<p class="soft">' + "<br>".join(f"{escape(label)}: {escape(text)}" for label, text in fit.facts) + "</p>",
        f'<figure class="scroll">{chart(fit.frontier, fit.chosen)}<figcaption>Each point is the recipe with the least '
        "predicted KL divergence of all that are as small; the recipe chosen stands out.</figcaption></figure>",
    ]
    if fit.layers:
        roles = list(dict.fromkeys(role for own in fit.layers for role in own))
        rows = [[n, *(own.get(role, "") for role in roles)] for n, own in enumerate(fit.layers)]
        parts.append("<h2>Schemes by layer</h2>" + table(["layer", *roles], rows, text=range(1, len(roles) + 1)))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(fit.title)}</title><style>{STYLE}{_CHART_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def chart(points: Sequence[tuple[int, float, str]], chosen: tuple[int, float, str] | None) -> str:
    """Bytes to the right, KL divergence upwards by its logarithm. Points without a divergence are left out; at least one."""
    shown = [point for point in points if point[1] > 0]
    every = [*shown, *([chosen] if chosen and chosen[1] > 0 else [])]
    left, right = min(p[0] for p in every), max(p[0] for p in every)
    low, high = (f(math.log10(p[1]) for p in every) for f in (min, max))
    low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    width, height = WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(nbytes: float) -> float:
        return _LEFT + width * ((nbytes - left) / (right - left) if right > left else 0.5)

    def y(kl: float) -> float:
        return _TOP + height * (high - math.log10(kl)) / (high - low)

    out = [f'<svg class="wide" viewBox="0 0 {WIDTH} {_HEIGHT}" role="img"><title>KL divergence by bytes</title>']
    for exponent in range(low, high + 1):
        for digit in (1, 2, 5) if exponent < high else (1,):
            value = digit * 10.0**exponent
            out.append(
                f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            )
            out.append(f'<text class="tick end" x="{_LEFT - 8}" y="{y(value) + 4:.1f}">{value:g}</text>')
    for tick in range(6):
        nbytes = left + (right - left) * tick / 5
        out.append(
            f'<text class="tick mid" x="{x(nbytes):.1f}" y="{_HEIGHT - _BOTTOM + 18}">{human_bytes(nbytes)}</text>'
        )
    out.append(f'<text class="tick mid" x="{_LEFT + width / 2}" y="{_HEIGHT - 6}">bytes of the output</text>')
    path = " ".join(f"{x(nbytes):.1f},{y(kl):.1f}" for nbytes, kl, _ in shown)
    out.append(f'<polyline class="line" points="{path}"/>')
    for kind, marked in (("dot", shown), ("chosen", [chosen] if chosen and chosen[1] > 0 else [])):
        for nbytes, kl, what in marked:
            title = escape(f"{human_bytes(nbytes)}: KL {number(kl)} nats a token; {what}")
            radius = 4 if kind == "dot" else 6
            out.append(
                f'<circle class="{kind}" cx="{x(nbytes):.1f}" cy="{y(kl):.1f}" r="{radius}"><title>{title}</title></circle>'
            )
    return "".join(out) + "</svg>"
