"""vLLM's own load generator, `vllm bench serve`: its command and its result file (benchmarks/serve.py of 0.32)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ServeError
from ..bench import PERCENTILES, BenchRun, Measured

# Takes a line of arguments after another and runs vLLM's command with each, so that torch and vLLM are imported once and not for every run:
# 12 s each on two cores. Asked for help first, which imports them. The exit code of each goes to the descriptor that it was given. vLLM's Rust
# generator, which takes the place of the process, would answer none.
PROGRAM = """
import contextlib, io, json, os, sys, traceback
answers = os.fdopen(int(sys.argv[1]), "w")
os.environ["VLLM_USE_RUST_BENCH"] = "0"
from vllm.entrypoints.cli.main import main

def run(arguments):
    sys.argv = ["vllm", *arguments]
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0

with contextlib.redirect_stdout(io.StringIO()):
    run(["bench", "serve", "--help"])
for line in sys.stdin:
    print(run(json.loads(line)), file=answers, flush=True)
"""


def bench_command(python: str) -> list[str]:
    """A process that makes one run after another; it is told a descriptor as its last argument."""
    return [python, "-u", "-c", PROGRAM]


def bench_arguments(run: BenchRun) -> list[str]:
    """Random prompts ignore the end token by themselves, so that every answer has its whole length."""
    words = ["bench", "serve", "--backend", "openai", "--base-url", run.url]
    words += ["--model", run.model, "--served-model-name", run.name, "--tokenizer", run.model]
    if run.texts is None:
        words += ["--dataset-name", "random"]
        words += ["--random-input-len", str(run.prompt), "--random-output-len", str(run.output)]
    else:
        words += ["--dataset-name", "sharegpt", "--dataset-path", str(run.texts), "--no-oversample", "--ignore-eos"]
        words += ["--sharegpt-output-len", str(run.output)]
    words += ["--num-prompts", str(run.requests), "--max-concurrency", str(run.concurrency), "--seed", str(run.seed)]
    words += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", ",".join(map(str, PERCENTILES))]
    words += ["--temperature", f"{run.temperature:g}", "--disable-tqdm", "--save-result"]
    return [*words, "--result-dir", str(run.result.parent), "--result-filename", run.result.name]


def bench_texts(texts: Sequence[str]) -> str:
    """A file for --dataset-name sharegpt, the one of its text formats that needs no further package."""
    return json.dumps([{"conversations": [{"value": text}, {"value": ""}]} for text in texts])


def read_bench(document: Mapping[str, Any], run: BenchRun) -> Measured:
    """Raises ServeError for requests that failed, answers that ended early and a file without the figures."""
    if (done := document.get("completed")) != run.requests:
        raise ServeError(
            f"{done} of {run.requests} requests were answered at concurrency {run.concurrency} and {run.prompt + run.output:,} tokens."
        )
    try:
        tokens, duration = int(document["total_output_tokens"]), float(document["duration"])
        if tokens != run.requests * run.output:
            raise ServeError(
                f"{run.requests} answers have {tokens:,} tokens in place of {run.requests * run.output:,}: no speed follows."
            )
        per_token = float(document["mean_tpot_ms"])
        accepted = document.get("spec_decode_acceptance_length")
        return Measured(
            duration_s=duration,
            completed=run.requests,
            output_tokens=tokens,
            output_tokens_per_s=float(document["output_throughput"]),
            decode_tokens_per_s=run.concurrency * 1000 / per_token,
            ttft_ms={p: float(document[f"p{p}_ttft_ms"]) for p in PERCENTILES},
            itl_ms={p: float(document[f"p{p}_itl_ms"]) for p in PERCENTILES},
            acceptance_length=None if accepted is None else float(accepted),
            acceptance_by_guess=tuple(map(float, document.get("spec_decode_per_position_acceptance_rates") or ())),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ServeError(
            f"the result of vllm bench serve lacks a figure or has a wrong one ({error}): use vLLM 0.32 or newer."
        ) from None
