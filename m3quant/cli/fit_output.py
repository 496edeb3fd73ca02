"""What `fit` prints: the frontier, the chosen bits, and the recipe as a file that can be edited."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import click

from ..api import Answer
from ..checkpoint import write_bytes_atomic
from ..errors import OptionError
from ..planning.fit import Point
from ..planning.plan import bits_per_weight
from ..recipe.layer_ranges import show_layers
from ..reports.fit_html import FitPage, page
from ..running.words import human_bytes
from ..runtime.engine_notes import release_notes
from .options import print_table

EVENLY = (
    "no sensitivity was measured: what every token passes through gets its widest scheme first, then all layers' experts "
    "are widened step by step, a partial step at equal distances; measure with --measure to choose by KL divergence"
)
BAR = 28  # characters of the longest bar


def fit_json(found: Answer) -> str:
    measured = found.sensitivity
    document: dict[str, Any] = {
        "source": found.checkpoint.root,
        "sensitivity": measured.model_dump(include={"source", "text", "rounding", "pilots"}) if measured else None,
        "rule": "least predicted KL divergence" if measured else EVENLY,
        "frontier": [{**point_json(row.point), "longest_context": row.longest_context} for row in found.rows],
        "refused": [{"role": role, "scheme": scheme, "why": why} for (role, scheme), why in found.refused.items()],
        "chosen": None,
    }
    if found.chosen and found.plan:
        document["chosen"] = {
            **point_json(found.chosen),
            "budget": found.asked.budget,
            "bits_per_weight": bits_per_weight(found.plan),
            "recipe": found.plan.recipe.model_dump(),
            "notes": _notes(found),
            "node": found.verdict.node.name if found.verdict else None,
            "engine_release": found.verdict.ask.release if found.verdict else None,
            "longest_context": found.verdict.longest_context if found.verdict else None,
            "pool_tokens": found.verdict.pool.tokens if found.verdict else None,
        }
    return json.dumps(document, indent=2)


def point_json(point: Point) -> dict[str, Any]:
    return {"output_bytes": point.nbytes, "predicted_kl": point.kl, "layers": [dict(own) for own in point.schemes]}


def print_fit(found: Answer, recipe_out: Path | None) -> None:
    measured = found.sensitivity
    if measured:
        text = measured.text
        click.echo(
            f"sensitivity: measured on {text.source}, {text.windows} windows of {text.window_length} tokens and "
            f"{text.heldout_windows} held out"
        )
    else:
        click.echo(f"bytes alone: {EVENLY}")
    if found.verdict:
        click.echo(f"node {_made_for(found)}, at the high end of the memory model")
    _print_frontier(found)
    for (role, scheme), why in found.refused.items():
        click.echo(f"not tried: {role} {scheme}: {why}")
    if not found.chosen or not found.plan:
        click.echo("no budget was given: add --budget SIZE or --on NODE to choose")
        return
    budget = f" of {found.asked.budget:,} allowed" if found.asked.budget else ""
    kl = f", predicted KL {found.chosen.kl:.4f} nats a token" if found.chosen.kl is not None else ""
    click.echo(
        f"chosen: {found.chosen.nbytes:,} bytes ({human_bytes(found.chosen.nbytes)}){budget}, "
        f"{bits_per_weight(found.plan):.3f} bits per quantized weight{kl}"
    )
    for role, scheme, layers in by_role(found.chosen):
        click.echo(f"  {role}: {scheme} in layers {show_layers(layers)}")
    if found.verdict:
        click.echo(
            f"on {found.verdict.node.name}: longest context {found.verdict.longest_context:,}, KV pool of {found.verdict.pool.tokens:,} tokens"
        )
    for note in _notes(found):
        click.echo(f"note: {note}")
    click.echo(f"recipe: {recipe_out}" if recipe_out else "--recipe-out FILE writes this as a recipe")


def _notes(found: Answer) -> list[str]:
    """Of the recipe, and of the engine's release where there is a node."""
    assert found.plan is not None
    return [*found.plan.notes, *(release_notes(found.verdict) if found.verdict else ())]


def _made_for(found: Answer) -> str:
    """The node, what it is to serve, and with which release, where one was asked for."""
    assert found.verdict is not None
    ask, dtype = found.verdict.ask, found.verdict.setup.kv_dtype
    release = f" in {found.verdict.engine.title} {ask.release}" if ask.release else ""
    return f"{found.asked.node}: {ask.concurrency} x {ask.context:,} tokens of {dtype} cache{release}"


def _print_frontier(found: Answer) -> None:
    kls = [row.point.kl for row in found.rows if row.point.kl]
    heading = ["output", "bulk of the weights"]
    heading += ["predicted KL", "(logarithmic)"] if found.sensitivity else []
    heading += ["longest context"] if found.ask else []
    rows = [heading]
    for row in found.rows:
        cells = [human_bytes(row.point.nbytes), bulk(row.point)]
        if found.sensitivity:
            kl = row.point.kl or 0.0
            cells += [f"{kl:.5f}", "#" * bar(kl, min(kls, default=1.0), max(kls, default=1.0))]
        if found.ask:
            cells.append(f"{row.longest_context:,}" if row.longest_context else "does not fit")
        rows.append(cells)
    print_table(rows)


def bar(value: float, low: float, high: float) -> int:
    """Length of a bar for a value between low and high: 1 to BAR, by the logarithm."""
    if value <= 0 or high <= low:
        return 1
    return 1 + round((BAR - 1) * math.log(value / low) / math.log(high / low))


def bulk(point: Point) -> str:
    """How many layers have which scheme for the role that most weights are in, most frequent first."""
    experts = any("routed_experts" in own for own in point.schemes)
    role = "routed_experts" if experts else "dense_mlp"
    counts = Counter(own[role] for own in point.schemes if role in own)
    return ", ".join(f"{scheme} x{count}" for scheme, count in counts.most_common())


def by_role(point: Point) -> list[tuple[str, str, list[int]]]:
    """(role, scheme, layers) of a recipe."""
    found: dict[tuple[str, str], list[int]] = {}
    for layer, own in enumerate(point.schemes):
        for item in own.items():
            found.setdefault(item, []).append(layer)
    return sorted((role, scheme, layers) for (role, scheme), layers in found.items())


def write_recipe(path: Path, found: Answer) -> None:
    """The recipe with a heading that says where it is from. Raises OutputError or OSError where it cannot be written."""
    assert found.plan and found.chosen
    kl = f", predicted KL {found.chosen.kl:.4f} nats a token" if found.chosen.kl is not None else ", bytes alone"
    node = f"# For {_made_for(found)}.\n" if found.verdict else ""
    heading = (
        f"# Made by m3quant fit for {found.plan.family.model_type}: {found.chosen.nbytes:,} bytes{kl}.\n{node}"
        "# `schemes` holds for every layer that `layers` does not name. Convert with --recipe, or edit first.\n"
    )
    write_bytes_atomic(path, (heading + found.plan.recipe.dump()).encode())


def write_chart(path: Path, found: Answer) -> None:
    """The page of the frontier. Raises OptionError where nothing was measured, OSError where it cannot be written."""
    if found.sensitivity is None:
        raise OptionError(
            "--chart draws KL divergence, which was not measured: give --sensitivity or --measure with it."
        )

    def drawn(point: Point) -> tuple[int, float, str]:
        return point.nbytes, point.kl or 0.0, bulk(point)

    text = found.sensitivity.text
    facts = [
        (
            "text",
            f"{text.source}; {text.windows} windows of {text.window_length} tokens, {text.heldout_windows} held out",
        ),
        ("rounding", found.sensitivity.rounding),
    ]
    if found.chosen:
        facts.append(
            ("chosen", f"{human_bytes(found.chosen.nbytes)}, predicted KL {found.chosen.kl or 0.0:.4f} nats a token")
        )
    chosen = drawn(found.chosen) if found.chosen else None
    layers = found.chosen.schemes if found.chosen else ()
    title = f"{found.sensitivity.source.model_type}: bits fitted to bytes"
    shown = FitPage(title, facts, [drawn(row.point) for row in found.rows], chosen, layers)
    write_bytes_atomic(path, page(shown).encode())
