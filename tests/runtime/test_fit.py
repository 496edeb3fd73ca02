"""The verdict: published tables from config.json alone, exact sizes, and what may never happen."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3quant.checkpoint import DTYPE_BYTES, Checkpoint
from m3quant.errors import CheckpointError, NodeError, PlanError
from m3quant.planning.headers import from_config
from m3quant.planning.plan import make_plan
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.fit import Ask, Fit, assess, remedies
from m3quant.runtime.hardware import GIB, GPUS, STANDARD_NODES, Gpu, Node, parse_node
from m3quant.runtime.memory import Estimate, Setup, kv_bytes_per_token, kv_dtype_of, pool_of, predict
from m3quant.runtime.model import ServedModel, Subject, open_subject
from m3quant.runtime.serving_table import serving_table
from m3quant.runtime.weights import Split, converted_groups, rank_weights, stage_of_layers, stored_bytes
from tests.support.paths import DATA, FIXTURES

M2, M3 = open_subject(str(DATA / "minimax-m2.7")), open_subject(str(DATA / "minimax-m3"))


def recipe(name: str):
    return build_recipe(named_recipe(name))


def by_label(subject: Subject) -> dict[str, ServedModel]:
    return {model.label: model for model in subject.precisions()[0]}


def test_the_reference_table_of_m2() -> None:
    """Published for M2: BF16 ~460 GB, FP8 ~230, INT4 ~115 (4 bits alone; groups of 128 add scales, attention stays FP8: 121)."""
    sizes = {label: model.stored_bytes / 1e9 for label, model in by_label(M2).items()}
    assert sizes["bf16"] == pytest.approx(460, rel=0.01)
    assert sizes["fp8-block"] == pytest.approx(230, rel=0.01)
    assert sizes["fp8"] == pytest.approx(230, rel=0.01)
    assert sizes["awq"] == pytest.approx(115, rel=0.06)
    fp8_cache = kv_bytes_per_token(M2.family, Setup(kv_dtype="fp8"))[0] * 1_000_000
    assert fp8_cache / 1e9 == pytest.approx(127, rel=0.01) and fp8_cache / GIB == pytest.approx(
        118, rel=0.01
    )  # "~120 GB"


@pytest.mark.parametrize(
    ("precision", "node", "tokens"),
    [("fp8-block", "2xH200", (256_000, 300_000)), ("fp8-block", "4xH200", (1_000_000, None)), ("fp8-block", "8xH100", (1_000_000, None)),
     ("fp8-block", "4xH100", (None, 1_000_000)), ("fp8-block", "1xH200", (None, 1)), ("awq", "1xH200", (32_768, 200_000)),
     ("awq", "2xH100", (131_072, 262_144)), ("bf16", "2xH200", (None, 1))],
)  # fmt: skip
def test_where_m2_fits_with_an_fp8_cache(precision: str, node: str, tokens: tuple[int | None, int | None]) -> None:
    pool = assess(by_label(M2)[precision], parse_node(node), Ask(kv_dtype="fp8")).pool.tokens
    least, most = tokens
    assert (least is None or pool >= least) and (most is None or pool <= most), pool


# facts: 60 x 2 x max(1, 4 / TP) x 128 x b + 57 x 128 x b_index; M2: 62 x 2 x max(1, 8 / TP) x 128 x b
TABLE = {
    ("m2", "bfloat16", "bfloat16"): (253952, 126976, 63488, 31744),
    ("m2", "fp8", "bfloat16"): (126976, 63488, 31744, 15872),
    ("m3", "bfloat16", "bfloat16"): (137472, 76032, 45312, 45312),
    ("m3", "fp8", "bfloat16"): (76032, 45312, 29952, 29952),
    ("m3", "fp8", "fp8"): (68736, 38016, 22656, 22656),
}


@pytest.mark.parametrize("key", TABLE, ids="-".join)
def test_bytes_per_token_and_rank(key: tuple[str, str, str]) -> None:
    subject = M2 if key[0] == "m2" else M3
    for tp, expected in zip((1, 2, 4, 8), TABLE[key], strict=True):
        assert kv_bytes_per_token(subject.family, Setup(Split(tp), key[1], key[2])) == [expected]


def test_stages_halve_the_cache_and_the_smallest_decides() -> None:
    halves = kv_bytes_per_token(M3.family, Setup(Split(4, 2)))
    assert sum(halves) == 45312 and halves[0] < halves[1]  # the first three layers keep no index keys
    assert [len(stage) for stage in stage_of_layers(62, 4)] == [15, 16, 16, 15]
    assert pool_of([100 * 128, 50 * 128], [1, 1], 128).tokens == 49 * 128


def test_engine_tokens_follow_the_engines_rounding() -> None:
    pool = pool_of([int(23.62 * GIB)], [63488], 16)
    assert pool.engine_tokens(196_608) == pytest.approx(399_424, abs=100)


@pytest.mark.parametrize(
    ("release", "name"), [("minimax-m2.7", "fp8"), ("minimax-m2.7", "awq"), ("minimax-m3", "awq-all-int4")]
)
def test_converted_sizes_are_those_of_the_conversion_plan(release: str, name: str) -> None:
    """The fit plan groups tensors; the conversion plan lists each. Both must say the same bytes."""
    source = from_config(DATA / release / "config.json")
    exact = make_plan(source, recipe(name)).tensor_bytes
    assert stored_bytes(converted_groups(open_subject(str(DATA / release)).source_groups, recipe(name))) == exact


def test_stored_checkpoints_are_counted_tensor_by_tensor() -> None:
    for fixture in ("tiny-m2", "tiny-m3"):
        checkpoint = Checkpoint.open(FIXTURES / fixture)
        model = open_subject(str(FIXTURES / fixture)).stored
        assert model.stored_bytes == sum(DTYPE_BYTES[t.dtype] * t.numel for t in checkpoint.tensors.values())
        (whole,) = rank_weights(
            model.groups,
            Split(1, vision=True),
            model.family.kv_geometry.kv_heads,
            model.family.num_layers,
        )
        routing = sum(
            t.numel
            for t in checkpoint.tensors.values()
            if "block_sparse_moe.gate" in t.name or "correction_bias" in t.name
        )
        vocab, hidden = model.family.vocab_size, model.family.hidden_size
        padding = 2 * (-vocab % 64) * hidden * 2
        rest = sum(t.numel for t in checkpoint.tensors.values()) - routing
        assert sum(whole.values()) == 2 * rest + 4 * routing + padding


def test_ranks_share_what_vllm_splits_and_repeat_the_rest() -> None:
    awq = by_label(M3)["awq"]
    one, four, eight = (rank_weights(awq.groups, Split(tp), 4, 60)[0] for tp in (1, 4, 8))
    assert four["routed_experts"] == pytest.approx(one["routed_experts"] / 4, rel=1e-3)
    assert four["router"] == one["router"] and eight["norm"] == one["norm"]
    # K, V and index queries have four heads: eight ranks hold what four do; the index key is whole on each.
    index_q, index_k = 4 * 128, 128
    assert four["indexer"] / one["indexer"] == pytest.approx((index_q / 4 + index_k) / (index_q + index_k), rel=0.01)
    assert eight["indexer"] == four["indexer"]
    first, last = rank_weights(awq.groups, Split(4, 2), 4, 60)
    assert "embedding" in first and "lm_head" in last and "embedding" not in last and "lm_head" not in first


def test_vision_counts_only_when_asked_for() -> None:
    off, on = (assess(M3.stored, parse_node("8xH200"), Ask(vision=vision)) for vision in (False, True))
    assert "vision" not in off.prediction.ranks[0].weights and on.prediction.ranks[0].weights["vision"] > 0
    assert on.prediction.ranks[0].overhead.high > off.prediction.ranks[0].overhead.high


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, "bfloat16"), ({"quantization_config": {"quant_method": "fp8"}}, "bfloat16"),
     ({"quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": None}}, "bfloat16"),
     ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}}}, "fp8"),
     ({"quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}}, "fp8"),
     ({"quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": "NVFP4"}}, "nvfp4"),
     ({"quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": None}}, "bfloat16"),
     ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "int"}}}, "int8"),
     ({"text_config": {"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}}, "fp8")],
)  # fmt: skip
def test_kv_dtype_comes_from_the_kv_scheme_alone(config: dict, expected: str) -> None:
    assert kv_dtype_of(config) == expected
    assert kv_dtype_of(config, "bfloat16") == "bfloat16"


def test_splits_that_engines_refuse_go_to_whole_experts_or_stages() -> None:
    """Block FP8 of M2 at TP8: 1536 / 8 is no multiple of 128 (vLLM's M2 recipe says TP4 or expert parallel)."""
    block = by_label(M2)["fp8-block"]
    assert assess(block, parse_node("8xH100"), Ask()).setup.split == Split(8, 1, True)
    assert assess(block, parse_node("4xH100"), Ask()).setup.split == Split(4, 1)
    assert assess(by_label(M3)["awq"], parse_node("8xH200"), Ask()).setup.split == Split(4, 2)
    fit = assess(by_label(M2)["bf16"], Node(5, GPUS["h200"]), Ask(tp=5))
    assert not fit.fits and "attention heads do not divide by TP 5" in fit.why_not
    with pytest.raises(NodeError, match="TP 2 x PP 1 is 2 ranks"):
        assess(block, parse_node("4xH100"), Ask(tp=2, pp=1))


def test_a_context_beyond_the_models_positions_does_not_fit() -> None:
    fit = assess(by_label(M2)["awq"], parse_node("8xH200"), Ask(context=1_048_576, kv_dtype="fp8"))
    assert fit.pool.tokens > 1_048_576 and not fit.fits and "204,800" in fit.why_not


@pytest.mark.parametrize(
    ("model", "gpus", "ask", "short"),
    [
        ("awq", 1, {"context": 65_536}, r"([\d.]+) GiB of KV cache missing per GPU"),
        ("awq", 2, {"context": 200_000, "concurrency": 3}, r"([\d.]+) GiB of KV cache missing per GPU"),
        ("bf16", 1, {}, r"([\d.]+) GiB too much per GPU before any cache"),
        ("awq", 8, {"context": 1_048_576}, "config.json allows 204,800 tokens"),
        ("awq", 5, {"tp": 5}, "the split over GPUs"),
        ("awq", 8, {"max_num_seqs": 9000}, "--max-num-seqs above --max-num-batched-tokens"),
        ("awq", 8, {"max_num_seqs": 2, "concurrency": 3}, "--max-num-seqs below --concurrency"),
        ("awq", 8, {"kv_offload": 1}, "weights or cache in host memory"),
        ("awq", 8, {}, ""),
    ],
)
def test_the_reason_in_few_words(model: str, gpus: int, ask: dict[str, Any], short: str) -> None:
    """What is said to be missing is what is missing: with so much more memory it fits, or something is left for a cache."""
    stored, h200 = by_label(M2)[model], parse_node("1xH200").gpu
    fit = assess(stored, Node(gpus, h200), Ask(**ask))
    found = re.fullmatch(short, fit.short)
    assert found and fit.fits == (not short), fit.short
    if not found.groups():
        return

    def with_more(gib: float) -> Fit:
        more = int((float(found[1]) + gib) * GIB / fit.setup.utilization)
        return assess(stored, Node(gpus, replace(h200, total_bytes=h200.total_bytes + more)), Ask(**ask))

    less, enough = with_more(-0.2), with_more(0.1)
    assert found[0].partition(" ")[2] in less.short and "cache" in less.short
    assert enough.fits or ("before any cache" in found[0] and "KV cache missing" in enough.short)


def test_remedies_are_true() -> None:
    fit = assess(by_label(M2)["awq"], parse_node("1xH200"), Ask(context=65_536))
    assert not fit.fits and "65,536 tokens" in fit.why_not
    found = remedies(fit, M2)
    assert found[0].change == "--kv-dtype fp8"
    assert all(r.fit.fits for r in found) and any(r.change.startswith("--on ") for r in found)
    none = assess(by_label(M3)["bf16"], parse_node("1xH200"), Ask())
    assert all(not r.change.startswith("--kv") for r in remedies(none, M3))


# --- properties ---

MODELS = [by_label(M2)["awq"], by_label(M2)["fp8-block"], by_label(M3)["awq"], by_label(M3)["bf16"]]


def fit_of(model: ServedModel, gpus: int, size: float, **ask) -> Fit:
    return assess(model, Node(gpus, Gpu("X", int(size * GIB), 1e12, "test")), Ask(**ask))


@settings(max_examples=60, deadline=None)
@given(
    model=st.sampled_from(MODELS), gpus=st.sampled_from((1, 2, 4, 8)), size=st.floats(20, 300), more=st.floats(0, 100),
    context=st.integers(1, 200_000), fewer=st.integers(0, 200_000), concurrency=st.integers(1, 40), less=st.integers(0, 40),
)  # fmt: skip
def test_more_memory_or_fewer_tokens_never_break_a_fit(
    model: ServedModel, gpus: int, size: float, more: float, context: int, fewer: int, concurrency: int, less: int
) -> None:
    base = fit_of(model, gpus, size, context=context, concurrency=concurrency)
    larger = fit_of(model, gpus, size + more, context=context, concurrency=concurrency)
    smaller = fit_of(model, gpus, size, context=max(1, context - fewer), concurrency=max(1, concurrency - less))
    assert larger.fits or not base.fits
    assert smaller.fits or not base.fits
    assert larger.longest_context >= base.longest_context
    if base.fits:
        assert base.pool.concurrency(context) >= concurrency and base.longest_context >= context


@settings(max_examples=60, deadline=None)
@given(
    subject=st.sampled_from((M2, M3)),
    tp=st.sampled_from((1, 2, 4)),
    size=st.floats(20, 300),
    context=st.integers(1, 200_000),
    data=st.data(),
)
def test_fewer_bits_never_break_a_fit(subject: Subject, tp: int, size: float, context: int, data) -> None:
    order = ["bf16", "fp8", "awq-g32", "awq-attn-bf16", "awq", "awq-all-int4"]
    models = by_label(subject)
    i = data.draw(st.integers(0, len(order) - 2))
    wide, narrow = models[order[i]], models[data.draw(st.sampled_from(order[i + 1 :]))]
    if narrow.stored_bytes < wide.stored_bytes:
        assert (
            fit_of(narrow, tp, size, context=context, tp=tp).fits
            or not fit_of(wide, tp, size, context=context, tp=tp).fits
        )
    for kv, index in (("fp8", "bfloat16"), ("fp8", "fp8")):
        cheaper = fit_of(wide, tp, size, context=context, tp=tp, kv_dtype=kv, index_dtype=index)
        assert cheaper.fits or not fit_of(wide, tp, size, context=context, tp=tp, kv_dtype="bfloat16").fits


@settings(max_examples=40, deadline=None)
@given(blocks=st.integers(0, 10_000), block=st.sampled_from((16, 64, 128)), context=st.integers(1, 300_000))
def test_a_pool_never_promises_the_null_block(blocks: int, block: int, context: int) -> None:
    pool = pool_of([blocks * block * 7], [7], block)
    n = pool.concurrency(context)
    needed = n * -(-context // block)
    assert needed <= max(0, blocks - 1) and pool.tokens == max(0, blocks - 1) * block
    assert n == 0 or (n + 1) * -(-context // block) > blocks - 1


# --- inputs and outputs ---


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("1xH200", "H200", 1),
        ("2xH100", "H100", 2),
        ("h200", "H200", 1),
        ("4 x h100-sxm", "H100", 4),
        ("8xH100-SXM5-80GB", "H100", 8),
        ("H200-SXM-141GB", "H200", 1),
        ("2xH100-NVL-94GB", "H100NVL", 2),
        ("h100_pcie_80gb", "H100PCIe", 1),
        ("A100", "A100", 1),
        ("8xA100-SXM4-80GB", "A100", 8),
        ("A100-80GB", "A100", 1),
        ("A100-40GB", "A100SXM40GB", 1),
        ("4xA100-SXM4-40GB", "A100SXM40GB", 4),
        ("A100-PCIe", "A100PCIe", 1),
        ("A100-80GB-PCIe", "A100PCIe", 1),
        ("A100-PCIE-40GB", "A100PCIe40GB", 1),
        ("RTX-PRO-6000-Blackwell-Server-Edition", "RTXPRO6000Server", 1),
        *((name, name, 1) for name in (gpu.name for gpu in GPUS.values())),
        ("2x95.5GiB", "95.5GiB", 2),
    ],
)
def test_node_names(text: str, name: str, count: int) -> None:
    node = parse_node(text)
    assert (node.gpu.name, node.count) == (name, count)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0xH100",
        "2x",
        "2xH900",
        "xH200",
        "2x0GiB",
        "1xH200 "[:3],
        "H100-94GB",
        "H200-80GB",
        "H100-40GB",
        "A100-141GB",
        "A100X",
        "GH200",
    ],
)
def test_bad_nodes_are_one_sentence(text: str) -> None:
    with pytest.raises(NodeError) as error:
        parse_node(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "ask",
    [
        Ask(kv_dtype="fp4"),
        Ask(index_dtype="int4"),
        Ask(utilization=0.0),
        Ask(utilization=1.2),
        Ask(concurrency=0),
        Ask(block_size=0),
    ],
)
def test_bad_requests_are_refused(ask: Ask) -> None:
    with pytest.raises(NodeError):
        assess(MODELS[0], parse_node("1xH200"), ask)


def test_quantized_checkpoints_need_their_shards(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**M2.config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match=r"quant_method 'awq'.*sizes are in its shards"):
        open_subject(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"neither config\.json"):
        open_subject(str(tmp_path / "elsewhere.json"))


def test_recipes_do_not_apply_twice() -> None:
    subject = Subject(
        "x", M2.family, M2.config, M2.stored, "this checkpoint is quantized already", False, M2.source_groups
    )
    with pytest.raises(PlanError, match="quantized already"):
        subject.converted(recipe("awq"))


def test_serving_table_of_a_checkpoint() -> None:
    rows = serving_table(FIXTURES / "tiny-m3")
    assert [row.node for row in rows] == [name for name in STANDARD_NODES for _ in range(2)]
    assert {row.kv_dtype for row in rows} == {"bfloat16", "fp8"}
    first = rows[0]
    assert first.fits and first.pool_tokens > 1_000_000 and first.longest_context == 8192 and first.why_not == ""
    assert (
        first.command.startswith("vllm serve ")
        and "--language-model-only" in first.command
        and "--kv-cache-dtype" not in first.command
    )
    assert "--kv-cache-dtype fp8" in rows[1].command
    assert not any(row.speeds for row in rows)  # no model of its size was measured


def test_overheads_carry_a_source_and_a_range() -> None:
    for rank in predict(parse_node("2xH100"), M2.family, MODELS[0].groups, Setup(Split(2))).ranks:
        for estimate in (rank.non_torch, rank.activation, rank.graphs):
            assert (
                isinstance(estimate, Estimate)
                and estimate.source
                and estimate.low <= estimate.expected <= estimate.high
            )


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "m3quant", "plan", *arguments], capture_output=True, text=True, timeout=60
    )


def test_command_line_verdicts_and_exit_codes(tmp_path: Path) -> None:
    done = cli(str(FIXTURES / "tiny-m3"), "--on", "1xH200", "--context", "4096", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["fits"] and found["context"] == 4096 and found["pool_tokens"]["low"] > 4096
    too_big = cli(str(DATA / "minimax-m3" / "config.json"), "--to", "awq", "--on", "1xH200")
    assert too_big.returncode == 3 and "DOES NOT FIT" in too_big.stdout and "--on 2xH200" in too_big.stdout
    prices = tmp_path / "prices.yaml"
    prices.write_text("date: 2031-01-02\nsource: a test\nper_gpu_hour: {H200: 10}\n")
    table = cli(str(DATA / "minimax-m2.7"), "--all", "--kv-dtype", "fp8", "--prices", str(prices))
    assert table.returncode == 0 and "80.00" in table.stdout and "prices of 2031-01-02: a test" in table.stdout
    assert (
        "does not fit: 301.2 GiB too much per GPU before any cache\n" in table.stdout
        and "--json has the whole reasons" in table.stdout
    )
    log = tmp_path / "log"
    log.write_text(
        "Available KV cache memory: 23.62 GiB\nGPU KV cache size: 399,424 tokens\nMaximum concurrency for 196,608 tokens per request: 2.03x\n"
    )
    good = cli(str(DATA / "minimax-m2.7"), "--to", "fp8", "--check-log", str(log), "--tp", "4", "--pp", "1")
    assert good.returncode == 0 and "holds" in good.stdout, good.stdout + good.stderr
    bad = cli(
        str(DATA / "minimax-m2.7"),
        "--to",
        "fp8",
        "--check-log",
        str(log),
        "--tp",
        "4",
        "--pp",
        "1",
        "--kv-dtype",
        "fp8",
    )
    assert bad.returncode == 1 and "OFF: bytes per token" in bad.stdout
    log.write_text("non-default args: {}\nGPU KV cache size: 5 tokens\n" * 2)
    two = cli(str(DATA / "minimax-m2.7"), "--check-log", str(log))
    assert two.returncode == 2 and "holds 2 starts" in two.stderr
    log.write_text("Model loading took 113.0 GiB memory\nAvailable KV cache memory: 13.89 GiB\n")
    other = cli(str(DATA / "minimax-m2.7"), "--check-log", str(log), "--on", "1xH200")
    assert other.returncode == 1 and "is fp8-block of" in other.stdout and "--to" in other.stdout
    m3 = json.loads(cli(str(DATA / "minimax-m3" / "config.json"), "--all", "--json").stdout)
    assert "--format compressed-tensors" in m3["refused"]["fp8-block"]
    assert all(bool(row["why_not_short"]) == (not row["fits"]) for row in m3["rows"])
    assert m3["rows"][0]["why_not_short"] == "669.4 GiB too much per GPU before any cache"
    for arguments, part in (
        (("--on", "2xH900"), "did you mean"), (("--context", "5"), "--on NODE"), (("--on", "1xH200", "--prices", "nowhere.yaml"), "nowhere.yaml cannot be read"),
        (("--check-log", "nowhere"), "cannot be read"),
    ):  # fmt: skip
        refused = cli(str(FIXTURES / "tiny-m2"), *arguments)
        assert refused.returncode == 2 and part in refused.stderr and "Traceback" not in refused.stderr, refused.stderr


def test_no_torch_no_vllm_no_transformers() -> None:
    """In one process: the whole of `plan --all`, with the import of each made impossible."""
    code = (
        "import sys\n"
        "for name in ('torch', 'vllm', 'transformers', 'tokenizers'): sys.modules[name] = None\n"
        "from m3quant.cli import cli\n"
        f"sys.exit(cli(['plan', {str(DATA / 'minimax-m2.7')!r}, '--all'], standalone_mode=False))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("changes", "fits"), [
    ({"max_num_seqs": 9000}, False), ({"concurrency": 9000, "context": 128}, False), ({"max_num_seqs": 64, "max_num_batched_tokens": 63}, False),
    ({"max_num_seqs": 64, "max_num_batched_tokens": 64}, True), ({"max_num_seqs": 9000, "engine": "sglang"}, True),
])  # fmt: skip
def test_more_requests_than_a_step_has_tokens_are_refused_as_the_engine_does(
    changes: dict[str, Any], fits: bool
) -> None:
    """vLLM says so only when it starts, on the machine that is paid for."""
    fit = assess(by_label(M2)["awq"], parse_node("8xH200"), Ask(kv_dtype="fp8", **changes))
    assert fit.fits == fits
    assert fits or (
        "vLLM refuses more requests at once" in fit.why_not and "give --max-num-batched-tokens" in fit.why_not
    )
