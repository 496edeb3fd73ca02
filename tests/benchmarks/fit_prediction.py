"""Predicted against measured KL divergence of whole recipes: `m3quant.planning.sensitivity` put to the test.

One measuring pass with more pilots than it needs: recipes whose layers differ, which no prediction has seen. Prints a
line a recipe, and with --out writes them as JSON.

    python -m tests.benchmarks.fit_prediction --model tiny-m3 --windows 16 --calibration tests/fixtures/calibration.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from m3quant.api.calibration_text import calibration_windows
from m3quant.calibration.mixture import parse_mixture
from m3quant.checkpoint import Checkpoint
from m3quant.convert.measure import MeasureSettings, Measuring
from m3quant.planning.fit import Fitting
from m3quant.running.device import pick_device
from m3quant.running.stopping import StopFlag
from tests.support.paths import FIXTURES

WIDTHS = ("int2-g128-asym", "int3-g128-asym", "int4-g128")
CANDIDATES = {
    "routed_experts": WIDTHS,
    **dict.fromkeys(("attention", "shared_experts", "dense_mlp"), ("int4-g128", "int8-g128")),
}
# Experts' widths in the first layer that has them, in those between, and in the last; and what every token passes through.
RECIPES = (
    ("int2-g128-asym", "int4-g128", "int4-g128", "int8-g128"),
    ("int4-g128", "int4-g128", "int2-g128-asym", "int8-g128"),
    ("int4-g128", "int2-g128-asym", "int2-g128-asym", "int8-g128"),
    ("int2-g128-asym", "int3-g128-asym", "int3-g128-asym", "int8-g128"),
    ("int3-g128-asym", "int2-g128-asym", "int2-g128-asym", "int8-g128"),
    ("int2-g128-asym", "int2-g128-asym", "int2-g128-asym", "int4-g128"),
)

Layers = list[dict[str, str]]


class Narrator:
    """A progress that prints lines."""

    def start(self, total_bytes: int, done_bytes: int, label: str = "") -> None: ...

    def advance(self, count: int) -> None: ...

    def say(self, line: str) -> None:
        click.echo(line, err=True)


class WithRecipes(Measuring):
    """The measuring pass with RECIPES after its own pilots."""

    def pilot_recipes(self) -> list[tuple[Layers, bool | None]]:
        return [*super().pilot_recipes(), *((self.layers_of(recipe), None) for recipe in RECIPES)]

    def layers_of(self, recipe: tuple[str, str, str, str]) -> Layers:
        own = self.fitting.choices.candidates
        having = [n for n, roles in enumerate(own) if self.fitting.bulk in roles]
        place = {n: 0 if n == having[0] else 2 if n == having[-1] else 1 for n in having}
        return [
            {role: recipe[place[n]] if role == self.fitting.bulk else recipe[3] for role in roles}
            for n, roles in enumerate(own)
        ]


@click.command()
@click.option("--model", default="tiny-m3", help="A fixture, or a folder.")
@click.option("--windows", default=16)
@click.option("--heldout", default=16)
@click.option("--device", default="cpu")
@click.option("--calibration", multiple=True)
@click.option("--out", type=click.Path(path_type=Path), default=None)
def main(model: str, windows: int, heldout: int, device: str, calibration: tuple[str, ...], out: Path | None) -> None:
    folder = FIXTURES / model if (FIXTURES / model).is_dir() else Path(model)
    data = {"windows": windows, "heldout_windows": heldout}
    fitting = Fitting(Checkpoint.open(folder), data, candidates=CANDIDATES)
    text = calibration_windows(fitting.base, parse_mixture(calibration))
    measuring = WithRecipes(fitting, text, MeasureSettings(device=device), pick_device(device), StopFlag(), Narrator())
    found = measuring.run("not compared")
    own = len(found.pilots) - len(RECIPES)
    known = found.model_copy(update={"pilots": found.pilots[:own]})
    rows: list[dict[str, Any]] = []
    for number, pilot in enumerate(found.pilots):
        predicted = known.kl_of(pilot.estimate)
        row = {"pilot": number < own, "layers": pilot.layers, "predicted": predicted, "measured": pilot.kl}
        rows.append(row)
        shown = " ".join(f"{layer.get(fitting.bulk, '-')}/{layer['attention']}" for layer in pilot.layers)
        click.echo(
            f"{'pilot ' if number < own else ''}{shown}: predicted {predicted:.5f}, measured {pilot.kl:.5f}, off {predicted / pilot.kl - 1:+.1%}"
        )
    if out is not None:
        document = {"model": folder.name, "text": text.record(), "others_left": found.others_left, "recipes": rows}
        out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
