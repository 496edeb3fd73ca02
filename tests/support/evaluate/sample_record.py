"""A record with every kind of result, its figures drawn from a seed, for tests of the page. `python sample_record.py FOLDER`."""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from pathlib import Path

from m3quant.artifact.eval_record import Computed, Data, EvalRecord, Measured, Result
from m3quant.evaluate.intervals import wilson
from m3quant.reports.comparison_html import Compared

TEXT = Data(name="bundled evaluation text", sha256="5d" * 32, licence="public domain")
COMPUTED = Computed(dtype="bfloat16", activations="engine", rounding="E4M3 per token")
LENGTHS, DEPTHS = (2048, 4096, 16384, 65536, 131072), (0.0, 0.25, 0.5, 0.75, 1.0)
EDGES = (1, 64, 256, 1024, 4096, 16384, 65536, 131072)


def cell(rng: random.Random, samples: int, share: float, **where: float) -> dict[str, object]:
    hits = sum(rng.random() < share for _ in range(samples))
    low, high = wilson(hits, samples)
    found = {"samples": samples, "hits": hits, "accuracy": hits / samples, "low": low, "high": high}
    return {**where, "exercises_msa": where["length"] > 2049, **found, "hits_source": samples}


def buckets() -> list[tuple[int, int]]:
    return list(pairwise(EDGES))


def sample_record(seed: int = 3) -> EvalRecord:
    rng = random.Random(seed)
    kl = {"kl_mean": 0.02134, "kl_mean_error": 0.0003, "kl_median": 0.0051, "kl_p99": 0.25, "kl_max": 3.2}
    kl |= {"top1_agreement": 0.9631, "delta_p_rms": 0.031, "nll_pearson": 0.9981}
    noise = {name: value / 900 for name, value in kl.items()} | {"top1_agreement": 0.9996, "nll_pearson": 0.999999}
    common = {"data": TEXT, "tokens": 245_640}
    needle_cells = [
        cell(rng, 10, 1.0 if n < 65536 else 0.75 - 0.5 * abs(d - 0.5), length=n, depth=d)
        for n in LENGTHS
        for d in DEPTHS
    ]
    ruler = [
        Result(
            task=f"ruler_{name}",
            convention="greedy exact match, teacher-forced",
            label=f"RULER {name}",
            metrics={"accuracy": 0.9, "values_given_prefix": 0.95} if name == "niah_multivalue" else {"accuracy": 0.9},
            source_metrics={"accuracy": 1.0, "values_given_prefix": 1.0} if name == "niah_multivalue" else {"accuracy": 1.0},
            cells=[cell(rng, 20, 0.95, length=n) for n in LENGTHS[:4]],
            notes=["phrasing: ruler; seed: 0; 20 samples a length (RULER: 500)"],
            **common,
        )
        for name in ("niah_multikey_1", "niah_multivalue", "vt")
    ]  # fmt: skip
    results = [
        Result(task="perplexity-gptq", convention="gptq-windows-2048", label="perplexity, GPTQ/AWQ convention: 120 windows of 2048 tokens, no BOS", metrics={"perplexity": 11.374}, source_metrics={"perplexity": 11.181}, **common),
        Result(task="perplexity-lm-eval", convention="lm-eval-rolling-2048", label="perplexity per word and byte, lm-eval convention", metrics={"word_perplexity": 61.2, "byte_perplexity": 2.011, "bits_per_byte": 1.008}, source_metrics={"word_perplexity": 59.8, "byte_perplexity": 2.002, "bits_per_byte": 1.001}, **common),
        Result(task="divergence", convention="kl-full-vocabulary-windows-2048", label="divergence from the source, whole vocabulary, nats per token", metrics=kl, cells=[{"start": a, "stop": b, "kl_mean": 0.03 * rng.uniform(0.5, 1.2)} for a, b in buckets()], **common),
        Result(task="divergence", convention="noise-floor-windows-2048", label="noise floor: the source against itself, bfloat16 against float32 in other batches", metrics=noise, cells=[{"start": a, "stop": b, "kl_mean": 3e-5 * rng.uniform(0.5, 1.2)} for a, b in buckets()], **common),
        Result(task="position", convention="position buckets, one prefill per window, stride = window", label="perplexity by position, windows of 131,072 tokens", metrics={"perplexity": 9.9}, source_metrics={"perplexity": 9.7}, cells=[{"start": a, "stop": b, "tokens": b - a, "perplexity": 14 - i + rng.random(), "perplexity_source": 13.6 - i, "kl_mean": 0.02 / (1 + i)} for i, (a, b) in enumerate(buckets())], **common),
        Result(task="needle", convention="greedy exact match, teacher-forced", label="needle grid, length x depth", metrics={"accuracy": 0.87, "accuracy_low": 0.83, "accuracy_high": 0.9, "answer_nll": 0.02}, source_metrics={"accuracy": 1.0, "accuracy_low": 0.98, "accuracy_high": 1.0}, cells=needle_cells, notes=["phrasing: code; distracting facts: 0; seed: 0"], **common),
        *ruler,
        Result(task="custom", convention="own", label="a figure of another shape <script>", metrics={"figure": 0.5}, data=None),
        Result(task="perplexity-llama-cpp", convention="-", label="perplexity-llama-cpp", not_run="the server offers no prompt log-probs & this task needs probabilities"),
    ]  # fmt: skip
    starved = {"3": [4, 17, 90], "11": list(range(30, 60, 2))}
    sentence = "expert coverage: 18 of 7296 experts saw fewer than 64 tokens and were given the tokens with the highest router score for them; by layer: {...}"
    return EvalRecord(
        m3quant="0.0.1",
        finished="2025-01-02T03:04:05+00:00",
        seconds=412.7,
        device="a GPU",
        versions={"torch": "2.11.0", "transformers": "5.24.0"},
        checkpoint=Measured(name="MiniMax-M3-awq", fingerprint="ab" * 32, stored="awq"),
        source=Measured(name="MiniMaxAI/MiniMax-M3", fingerprint="cd" * 32, stored="bf16"),
        suite="full",
        results=results,
        layers=[{"layer": i, "relative_error": 0.002 * (i + 1) ** 0.7} for i in range(60)],
        coverage={"experts": 7296, "floor": 64, "least_tokens": 11, "starved": starved, "sentence": sentence},
        computed=COMPUTED,
        notes=[COMPUTED.sentence],
    )


def sample_comparison() -> list[Compared]:
    """Three checkpoints of one source: name, bytes, mean KL divergence. int4 is beaten by awq in both."""
    made = {
        "M3-fp8": (430_880_000_000, 0.0041),
        "M3-awq": (230_580_000_000, 0.02134),
        "M3-int4": (231_000_000_000, 0.0488),
    }
    compared = []
    for number, (name, (nbytes, kl)) in enumerate(made.items()):
        record = sample_record(number + 3)
        (divergence,) = [r for r in record.results if r.convention.startswith("kl-")]
        scale = kl / divergence.metrics["kl_mean"]
        for metric in [metric for metric in divergence.metrics if metric.startswith("kl_")]:
            divergence.metrics[metric] *= scale
        for cell in divergence.cells:
            cell["kl_mean"] *= scale
        record.layers = [{**layer, "relative_error": layer["relative_error"] * scale} for layer in record.layers]
        record.checkpoint = record.checkpoint.model_copy(update={"name": name, "stored": name.removeprefix("M3-")})
        compared.append(Compared(name, nbytes, record))
    return compared


if __name__ == "__main__":
    from m3quant.reports.comparison_html import write_comparison
    from m3quant.reports.evaluation_html import write_report

    print(write_report(sample_record(), Path(sys.argv[1])))
    print(write_comparison(sample_comparison(), Path(sys.argv[1])))
