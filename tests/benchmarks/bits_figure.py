"""KL divergence by bytes: rounding to nearest, AWQ, error feedback and fitted bits, on the trained fixtures.

    python -m tests.benchmarks.bits_figure OUT [--model tiny-m2 tiny-m3] [--device cuda]     # writes OUT/bits.json
    python -m tests.benchmarks.bits_figure --draw      # figures/h200_bits.json as docs/images/bits_kl.svg

Experts of one width everywhere under each rounding, and for feedback also the mixed recipes on the efficient frontier of
`m3quant.planning.fit`, from a measurement of the same calibration text; INT8 in groups of 128 around, as rounding_ablation has
it. Bits: of an expert's weight on average, scales and zero points included. KL: 64 windows of heldout.txt, weights alone.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from m3quant.api.calibration_text import calibration_windows
from m3quant.calibration.mixture import parse_mixture
from m3quant.checkpoint import Checkpoint
from m3quant.convert.measure import MeasureSettings, measure
from m3quant.planning.fit import Fitting
from m3quant.schemes import Scheme, parse_scheme
from tests.support.paths import FIXTURES, ROOT

from .fit_prediction import CANDIDATES, WIDTHS, Narrator
from .rounding_ablation import EVERYTHING, INT8, Model, divergences

MEASURED = {"windows": 128, "heldout_windows": 32}
WIDE = ("int5-g128", "int6-g128", "int8-g128")
FIGURE = Path(__file__).with_name("figures") / "h200_bits.json"
PICTURE = ROOT / "docs" / "images" / "bits_kl.svg"


def bits_of(scheme: Scheme) -> float:
    """Bits of a weight with its share of the group's scale (16 bits) and zero point."""
    zero = 0 if scheme.symmetric else scheme.bits
    return scheme.bits + (16 + zero) / (scheme.group_size or math.inf)


def mixed(model: str, device: str) -> Iterator[list[str]]:
    """The schemes of the experts, layer by layer, of every efficient recipe that mixes widths."""
    candidates = {role: (names if role == "routed_experts" else ("int8-g128",)) for role, names in CANDIDATES.items()}
    fitting = Fitting(Checkpoint.open(FIXTURES / model), MEASURED, candidates=candidates)
    text = calibration_windows(fitting.base, parse_mixture((str(FIXTURES / "calibration.jsonl"),)))
    measured = measure(fitting, text, "not compared", MeasureSettings(device=device), Narrator())
    chosen = Fitting(fitting.checkpoint, MEASURED, measured, candidates)
    for choice in chosen.frontier():
        schemes = [layer.get(chosen.bulk, "") for layer in chosen.schemes(choice)]
        if len({name for name in schemes if name}) > 1:
            yield [name or WIDTHS[0] for name in schemes]  # a dense layer has no experts to give a scheme to


def rows(model: Model, device: str) -> Iterator[dict[str, Any]]:
    text = model.text("own", EVERYTHING)

    def row(rounding: str, schemes: list[str]) -> dict[str, Any]:
        parsed = [parse_scheme(name) for name in schemes]
        having = [scheme for scheme, spec in zip(parsed, model.specs, strict=True) if spec.moe is not None]
        found = divergences(model, parsed, INT8, "feedback" if rounding == "fit" else rounding, text)
        bits = sum(map(bits_of, having)) / len(having)
        return {"model": model.name, "rounding": rounding, "schemes": schemes, "bits": bits, **found}

    for width in (*WIDTHS, *WIDE):
        for rounding in ("nearest", "awq", "feedback"):
            yield row(rounding, [width] * len(model.specs))
    for schemes in mixed(model.name, device):
        yield row("fit", schemes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--model", nargs="+", default=["tiny-m2", "tiny-m3"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draw", action="store_true", help="draw the committed figures and do nothing else")
    options = parser.parse_args()
    if options.draw:
        PICTURE.parent.mkdir(exist_ok=True)
        PICTURE.write_text(picture(json.loads(FIGURE.read_text())["rows"]))
        return
    if options.out is None:
        parser.error("a folder to write to is missing")
    options.out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for name in options.model:
        for row in rows(Model(name, torch.device(options.device)), options.device):
            found.append(row)
            print(
                f"{name} {row['rounding']} {row['bits']:.3f} bits: KL {row['kl']:.5f} +- {row['kl_error']:.5f}",
                flush=True,
            )
            (options.out / "bits.json").write_text(json.dumps({"rows": found}, indent=1) + "\n")


# Okabe and Ito's colours, told apart by most people; every curve has a marker of its own too.
STYLES = {"nearest": ("#999999", "square"), "awq": ("#e69f00", "diamond"), "feedback": ("#0072b2", "circle"), "fit": ("#d55e00", "cross")}  # fmt: skip
NAMES = {
    "nearest": "rounded to nearest",
    "awq": "AWQ",
    "feedback": "error feedback",
    "fit": "feedback, bits fitted by layer",
}
WIDTH, HEIGHT, LEFT, TOP, GAP = 430, 300, 60, 30, 70


def picture(rows: list[dict[str, Any]]) -> str:
    """One panel a model: KL by its logarithm over bits, on white so that it reads on any page."""
    models = sorted({row["model"] for row in rows})
    width, height = LEFT + len(models) * (WIDTH + GAP), TOP + HEIGHT + 90
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, model in enumerate(models):
        out += panel([row for row in rows if row["model"] == model], model, LEFT + number * (WIDTH + GAP))
    for number, (rounding, name) in enumerate(NAMES.items()):
        x, y = LEFT + number * 210, height - 14
        out += [marker(rounding, x, y - 4), f'<text x="{x + 12}" y="{y}">{name}</text>']
    return "\n".join([*out, "</svg>"]) + "\n"


def panel(rows: list[dict[str, Any]], title: str, left: int) -> list[str]:
    low, high = (math.log10(f(row["kl"] for row in rows)) for f in (min, max))
    low, high = math.floor(low * 2) / 2, math.ceil(high * 2) / 2
    first, last = 2.0, 8.5

    def at(bits: float, kl: float) -> tuple[float, float]:
        return left + WIDTH * (bits - first) / (last - first), TOP + HEIGHT * (high - math.log10(kl)) / (high - low)

    out = [f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{title}</text>']
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            value = digit * 10.0**exponent
            if low <= math.log10(value) <= high:
                y = at(first, value)[1]
                out.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
                out.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for bits in range(2, 9):
        x, y = at(bits, 10.0**low)
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 4:.1f}" stroke="#333333"/>')
        out.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{bits}</text>')
    below = "bits of an expert's weight; KL divergence, nats a token, upwards"
    out.append(f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 38}" text-anchor="middle">{below}</text>')
    for rounding, (colour, _) in STYLES.items():
        points = sorted((row["bits"], row["kl"]) for row in rows if row["rounding"] == rounding)
        places = [at(*point) for point in points]
        if rounding != "fit":
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        out += [marker(rounding, *place) for place in places]
    return out


def marker(rounding: str, x: float, y: float) -> str:
    colour, kind = STYLES[rounding]
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    if kind == "cross":
        return f'<path d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10" stroke="{colour}" stroke-width="2.5"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if kind == "diamond" else ""
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"{turn}/>'


if __name__ == "__main__":
    main()
