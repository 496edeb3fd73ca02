"""`make demo`: convert the trained fixtures to INT4, AWQ INT4 and FP8, verify them, and show sizes, perplexity and KL divergence.

Everything goes through the command line, as a user would do it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
HELDOUT = FIXTURES / "heldout.txt"
RECIPES = ("int4", "awq", "fp8", "fp8-block")
CALIBRATE = (
    "--calibration",
    FIXTURES / "calibration.jsonl",
    "--windows",
    64,
)  # of 164: half the time, a tenth more loss
MEASURE = ("--suite", ROOT / "tests" / "demo-suite.yaml", "--data", HELDOUT)


def m3quant(*arguments: object) -> Any:
    """Run one command with --json; its progress goes to the terminal. Leaves with its exit code if it fails."""
    command = [sys.executable, "-m", "m3quant", *map(str, arguments), "--json"]
    print("$ m3quant", *arguments, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        print(done.stdout)
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def options(model: str, recipe: str) -> tuple[object, ...]:
    """M3 has no `fp8` format in vLLM: its 128x128 blocks go into compressed-tensors. AWQ calibrates on the fixtures' kind of text."""
    native = recipe == "fp8-block" and model == "tiny-m3"
    data = CALIBRATE if recipe == "awq" else ()
    return ("--to", recipe, *data, *(("--format", "compressed-tensors") if native else ()))


def main() -> None:
    demo = ROOT / "demo"
    shutil.rmtree(demo, ignore_errors=True)
    demo.mkdir()
    rows = []
    for name in ("tiny-m2", "tiny-m3"):
        source = FIXTURES / name
        outputs = {recipe: demo / f"{name}-{recipe}" for recipe in RECIPES}
        made = {
            recipe: m3quant("convert", source, output, *options(name, recipe)) for recipe, output in outputs.items()
        }
        for output in outputs.values():
            m3quant("verify", output, "--source", source)
        for recipe, output in outputs.items():
            quality = m3quant("eval", output, "--source", source, *MEASURE)
            perplexity, divergence, noise = quality["results"][:3]
            before, after = (perplexity[key]["perplexity"] for key in ("source_metrics", "metrics"))
            if recipe == RECIPES[0]:
                size = f"{made[recipe]['source']['bytes'] / 1e6:.2f} MB"
                rows.append(
                    (name, "source", size, f"{before:.4f}", "", f"{noise['metrics']['kl_mean']:.5f} (noise floor)")
                )
            size, kl = f"{made[recipe]['output_bytes'] / 1e6:.2f} MB", f"{divergence['metrics']['kl_mean']:.5f}"
            rows.append((name, recipe, size, f"{after:.4f}", f"{after / before - 1:+.2%}", kl))
    print(f"\nover {perplexity['tokens']} tokens of {HELDOUT.relative_to(ROOT)}; every output verified\n")
    for row in (("model", "checkpoint", "size", "perplexity", "change", "KL divergence"), *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, (8, 10, 10, 11, 8, 22), strict=True)).rstrip())


if __name__ == "__main__":
    main()
