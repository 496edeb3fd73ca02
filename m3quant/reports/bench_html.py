"""The page of a bench: speed and latencies at every point, and what was measured with. A pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .pages import Page, Section, Table, Text, pairs

DEFINITIONS = (
    "Decoding: requests at once over the mean time of a token after the first. All tokens: generated tokens over the whole run, prompts "
    "included in its time.",
    "TTFT: time to the first token. ITL: time between two tokens. Both in milliseconds, by percentile.",
    "Accepted: tokens that a step with a draft model gave, the model's own one included; of source: over the same figure of the source.",
    "Bound: the share of what memory bandwidth allows for these requests (plan's floor of the price).",
)


@dataclass(frozen=True)
class BenchPage:
    """facts: (label, text) of what was measured with. head, rows: the table; left: what was not measured, one line each; low: where the
    draft is accepted less often than was asked for."""

    title: str
    facts: Sequence[tuple[str, str]]
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    left: Sequence[str]
    low: Sequence[str] = ()


def page(bench: BenchPage) -> str:
    """One HTML document: nothing is loaded, no script."""
    sections = [Section("Speed", [Table(bench.head, bench.rows, text=(0,)), Text(DEFINITIONS, soft=True)])]
    if bench.low:
        sections.append(Section("Acceptance below what was asked for", [Text(bench.low)]))
    if bench.left:
        sections.append(Section("Not measured", [Text(bench.left)]))
    sections.append(Section("Measured with", [pairs(bench.facts)]))
    return Page(bench.title, "bench", [], sections).html()
