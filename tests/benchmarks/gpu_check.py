"""The fixtures converted on a GPU with every recipe, verified, with held-out perplexity: `python -m tests.benchmarks.gpu_check OUT`.

Writes OUT/gpu_check.json with the versions used. Layers of real width are tests.benchmarks.convert's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support.paths import FIXTURES, ROOT

RECIPES = ("int4", "awq", "awq-g32", "awq-all-int4", "fp8", "fp8-block")


def command(*arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "m3quant", *map(str, arguments), "--json"], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(
            f"m3quant {' '.join(map(str, arguments))}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return json.loads(done.stdout)


def fixtures(work: Path) -> list[dict[str, Any]]:
    """Convert, verify and measure every fixture with every recipe on the GPU."""
    rows = []
    for name in ("tiny-m2", "tiny-m3"):
        outputs = {recipe: work / f"{name}-{recipe}" for recipe in RECIPES}
        seconds = {}
        for recipe, output in outputs.items():
            # vLLM cannot load M3 in the `fp8` format: its blocks go into compressed-tensors
            blocks = ("--format", "compressed-tensors") if recipe == "fp8-block" and name == "tiny-m3" else ()
            made = command("convert", FIXTURES / name, output, "--to", recipe, "--device", "cuda", *blocks)
            seconds[recipe] = made["seconds"]
            verified = command("verify", output, "--source", FIXTURES / name)
            assert verified["holds"], verified
        for recipe, output in outputs.items():
            suite = (
                "--suite",
                ROOT / "tests" / "benchmarks" / "heldout-suite.yaml",
                "--data",
                FIXTURES / "heldout.txt",
            )
            measured = command("eval", output, "--source", FIXTURES / name, *suite, "--device", "cuda")
            perplexity, divergence, noise = measured["results"][:3]
            row = {"model": name, "recipe": recipe, "tokens": perplexity["tokens"], "seconds": seconds[recipe]}
            row |= {"perplexity": perplexity["metrics"]["perplexity"], "kl_mean": divergence["metrics"]["kl_mean"]}
            base = {"perplexity": perplexity["source_metrics"]["perplexity"], "kl_mean": noise["metrics"]["kl_mean"]}
            rows += [{"model": name, "recipe": "source", **base}] * (recipe == RECIPES[0]) + [row]
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("gpu-work"))
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    import transformers

    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__,
        "fixtures": fixtures(work),
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu_check.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
