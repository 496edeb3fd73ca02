"""The page of a fit: bytes against predicted KL divergence, and the schemes of every layer. A pure function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .charts import bytes_chart
from .pages import Figure, Page, Section, Table


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
    caption = "Each point is the recipe with the least predicted KL divergence of all that are as small; the recipe chosen stands out."
    dots = ["a recipe", *(["the chosen one"] if fit.chosen else [])]
    sections = [
        Section(
            "", [Figure(bytes_chart(fit.frontier, fit.chosen), caption, ["least predicted divergence by bytes"], dots)]
        )
    ]
    if fit.layers:
        roles = list(dict.fromkeys(role for own in fit.layers for role in own))
        rows = [[n, *(own.get(role, "") for role in roles)] for n, own in enumerate(fit.layers)]
        sections.append(Section("Schemes by layer", [Table(["layer", *roles], rows, text=range(1, len(roles) + 1))]))
    return Page(fit.title, "", [f"{label}: {text}" for label, text in fit.facts], sections).html()
