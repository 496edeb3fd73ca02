"""Everything about conversion that only a GPU can show, in one run: `python -m tests.benchmarks.gpu_check OUT [--work DIR]`.

1. The fixtures converted on the GPU with every recipe, verified, with held-out perplexity.
2. One layer at real width (M2: 256 experts of 3072 x 1536; M3: 128 of 6144 x 3072), random weights, 128 x 512 tokens: seconds,
   peak host and device memory of `fp8`, `int4` and `awq`, against the floor of reading and writing the same bytes on this disk.
Writes OUT/gpu_check.json with the versions used. Needs one GPU with 80 GB, 64 GB of disk and the repository importable.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m3quant.calibration.corpus import Windows
from m3quant.plan import Plan

from .wide import RELEASES, ROOT, SMALL_VOCABULARY, wide_checkpoint, wide_config

FIXTURES = ROOT / "tests" / "fixtures"
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


def random_windows(plan: Plan) -> Windows:
    """Windows of random token ids of the shape that the plan's recipe asks for: wide checkpoints have no tokenizer."""
    data = plan.recipe.data
    shape = (data.windows + data.heldout_windows, data.window_length)
    ids = np.random.default_rng(0).integers(0, SMALL_VOCABULARY, shape)
    counts = np.full((shape[0], 1), shape[1])
    return Windows(ids=ids, window_kind_tokens=counts, kinds=("text",), sha256="", corpus_sha256="", tokenizer_sha256="", seed=0, source="random")  # fmt: skip


def wide_run(source: Path, output: Path, recipe_name: str, lines: list[str] | None = None) -> dict[str, Any]:
    """Convert in this process (a child), and report seconds and peaks; what the conversion says goes into `lines`."""
    from m3quant.checkpoint import Checkpoint
    from m3quant.convert.run import convert
    from m3quant.convert.settings import Settings
    from m3quant.plan import make_plan
    from m3quant.recipe import build_recipe, named_recipe
    from m3quant.resources import resources

    plan = make_plan(Checkpoint.open(source), build_recipe(named_recipe(recipe_name)))
    windows = random_windows(plan)
    started = time.perf_counter()
    manifest = convert(plan, output, Settings(device="cuda", windows=windows), Quiet(started, lines))
    seconds = time.perf_counter() - started
    need = resources(plan, on_gpu=True)
    report = output / "m3quant-report" / "calibration.json"
    layers = json.loads(report.read_text())["layers"] if report.exists() else []
    return {
        "recipe": recipe_name,
        "seconds": seconds,
        "search_seconds": sum(layer["seconds"] for layer in layers),
        "bytes_in": sum(u.bytes_in for u in plan.units),
        "bytes_out": manifest["output_bytes"],
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device": torch.cuda.max_memory_allocated(),
        "predicted_host": need.host,
        "predicted_device": need.device,
        "chosen": [[block["chosen"] for block in layer["blocks"]] for layer in layers],
    }


class Quiet:
    """Keeps what a conversion says, with the seconds since it began, for who asks."""

    def __init__(self, started: float, lines: list[str] | None) -> None:
        self.started, self.lines = started, lines

    def start(self, total_bytes: int, done_bytes: int) -> None: ...
    def advance(self, count: int) -> None: ...

    def say(self, line: str) -> None:
        if self.lines is not None:
            self.lines.append(f"{time.perf_counter() - self.started:.2f} {line}")


def floor(folder: Path, size: int) -> dict[str, float]:
    """Bytes per second of writing (synced) and reading (from the page cache) `size` bytes here."""
    path, block = folder / "floor.bin", np.random.default_rng(0).integers(0, 256, 1 << 26, dtype=np.uint8).tobytes()
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    write = size / (time.perf_counter() - started)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(bytearray(1 << 26)):
            pass
    read = size / (time.perf_counter() - started)
    path.unlink()
    return {"write_bytes_per_second": write, "cached_read_bytes_per_second": read}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("gpu-work"))
    parser.add_argument("--child", nargs=3, metavar=("SRC", "DST", "RECIPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        source, output, recipe = arguments.child
        arguments.out.write_text(json.dumps(wide_run(Path(source), Path(output), recipe)))
        return
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    import transformers

    result["transformers"] = transformers.__version__
    result["fixtures"] = fixtures(work)
    write(arguments.out, result)
    result["disk"] = floor(work, 1 << 32)
    result["wide"] = []
    for shape, release in RELEASES.items():
        source = work / f"wide-{release}"
        wide_checkpoint(source, wide_config(shape, 1), "cuda")
        for recipe in ("fp8", "int4", "awq"):
            answer = work / "child.json"
            output = work / f"wide-out-{release}-{recipe}"
            child = [
                sys.executable,
                "-m",
                "tests.benchmarks.gpu_check",
                str(answer),
                "--child",
                str(source),
                str(output),
                recipe,
            ]
            done = subprocess.run(child, capture_output=True, text=True)
            row = (
                json.loads(answer.read_text())
                if done.returncode == 0
                else {"recipe": recipe, "failed": done.stderr[-2000:]}
            )
            result["wide"].append({"release": release, **row})
            print(result["wide"][-1], flush=True)
            subprocess.run(["rm", "-rf", str(output), str(answer)], check=True)
            write(arguments.out, result)
        subprocess.run(["rm", "-rf", str(source)], check=True)


def write(out: Path, result: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_check.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
