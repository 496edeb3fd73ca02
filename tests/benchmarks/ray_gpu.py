"""One GPU against all GPUs of this machine through Ray: `python -m tests.benchmarks.ray_gpu OUT [--work DIR] [--layers 3]`.

M2 layers of the real shapes and random weights: seconds of `fp8` (data-free, one task per shard) and of `awq` (128 x 512 tokens,
ranks in step), in one process on one GPU and with --ray, and whether every shard's sha256 is the same. --work /dev/shm/...
keeps the disk from hiding the GPUs. Whole seconds count start-up and compiling; `finished` is when each shard was whole, so
the differences between layers are the steady state, and `search` what each layer's search took. Writes OUT/ray_gpu.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from m3quant.checkpoint import Checkpoint, sha256_file
from m3quant.convert.job import Settings
from m3quant.convert.start import convert
from m3quant.planning.plan import make_plan
from m3quant.recipe.recipe import build_recipe, named_recipe

from .line_recorder import LineRecorder, random_windows
from .wide import wide_checkpoint, wide_config


def run(source: Path, output: Path, recipe: str, engine: str) -> dict[str, Any]:
    """Convert once; seconds, when each shard was whole, what each search took, and the shards' hashes."""
    shutil.rmtree(output, ignore_errors=True)
    plan = make_plan(Checkpoint.open(source), build_recipe(named_recipe(recipe)))
    settings = Settings(device="cuda", engine=engine)
    if recipe == "awq":
        settings.windows = random_windows(plan)
    began, started = time.time(), time.perf_counter()
    recorder = LineRecorder(started)
    convert(plan, output, settings, recorder)
    seconds = time.perf_counter() - started
    shards = sorted(output.glob("*.safetensors"))
    report = output / "m3quant-report" / "calibration.json"
    layers = json.loads(report.read_text())["layers"] if report.exists() else []
    return {
        "seconds": seconds,
        "lines": recorder.lines,
        "finished": [round(shard.stat().st_mtime - began, 3) for shard in shards],
        "search": [layer["seconds"] for layer in layers],
        "sha256": {shard.name: sha256_file(shard) for shard in shards},
    }


def steady(measured: dict[str, Any]) -> float:
    """Mean seconds per layer from the first layer's shard to the last's. The first shard holds what is outside layers."""
    times = sorted(measured["finished"][1:])
    return float((times[-1] - times[0]) / (len(times) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("gpu-work"))
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=["awq", "fp8"])
    arguments = parser.parse_args()
    work: Path = arguments.work
    arguments.out.mkdir(parents=True, exist_ok=True)
    import ray

    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "torch": torch.__version__,
        "ray": ray.__version__, "layers": arguments.layers, "runs": [],
    }  # fmt: skip
    source = work / "wide"
    work.mkdir(parents=True, exist_ok=True)
    result["work"] = (
        f"{shutil.disk_usage(work).total / 1e9:.0f} GB {'in memory' if str(work).startswith('/dev/shm') else 'on a disk'}"
    )
    wide_checkpoint(source, wide_config("m2", arguments.layers), "cuda")
    torch.cuda.empty_cache()
    for recipe in arguments.recipes:
        for engine in ("local", "ray"):
            measured = run(source, work / f"{recipe}-{engine}", recipe, engine)
            result["runs"].append({"recipe": recipe, "engine": engine, **measured})
            print(
                recipe,
                engine,
                f"{measured['seconds']:.2f} s, shards at {measured['finished']}",
                *measured["lines"],
                sep="\n  ",
                flush=True,
            )
            (arguments.out / "ray_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        local, spread = result["runs"][-2:]
        same = local["sha256"] == spread["sha256"]
        print(
            f"{recipe} on {result['gpus']} GPUs: {local['seconds'] / spread['seconds']:.2f}x as a whole; a layer in a row "
            f"{steady(local):.2f} and {steady(spread):.2f} s; search {local['search']} and {spread['search']} s; same bytes: {same}",
            flush=True,
        )
        if not same:
            raise SystemExit(f"{recipe}: shards differ between one process and Ray")


if __name__ == "__main__":
    main()
