"""Every kind of output of the three fixtures in a real vLLM on a GPU, beside m3quant's own log-probs of the same files.

    python -m tests.benchmarks.engine_outputs prepare WORK [NAME ...]     # converts, writes prompts and our log-probs; needs m3quant
    PYTHONPATH=SITE python engine_bits.py score WORK/NAME WORK/prompts.json WORK/scores/NAME.json [MOE_BACKEND]      # needs vLLM alone
    python -m tests.benchmarks.engine_outputs compare WORK [FIGURE.json]  # the table

Ours: float32, activations rounded as an engine rounds them for each scheme. An engine computes in BF16, which the rows of the
unquantized checkpoints show: an output is read right where its row is like theirs. Feedback gets 16 windows of calibration.jsonl.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .engine_bits import COUNT, LONG, SHORT, SPLIT

RECIPES = (
    "fp8", "fp8-block", "int4", "awq", "awq-fp8", "awq-g32", "awq-attn-bf16", "awq-all-int4", "awq-all-int4-autoawq", "source",
)  # fmt: skip
MODELS = ("tiny-m2", "tiny-m3", "tiny-m3.1")
WINDOWS = 16
AUTOAWQ = "-autoawq"


def source_of(model: str, work: Path) -> Path:
    """A fixture's folder; tiny-m3.1 is made of tiny-m3 and kept in `work`, its BF16 twin beside it."""
    from tests.support.convert.tiny_m31 import make
    from tests.support.paths import FIXTURES

    if model != "tiny-m3.1":
        return FIXTURES / model
    folder = work / "sources" / model
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        make(folder)
    return folder


def outputs(model: str) -> list[str]:
    names = [name for name in RECIPES if not (name.endswith(AUTOAWQ) and model != "tiny-m2")]
    if model == "tiny-m3":
        names.remove("fp8-block")
        names.insert(1, "fp8-block-ct")
    if model == "tiny-m3.1":
        names = [name for name in names if name not in ("fp8-block", "source")] + ["dense"]
    return [f"{model}_{name}" for name in names]


def command_of(source: Path, output: Path, recipe: str) -> list[str]:
    from tests.support.paths import FIXTURES

    command = [sys.executable, "-m", "m3quant", "convert", str(source), str(output), "--device", "auto"]
    if recipe.startswith("awq"):
        command += ["--windows", str(WINDOWS), "--calibration", str(FIXTURES / "calibration.jsonl")]
    if recipe.endswith("-ct"):
        return [*command, "--to", recipe.removesuffix("-ct"), "--format", "compressed-tensors"]
    if recipe.endswith(AUTOAWQ):
        return [*command, "--to", recipe.removesuffix(AUTOAWQ), "--format", "autoawq"]
    return [*command, "--to", recipe]


def prepare(work: Path, wanted: list[str]) -> None:
    from m3quant.calibration.corpus import load_tokenizer
    from tests.support.paths import FIXTURES

    work.mkdir(parents=True, exist_ok=True)
    ids = load_tokenizer(FIXTURES / "tiny-m2").encode((FIXTURES / "heldout.txt").read_text()[:60_000])
    short = [ids[LONG + i * SHORT : LONG + (i + 1) * SHORT] for i in range(COUNT)]
    (work / "prompts.json").write_text(json.dumps({"long": ids[:LONG], "short": short}))
    source_of("tiny-m3.1", work)

    def one(name: str) -> None:
        model, _, recipe = name.partition("_")
        folder, source = work / name, source_of(model, work)
        if recipe in ("source", "dense"):
            folder.symlink_to((source if recipe == "source" else source.with_name(f"{model}-dense")).resolve())
        else:
            done = subprocess.run(command_of(source, folder, recipe), capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: {done.stderr.strip().splitlines()[-1]}", flush=True)
                return
        ours(folder, ids[:LONG])

    names = wanted or [name for model in MODELS for name in outputs(model)]
    with ThreadPoolExecutor(min(6, os.cpu_count() or 1)) as pool:
        list(pool.map(one, names))


def ours(folder: Path, ids: list[int]) -> None:
    """FOLDER.ours.json: our log-probs, activations rounded as the engine does."""
    import torch

    from m3quant.calibration.stream import nll
    from m3quant.evaluate.models import open_model
    from m3quant.quant.reading import ConvertedReader
    from m3quant.running.device import pick_device

    model = open_model(folder)
    if isinstance(model.reader, ConvertedReader):
        model.reader.dtype = torch.float32
    found = -nll(
        model.reader, torch.tensor([ids]), pick_device("auto"), torch.float32, micro_batch=1, schemes=model.schemes
    )
    folder.with_name(f"{folder.name}.ours.json").write_text(json.dumps(found[0].tolist()))


def compare(work: Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted((work / "scores").glob("*.json")):
        engine = json.loads(path.read_text())
        own = json.loads((work / f"{path.stem}.ours.json").read_text())
        gaps = [theirs - mine for theirs, mine in zip(engine["long"]["logprobs"], own, strict=True)]
        sizes = [abs(gap) for gap in gaps]
        batch = [
            abs(a - b)
            for x, y in zip(engine["batch"], engine["single"], strict=True)
            for a, b in zip(x["logprobs"], y["logprobs"], strict=True)
        ]
        rows.append(
            {
                "output": path.stem, "vllm": engine["vllm"], "moe_backend": engine["moe_backend"], "mean": statistics.mean(sizes), "p99": sorted(sizes)[int(0.99 * len(sizes))],
                "after": statistics.mean(sizes[SPLIT:]), "loss": -statistics.mean(gaps),
                "loss_error": statistics.stdev(gaps) / len(gaps) ** 0.5, "batch": statistics.mean(batch),
            }
        )  # fmt: skip
    print(f"| output | experts by | mean | p99 | past {SPLIT} | loss less ours | 16 at once against one by one |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['output'].replace('_', ', ')} | {row['moe_backend']} | {row['mean']:.4f} | {row['p99']:.3f} | {row['after']:.4f} "
            f"| {row['loss']:+.4f} ± {row['loss_error']:.4f} | {row['batch']:.4f} |"
        )
    return rows


def main() -> None:
    what, work, *more = sys.argv[1:]
    if what == "prepare":
        prepare(Path(work), more)
    elif what == "compare":
        rows = compare(Path(work))
        if more:
            Path(more[0]).write_text(json.dumps(rows, indent=1) + "\n")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
