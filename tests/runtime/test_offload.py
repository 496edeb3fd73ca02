"""Host memory for weights and cache: what moves, what is refused, what it costs, and what an engine is given."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from m3quant.cli import cli
from m3quant.cli.offload_output import offload_json
from m3quant.engines import DEFAULT as VLLM
from m3quant.engines.vllm.offload import flags
from m3quant.errors import DoesNotFit, NodeError, OptionError, RecipeError
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime import this_machine
from m3quant.runtime.compose import compose_file
from m3quant.runtime.cost import decode_bound, decode_speed, load_prices
from m3quant.runtime.fit import Ask, Fit, assess, remedies
from m3quant.runtime.hardware import GIB, GPUS, parse_node
from m3quant.runtime.measured import MeasuredSet
from m3quant.runtime.memory import Setup
from m3quant.runtime.model import ServedModel, open_subject
from m3quant.runtime.offload import host_tokens, moved_experts
from m3quant.runtime.offload_price import compare, judged
from m3quant.runtime.serve import prepare
from m3quant.runtime.serve_recipe import ServeRecipe, load_serve_recipe
from m3quant.runtime.weights import Split
from tests.support.paths import DATA, FIXTURES

PRICES = load_prices()
M2, M3 = open_subject(str(DATA / "minimax-m2.7")), open_subject(str(DATA / "minimax-m3"))
LAYERS, EXPERTS, HIDDEN, INNER = range(3, 60), 128, 6144, 3072
W13, W2 = 2 * EXPERTS * HIDDEN * INNER // 2, EXPERTS * HIDDEN * INNER // 2  # int4 codes of a layer of M3
S13, S2 = 2 * W13 // 128 * 2, 2 * W2 // 128 * 2  # 16-bit scales of groups of 128


def m3(recipe: str = "awq") -> ServedModel:
    return M3.converted(build_recipe(named_recipe(recipe)))


def fit_on(node: str, model: ServedModel | None = None, **ask: Any) -> Fit:
    return assess(model or m3(), parse_node(node), Ask(kv_dtype="fp8", **ask))


@settings(max_examples=40, deadline=None)
@given(limit=st.integers(0, 250 * GIB), tp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2, 3]))
def test_parameters_move_in_the_engines_order_until_the_limit(limit: int, tp: int, pp: int) -> None:
    """As UVAOffloader does: each parameter as long as less than the limit has moved."""
    found = moved_experts(m3().groups, Split(tp, pp), 4, 60, limit)
    for stage, got in enumerate(found):
        expected = pinned = 0
        own = [layer for layer in LAYERS if layer * pp // 60 == stage]
        for size in [size // tp for _ in own for size in (W13, W2, S13, S2)]:
            if expected < limit:
                expected += size
                pinned += 2 ** math.ceil(math.log2(size))
        assert (got.weights, got.pinned) == (expected, pinned)


@pytest.mark.parametrize("recipe", ["awq", "fp8"])
def test_all_experts_move_and_nothing_else(recipe: str) -> None:
    model = m3(recipe)
    whole = assess(model, parse_node("1xH200"), Ask()).prediction.tightest
    rank = assess(model, parse_node("1xH200"), Ask(weight_offload=10**12)).prediction.tightest
    left = rank.weights.pop("routed_experts")
    shapes = 57 * 128 * 3 * 16 if recipe == "awq" else 0
    assert left == shapes and rank.moved.weights == whole.weights.pop("routed_experts") - shapes
    assert rank.weights == whole.weights


def test_the_pool_grows_by_what_has_moved() -> None:
    without, moved = fit_on("2xH200"), fit_on("2xH200", weight_offload=20 * GIB)
    for before, after in zip(without.prediction.ranks, moved.prediction.ranks, strict=True):
        assert 20 * GIB <= after.moved.weights < 20 * GIB + W13 // 2
        assert after.kv_bytes(0) - before.kv_bytes(0) == after.moved.weights
    assert moved.pool.tokens > without.pool.tokens
    cached = fit_on("2xH200", kv_offload=100 * GIB)
    assert cached.pool == without.pool and cached.prediction.ranks == without.prediction.ranks


def test_prefixes_on_the_host_are_whole_blocks_of_all_ranks() -> None:
    for tp, each in ((1, 76_032), (2, 45_312)):
        assert host_tokens(GIB, [each], 128, Split(tp)) == GIB // (128 * each * tp) * 128
    assert host_tokens(GIB, [100], 16, Split()) == GIB // 4096 * 16, "a block takes whole pages"


def test_what_an_engine_is_given() -> None:
    fit = fit_on("1xH200", weight_offload=100 * GIB, kv_offload=3 * GIB // 2, slow_offload=True)
    text = " ".join(fit.command())
    assert (
        "--kv-offloading-size 1.5 --offload-backend uva --cpu-offload-gb 100 --cpu-offload-params experts --moe-backend triton"
        in text
    )
    assert not {"--kv-offloading-size", "--offload-backend", "--moe-backend"} & set(fit_on("2xH200").command())
    for size in (1, 10**9, 118_400_000_001):
        assert abs(float(flags(0, size)[3]) * GIB - size) < 2


@pytest.mark.parametrize(
    ("recipe", "node", "ask", "message"),
    [
        ("fit-m3-1xh200", "1xH200", {"weight_offload": GIB}, "experts of 2, 3, 5 or 6 bits run on Humming alone"),
        ("awq", "2xH200", {"weight_offload": GIB, "release": "0.26.0"}, "vLLM 0.26.0 was not read for --weight-offload, 0.32.0 and newer were"),
        ("awq", "2xH200", {"kv_offload": GIB, "release": "0.24.0"}, "vLLM 0.24.0 was not read for --kv-offload"),
        ("awq", "8xGB10", {"kv_offload": GIB}, "the memory of GB10 is the host's"),
        ("awq", "cpu:4GiB", {"kv_offload": GIB}, "on the CPU weights and cache are in host memory already"),
        ("awq", "2xH200", {"kv_offload": 600 * GIB}, "600 GiB of host memory are needed, 2xH200 has about 466: give less to --kv-offload"),
        ("awq", "2xH200", {"kv_offload": 1}, "--kv-offload 1 bytes hold no block of 128 tokens"),
        ("awq", "2xH200", {"kv_offload": GIB, "engine": "sglang"}, "SGLang is not given host memory here"),
    ],
)  # fmt: skip
def test_what_is_refused(recipe: str, node: str, ask: dict[str, Any], message: str) -> None:
    fit = fit_on(node, m3(recipe), **ask)
    assert not fit.fits and message in fit.why_not and fit.short == "weights or cache in host memory"
    cached = fit_on("2xH200", kv_offload=GIB, release="0.26.0")
    assert cached.fits, cached.why_not


def test_zero_points_and_other_formats_are_refused() -> None:
    asym = M3.converted(build_recipe({"rounding": "nearest", "schemes": {"routed_experts": "int4-g128-asym"}}))
    assert "experts with zero points were not checked" in fit_on("4xH200", asym, weight_offload=GIB).why_not
    groups = [replace(g, leaf="qweight") if g.leaf == "weight_packed" else g for g in m3().groups]
    other = replace(m3(), groups=groups)
    assert "experts stored as qweight (I32)" in fit_on("4xH200", other, weight_offload=GIB).why_not
    dense = open_subject(str(DATA / "minimax-m3")).stored
    assert fit_on("8xH200", dense, weight_offload=GIB).fits, "BF16 experts move too"


def test_a_step_reads_the_experts_it_uses_across_the_link() -> None:
    """By hand: one request uses 4 of 128 experts, so 1/32 of what has moved crosses the link, and leaves the GPU's share of the step."""
    without, moved = fit_on("2xH200", context=8192), fit_on("2xH200", context=8192, weight_offload=20 * GIB)
    gpu = GPUS["h200"]
    used = moved.prediction.ranks[0].moved.weights / 32
    expected = 1 / decode_bound(without, 8192, 1) - used / gpu.bandwidth + used / gpu.link
    assert 1 / decode_bound(moved, 8192, 1) == pytest.approx(expected)
    unknown = assess(m3(), parse_node("2x140GiB"), Ask(kv_dtype="fp8", weight_offload=GIB))
    assert decode_bound(unknown, 8192, 1) == 0.0


def test_dearer_than_more_gpus_is_refused_unless_it_is_wanted() -> None:
    fit = fit_on("1xH200", weight_offload=100 * GIB)
    assert fit.fits and not fit_on("1xH200").fits
    found = compare(fit, PRICES)
    assert found is not None and found.node.name == "2xH200" and found.costs == (4.0, 8.0) and found.dear
    verdict = judged(fit, PRICES)
    assert not verdict.fits and verdict.dear and verdict.verdict == "costs too much"
    assert verdict.short == "a token costs less on 2xH200, without --weight-offload"
    assert "tokens/s at most" in verdict.why_not and "--slow-offload takes it all the same" in verdict.why_not
    assert judged(replace(fit, ask=replace(fit.ask, slow_offload=True)), PRICES).fits
    free_here = PRICES.model_copy(update={"per_gpu_hour": {"H100": 3.0}})
    assert compare(fit, free_here) == replace(found, costs=(1.0, 2.0)), "without a price, by the number of GPUs"


def test_cheaper_than_more_gpus_is_taken() -> None:
    """A link as fast as the GPU's own memory: one GPU gives more tokens for its price than two."""
    h200 = parse_node("1xH200")
    fast = replace(h200, gpu=replace(h200.gpu, link=h200.gpu.bandwidth))
    fit = assess(m3(), fast, Ask(kv_dtype="fp8", weight_offload=100 * GIB))
    found = compare(fit, PRICES)
    assert found is not None and not found.dear and judged(fit, PRICES) is fit
    assert found.slow_down == pytest.approx(1.0)


def test_no_speed_measured_with_weights_on_the_gpu_is_promised_for_weights_on_the_host() -> None:
    """The figures say nothing of the link, which adds up to four times what its bandwidth would."""
    model = M2.converted(build_recipe(named_recipe("awq")))
    asked = Ask(kv_dtype="fp8", slow_offload=True)
    assert decode_speed(assess(model, parse_node("1xH200"), asked), 8192, 1).near is not None
    moved = decode_speed(assess(model, parse_node("1xH200"), replace(asked, weight_offload=20 * GIB)), 8192, 1)
    assert moved.near is None and moved.low == 0.0 < moved.bound


@pytest.mark.parametrize(
    ("node", "others", "low", "high"),
    [("1xH200", (), 0.3 / 1.15, 0.3 * 1.15), ("1xH100", ("H200",), 0.3 / 1.15, 0.3 * 1.15 * 4.8 / 3.35)],
)
def test_the_comparison_says_which_gpu_its_share_is_from(
    node: str, others: tuple[str, ...], low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: 30 % of an H200's bound at this very point, with the spread of one figure; the middle of it, or of what it leaves an H100."""
    model = M2.converted(build_recipe(named_recipe("awq")))
    asked = Ask(kv_dtype="fp8", context=32_768)
    bound = decode_bound(assess(model, parse_node("1xH200"), asked), 32_768, 1)
    known = MeasuredSet(model_type="minimax_m2", recipe="awq", weights="int", stored_bytes=model.stored_bytes, gpu="H200", gpus=1, source="here",
                        figures=[(1, 32_768, 0.3 * bound, bound)])  # fmt: skip
    monkeypatch.setattr("m3quant.runtime.near.measured_sets", lambda: (known,))
    fit = assess(model, parse_node(node), replace(asked, weight_offload=60 * GIB))
    found, read = compare(fit, PRICES), offload_json(fit, PRICES)
    assert found is not None and found.near is not None and found.near.count == 1 and found.near.others == others
    assert found.node_speed == pytest.approx(
        decode_bound(assess(model, found.node, asked), 32_768, 1) * (low + high) / 2, rel=1e-3
    )
    assert ("(not measured, estimated from H200, of the same chip)" in found.sentence) == bool(others)
    assert judged(fit, PRICES).why_not.startswith(f"{found.sentence}: a token costs less without")
    assert read is not None and read["against_more_gpus"]["other_gpus"] == list(others)
    assert read["against_more_gpus"]["sources"] == list(found.near.sources)


def test_more_than_there_is_and_a_consent_to_nothing_are_said() -> None:
    words = [
        "plan",
        str(DATA / "minimax-m3" / "config.json"),
        "--to",
        "awq",
        "--on",
        "2xH200",
        "--kv-dtype",
        "fp8",
        "--slow-offload",
    ]
    alone = CliRunner().invoke(cli, words)
    assert isinstance(alone.exception, OptionError) and "say how many bytes with --weight-offload" in str(
        alone.exception
    )
    said = CliRunner().invoke(cli, [*words, "--weight-offload", "1000GiB"]).output
    assert "there are no more than that, 1000.0 GiB were asked for" in said
    assert "no more than that" not in CliRunner().invoke(cli, [*words, "--weight-offload", "10GiB"]).output


def test_an_unknown_link_is_said() -> None:
    fit = judged(assess(m3(), parse_node("2x140GiB"), Ask(kv_dtype="fp8", weight_offload=GIB)), PRICES)
    assert not fit.fits and "how fast 140GiB reads the host's memory is not known here: --slow-offload" in fit.why_not


def test_leaving_it_out_is_proposed_where_it_helps() -> None:
    fit = fit_on("2xH200", weight_offload=GIB, release="0.26.0")
    assert remedies(fit)[0].change == "no --kv-offload and no --weight-offload"


def test_plan_and_serve_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(DATA / "minimax-m3" / "config.json")
    words = [
        "plan",
        config,
        "--to",
        "awq",
        "--on",
        "1xH200",
        "--kv-dtype",
        "fp8",
        "--weight-offload",
        "100GiB",
        "--kv-offload",
        "50GiB",
    ]
    refused = CliRunner().invoke(cli, words, standalone_mode=False)
    assert refused.return_value == 3 and "COSTS TOO MUCH: with weights in host memory" in refused.output
    said = CliRunner().invoke(cli, [*words, "--slow-offload"])
    assert said.exit_code == 0, said.output
    assert "cache in host memory: 50.0 GiB keep prefixes of 706,048 tokens" in said.output
    assert (
        "weights in host memory: 100.8 GiB of routed experts per GPU" in said.output
        and "host memory: 229.2 GiB in all" in said.output
    )
    found = json.loads(CliRunner().invoke(cli, [*words, "--slow-offload", "--json"]).output)
    assert found["offload"]["kv_tokens"] == 706_048 and found["offload"]["against_more_gpus"]["node"] == "2xH200"
    assert (
        found["ranks"][0]["moved"]["weights"] == found["offload"]["weight_bytes"]
        and found["setup"]["weight_offload"] == 100 * GIB
    )
    plain = json.loads(CliRunner().invoke(cli, [*words[:8], "--json"]).output)
    assert plain["offload"] is None

    monkeypatch.setenv("M3QUANT_ENGINE_PYTHON", "")
    serve = ["serve", str(FIXTURES / "tiny-m3"), "--on", "1xH200", "--dry-run", "--kv-offload", "1GiB", "--no-guard"]
    answer = CliRunner().invoke(cli, serve)
    assert (
        answer.exit_code == 0
        and "--kv-offloading-size 1 " in answer.output
        and "cache in host memory: 1.0 GiB" in answer.output
    )


def test_a_recipe_and_a_compose_file_hold_it(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("kv_offload: 2GiB\nweight_offload: 60GB\nslow_offload: true\n", encoding="utf-8")
    recipe = load_serve_recipe(path, {})
    assert (recipe.ask().kv_offload, recipe.ask().weight_offload, recipe.ask().slow_offload) == (
        2 * GIB,
        60 * 10**9,
        True,
    )
    path.write_text("kv_offload: much\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"'kv_offload'.*is no size"):
        load_serve_recipe(path, {})
    with pytest.raises(NodeError, match="must not be negative"):
        assess(m3(), parse_node("2xH200"), Ask(kv_offload=-1))
    said: list[str] = []
    served = prepare(
        str(FIXTURES / "tiny-m3"), ServeRecipe(node="1xH200", kv_offload=GIB), None, None, None, True, True, said.append
    )
    text = compose_file(
        served.launch.arguments,
        served.launch.env,
        served.launch.secret,
        served.fit,
        served.recipe,
        "vllm/vllm-openai:v0.33.0",
        None,
    )
    assert "--kv-offloading-size" in text and "ipc: host" in text, "its buffer is in /dev/shm, which is the host's then"


def test_this_machines_memory_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = fit_on("2xH200", kv_offload=10 * GIB, weight_offload=10 * GIB)
    pinned = sum(rank.moved.pinned for rank in fit.prediction.ranks) * 2
    monkeypatch.setattr(this_machine, "free_bytes", lambda folder: 20 * GIB)
    monkeypatch.setattr(this_machine, "free_memory", lambda: 10 * GIB + pinned)
    this_machine.check_host(fit)
    monkeypatch.setattr(this_machine, "free_memory", lambda: 10 * GIB + pinned - 1)
    with pytest.raises(DoesNotFit, match=r"of host memory are needed, .* GiB are available"):
        this_machine.check_host(fit)
    monkeypatch.setattr(this_machine, "free_memory", lambda: 500 * GIB)
    monkeypatch.setattr(this_machine, "free_bytes", lambda folder: 64 * 2**20)
    with pytest.raises(DoesNotFit, match=r"a buffer of 10\.0 GiB in /dev/shm, where 0\.1 GiB are free"):
        this_machine.check_host(fit)
    this_machine.check_host(replace(fit, setup=replace(fit.setup, kv_offload=0)))


def test_gpus_that_state_a_link_state_its_source() -> None:
    assert {gpu.name for gpu in GPUS.values() if not gpu.link} == {"GB10"}
    for gpu in GPUS.values():
        assert gpu.link < gpu.bandwidth and (not gpu.host_bytes or gpu.host_bytes > gpu.total_bytes)
    assert Setup().weight_offload == 0 and VLLM.offload_refusal.__doc__ is None
