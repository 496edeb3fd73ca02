"""Memory constants by the engine's release: the measured starts lie in their ranges, and the careful end is not far below them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from click.testing import CliRunner

from m3quant.cli import cli
from m3quant.engines import engine_named
from m3quant.engines.vllm.memory import CONSTANTS, memory_models, memory_of
from m3quant.errors import OptionError
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.checklog import check_log, log_reader
from m3quant.runtime.fit import Ask, Fit, assess
from m3quant.runtime.hardware import GIB, parse_node
from m3quant.runtime.memory import Setup
from m3quant.runtime.model import open_subject
from m3quant.runtime.weights import as_kept, converted_groups, rank_weights
from tests.benchmarks.bench_gpu import PRESETS
from tests.benchmarks.bench_gpu_table import figure_files
from tests.support.paths import DATA, TESTS

# GiB per GPU, by GPUs: what the careful end may leave unused of the cache, with up to 8,192 tokens a step
NEAR = {1: 2.5, 2: 3.1}
# Starts with a flag that the plan does not read: they hold more than the careful end promises.
NOT_PLANNED = ("graphs-16",)
M2, M3 = "minimax-m2.7", "minimax-m3"
FIGURES = {
    row["name"]: row
    for row in json.loads((TESTS / "benchmarks" / "figures" / "h200_engine_bits.json").read_text(encoding="utf-8"))["presets"]
}  # fmt: skip
BENCHES = [json.loads(path.read_text(encoding="utf-8")) for path in figure_files()]


def asked(start: dict) -> dict:
    return {name: start[name] for name in ("max_num_seqs", "max_num_batched_tokens", "kv_dtype")}


# recipe, release, engine, tokens of cache, settings. M2.7's awq of 118,528 tokens: 32 sequences, 28 November 2026 (docs/serving.md).
STARTS = [
    *(
        (name, M3 if "-m3-" in name else M2, row["vllm"], row["blocks"] * row["block_size"], {
            "utilization": row["utilization"], "block_size": row["block_size"], "max_num_batched_tokens": 4096, "max_num_seqs": 16})
        for name, row in FIGURES.items()
    ),
    ("awq", M2, "0.33.0", 118_528, {}),
    *(
        (document["recipe"], PRESETS[document["preset"]].source.name, document["machine"]["engine"], start["pool_tokens"], {
            "node": document["machine"]["node"], **asked(start)})
        for document in BENCHES for start in document["starts"] if start["name"] not in NOT_PLANNED
    ),
    ("awq", M2, "0.26.0", 117_376, {}),
]  # fmt: skip


def verdict(recipe: str, release: str, engine: str, settings: dict) -> Fit:
    node = settings.get("node", "1xH200")
    settings = {name: value for name, value in settings.items() if name != "node"}
    model = open_subject(str(DATA / release)).converted(build_recipe(named_recipe(recipe)))
    return assess(model, parse_node(node), Ask(**{"kv_dtype": "fp8", "release": engine, **settings}))


@pytest.mark.parametrize(("recipe", "release", "engine", "tokens", "settings"), STARTS, ids=lambda v: str(v)[:24])
def test_a_measured_start_lies_in_its_range(
    recipe: str, release: str, engine: str, tokens: int, settings: dict
) -> None:
    fit = verdict(recipe, release, engine, settings)
    low, high = (fit.prediction.pool(which).tokens for which in ("high", "low"))
    assert low <= tokens <= high
    if engine.startswith("0.33"):
        unused = (tokens - low) * fit.prediction.tightest.bytes_per_token
        assert unused / GIB < NEAR[fit.node.count] * max(1, fit.setup.max_num_batched_tokens / 8192)


@pytest.mark.parametrize("document", BENCHES, ids=lambda document: document["preset"])
def test_all_that_is_beside_weights_and_cache_lies_in_its_range(document: dict) -> None:
    for start in document["starts"]:
        settings = {"node": document["machine"]["node"], **asked(start)}
        rank = verdict(
            document["recipe"], PRESETS[document["preset"]].source.name, document["machine"]["engine"], settings
        ).prediction.tightest
        rest = start["memory"]["requested"] - rank.weight_bytes - start["memory"]["kv_available"]
        assert rank.overhead.low < rest < rank.overhead.high
        assert rank.non_torch.low < start["memory"]["consumed"] - start["memory"]["weights"] < rank.non_torch.high
        # As --check-log reads it: vLLM 0.32 and later counts the graphs into the peak.
        assert rank.activation.low < start["memory"]["activation"] - start["memory"]["graphs"] < rank.activation.high
        if start["name"] not in NOT_PLANNED:
            assert rank.graphs.low < start["memory"]["graphs"] < rank.graphs.high


@pytest.mark.parametrize("document", BENCHES, ids=lambda document: document["preset"])
def test_the_log_of_a_measured_start_holds(document: dict) -> None:
    """The lines of vLLM 0.33 with what the start reported. 16,384 tokens a step and a BF16 cache are read from its arguments."""
    gpus = document["machine"]["node"][0]
    model = open_subject(str(DATA / PRESETS[document["preset"]].source.name)).converted(
        build_recipe(named_recipe(document["recipe"]))
    )
    for start in document["starts"]:
        gib = {name: f"{value / GIB:.2f} GiB" for name, value in start["memory"].items()}
        text = f"""Initializing a V1 LLM engine (v{document["machine"]["engine"]}) with config: model='x'
non-default args: {{'tensor_parallel_size': {gpus}, 'kv_cache_dtype': '{start["kv_dtype"]}', 'max_num_seqs': {start["max_num_seqs"]}, 'max_num_batched_tokens': {start["max_num_batched_tokens"]}, 'block_size': 128, 'language_model_only': True}}
Model loading took {gib["weights"]} memory
Estimated CUDA graph memory: {gib["graphs"]} total
Available KV cache memory: {gib["kv_available"]}
GPU KV cache size: {start["pool_tokens"]:,} tokens
Free memory on device (139.30/139.80 GiB) on startup. Desired GPU memory utilization is (0.92, {gib["requested"]}). Actual usage is {gib["consumed"]} for consumed memory (weights + non-torch), {gib["activation"]} for peak activation, and {gib["graphs"]} for CUDAGraph memory.
"""
        check = check_log(model, log_reader("vllm").read(text), parse_node(document["machine"]["node"]), Ask())
        assert check.fit.setup.max_num_batched_tokens == start["max_num_batched_tokens"]
        off = [line.name for line in check.lines if not line.holds]
        assert off == (["CUDA graphs, as reserved"] if start["name"] in NOT_PLANNED else []), start["name"]
        assert {"peak activation", "available for the KV cache"} <= {line.name for line in check.lines}


def test_weights_with_zero_points_of_few_bits_are_what_was_loaded() -> None:
    """Humming keeps two and three bits as four; 'Model loading took' is 0.1 to 0.3 GiB more than the tensors."""
    for name, row in FIGURES.items():
        if (measured := row.get("model_loading_gib")) is not None:
            rank = verdict(name, M3, row["vllm"], {"utilization": row["utilization"]}).prediction.tightest
            assert rank.weight_bytes / GIB == pytest.approx(measured, rel=0.003)


@pytest.mark.parametrize(("scheme", "kept"), [("int2-g64-asym", 4), ("int3-g64-asym", 4), ("int5-g64-asym", 8), ("int4-g64-asym", 4), ("int8-g64-asym", 8)])  # fmt: skip
def test_zero_points_take_what_the_kernels_keep(scheme: str, kept: int) -> None:
    subject, bits = open_subject(str(DATA / M3)), int(scheme[3])
    recipe = build_recipe({"rounding": "nearest", "schemes": {"routed_experts": scheme}})
    groups = converted_groups(subject.source_groups, recipe)
    split = Setup().split
    before, after = (
        rank_weights(g, split, 4, 60)[0]["routed_experts"] for g in (groups, as_kept(groups, memory_of(None)))
    )
    zero_points = 57 * 128 * 3 * 3072 * 6144 // 64
    assert after - before == zero_points * (kept - bits) // 8
    assert [g for g in as_kept(groups, memory_of(None)) if g.role != "routed_experts"] == [
        g for g in groups if g.role != "routed_experts"
    ]


def test_which_release_has_which_constants() -> None:
    old, new = memory_of("0.26.0"), memory_of("0.33.0")
    assert old.non_torch_one.high > new.non_torch_one.high and old.non_torch_many.low < new.non_torch_many.low
    assert old.non_torch_wide == new.non_torch_wide, "not measured since: as before"
    assert memory_of("0.31.4") == memory_of("0.20.0") == old
    for same in (None, "0.32.0+cpu", "0.32.0rc1", "0.40.1", "dev"):
        assert memory_of(same) == new, same
    assert engine_named("sglang").memory == memory_models()[0][1], "never measured: the widest"


def test_every_range_says_what_it_rests_on_and_rises() -> None:
    text = CONSTANTS.read_text(encoding="utf-8")
    assert text.count("evidence:") == sum(
        text.count(key) for key in ("gib: [", "factors: [", "per_size_mib: [", "per_token_kib: ")
    )
    for _, model in memory_models():
        for estimate in (model.non_torch_one, model.non_torch_many, model.non_torch_wide):
            assert 0 <= estimate.low <= estimate.expected <= estimate.high and math.isfinite(estimate.high)
        low, expected, high = model.activation_range
        assert 0 < low <= expected <= high


def plan(*options: str) -> tuple[int, dict[str, Any]]:
    """(exit code, JSON) of a plan of M3."""
    words = ["plan", str(DATA / M3 / "config.json"), "--kv-dtype", "fp8", "--json", *options]
    done = CliRunner().invoke(cli, words, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.return_value, json.loads(done.stdout)


@pytest.mark.parametrize(
    ("recipe", "options", "why"),
    [
        ("fit-m3-1xh200", (), "vLLM 0.26.0 does not read it, 0.29.0 is the first that does"),
        ("awq", ("--index-dtype=fp8",), "vLLM 0.26.0 keeps M3's index keys in BF16 on this device: leave --index-dtype out, or install 0.32.0"),
        ("awq", ("--weight-offload=1GiB", "--slow-offload"), "vLLM 0.26.0 was not read for --weight-offload"),
        ("awq", (), ""),
    ],
)  # fmt: skip
def test_a_plan_is_for_the_release_that_is_named(recipe: str, options: tuple[str, ...], why: str) -> None:
    words = ("--to", recipe, "--on", "2xH200", *options)
    code, found = plan(*words, "--engine-release", "0.26.0")
    assert (code, why in found["why_not"], bool(found["why_not"])) == ((3, True, True) if why else (0, True, False))
    assert found["setup"]["release"] == "0.26.0"
    few = {
        "fit-m3-1xh200": "the engine does not read it",
        "--index-dtype=fp8": "--index-dtype",
        "--weight-offload=1GiB": "weights or cache in host memory",
    }
    assert found["why_not_short"] == few.get(next(iter(options), recipe), "")
    assert found["ranks"][0]["non_torch"]["source"] == memory_of("0.26.0").non_torch_many.source
    newest, here = plan(*words)
    assert newest == 0 and here["setup"]["release"] is None


def test_what_a_release_gets_wrong_is_said_of_a_plan_too() -> None:
    _, found = plan("--to", "fp8", "--on", "4xH200", "--engine-release", "0.26.0")
    assert any("0.26 does not and answers with wrong numbers" in note for note in found["notes"])
    _, found = plan("--to", "awq", "--on", "2xH200", "--engine-release", "0.99")
    assert any("vLLM 0.99 is outside the releases this was written for" in note for note in found["notes"])
    assert plan("--to", "awq", "--on", "2xH200")[1]["notes"] == []
    with pytest.raises(OptionError, match="--engine-release 'newest' is no version: write for instance"):
        plan("--to", "awq", "--on", "2xH200", "--engine-release", "newest")
