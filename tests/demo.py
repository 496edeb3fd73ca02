"""`make demo`: convert the trained fixtures to INT4, AWQ INT4 and FP8, verify them, and show sizes and perplexity.

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
WINDOWS = ("--window-length", "512", "--windows", "32")


def m3quant(*arguments: object) -> Any:
    """Run one command with --json; its progress goes to the terminal. Leaves with its exit code if it fails."""
    command = [sys.executable, "-m", "m3quant", *map(str, arguments), "--json"]
    print("$ m3quant", *arguments, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        print(done.stdout)
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def options(model: str, recipe: str) -> tuple[str, ...]:
    """M3 has no `fp8` format in vLLM: its 128x128 blocks go into compressed-tensors."""
    native = recipe == "fp8-block" and model == "tiny-m3"
    return ("--to", recipe, *(("--format", "compressed-tensors") if native else ()))


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
        measured = m3quant("perplexity", source, *outputs.values(), "--data", HELDOUT, *WINDOWS)
        bytes_in = next(iter(made.values()))["source"]["bytes"]
        sizes = [bytes_in, *(made[recipe]["output_bytes"] for recipe in RECIPES)]
        for label, size, quality in zip(("source", *RECIPES), sizes, measured, strict=True):
            before, after = measured[0]["perplexity"], quality["perplexity"]
            rows.append((name, label, f"{size / 1e6:.2f} MB", f"{after:.4f}", f"{after / before - 1:+.2%}"))
    print(
        f"\nheld-out perplexity over {measured[0]['tokens']} tokens of {HELDOUT.relative_to(ROOT)}; every output verified\n"
    )
    for row in (("model", "checkpoint", "size", "perplexity", "change"), *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, (8, 10, 10, 11, 8), strict=True)))


if __name__ == "__main__":
    main()
