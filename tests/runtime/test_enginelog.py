"""Public start-up figures against the formulae, and the wordings of several vLLM releases."""

from pathlib import Path

import pytest
import yaml

from m3quant.cli import fitting
from m3quant.engines import DEFAULT
from m3quant.engines.start_log import EngineLog, is_empty
from m3quant.engines.vllm.log import VllmLog, parse_log
from m3quant.errors import NodeError
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.checklog import check_log
from m3quant.runtime.fit import Ask
from m3quant.runtime.hardware import GIB, GPUS, parse_node
from m3quant.runtime.model import ServedModel, open_subject
from tests.support.paths import DATA

LOGS = yaml.safe_load((DATA / "serving-logs" / "logs.yaml").read_text(encoding="utf-8"))


def model_of(entry: dict) -> ServedModel:
    subject = open_subject(str(DATA / entry["model"]))
    return subject.converted(build_recipe(named_recipe(entry["to"]))) if "to" in entry else subject.stored


@pytest.mark.parametrize("entry", LOGS, ids=[entry["name"] for entry in LOGS])
def test_public_figures_within_one_percent(entry: dict) -> None:
    log = parse_log(entry["text"])
    ask = Ask(tp=entry["tp"], pp=1, block_size=entry.get("block_size", 128), release=entry.get("release"))
    check = check_log(model_of(entry), log, None, ask)
    found = {line.name: line for line in check.lines}
    for line in check.lines:
        # One block may separate a rounded length from the formula's; 1 % covers the rest of what a post rounds.
        limit = entry.get("weights_within", 0.01) if line.name.startswith("weights") else 0.01
        if (
            entry.get("whole") and line.low < line.high
        ):  # a whole log states the overheads too, which are predicted as ranges
            assert line.holds, line
            continue
        assert abs(line.off) < limit, (line, line.off)
    expect = entry["expect"]
    if "needed_gib" in expect:
        assert any(name.startswith("KV cache for") for name in found)
        assert log.needed == pytest.approx(expect["needed_gib"] * GIB, abs=1)
    if "pool_tokens" in expect:
        assert "KV tokens by the engine's own memory" in found and log.pool_tokens == expect["pool_tokens"]
        assert log.concurrency == expect["concurrency"]
        assert log.max_model_len is not None
        assert log.pool_tokens / log.max_model_len == pytest.approx(expect["concurrency"], abs=0.01)
    if "estimated_max_len" in expect:
        assert "longest context by the engine's own memory" in found
    if "weights_gib" in expect:
        assert found["weights per GPU"].measured == pytest.approx(expect["weights_gib"], abs=1e-6)


def test_pipeline_stages_hold_more_than_more_ranks() -> None:
    """vllm#48603, M3-MXFP8 on 8xA100-80: TP8 at 0.96 about 313K tokens (with a draft), TP4 x PP2 at 0.90 about 558K; our fp8
    output is of the same size."""
    model = open_subject(str(DATA / "minimax-m3")).converted(build_recipe(named_recipe("fp8")))
    from m3quant.runtime.fit import assess

    node = parse_node("8xA100")
    by_rank = assess(model, node, Ask(tp=8, pp=1, utilization=0.90)).pool.tokens
    by_stage = assess(model, node, Ask(tp=4, pp=2, utilization=0.90)).pool.tokens
    assert by_stage > 1.6 * by_rank
    assert by_stage == pytest.approx(558_000, rel=0.25)


FOUR_PARTS = (
    "Free memory on device cuda:0 (139.08/139.81 GiB) on startup. Desired GPU memory utilization is (0.92, 128.62 GiB). "
    "Actual usage is 112.9 GiB for weight, 1.51 GiB for peak activation, 0.32 GiB for non-torch memory, and 0.44 GiB for CUDAGraph memory. "
    "Replace gpu_memory_utilization config with `--kv-cache-memory=14200000000` (13.22 GiB) to fit into requested memory, or "
    "`--kv-cache-memory=25000000000` (23.28 GiB) to fully utilize gpu memory. Current kv cache memory in use is 13.9 GiB."
)
THREE_PARTS = (
    FOUR_PARTS.replace("112.9 GiB for weight", "113.4 GiB for consumed memory (weights + non-torch)")
    .replace("1.51 GiB for peak activation, 0.32 GiB for non-torch memory,", "1.95 GiB for peak activation,")
    .replace(" cuda:0", "")
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("INFO 04-01 [gpu_model_runner.py:4566] Model loading took 13.2 GiB memory and 82.6 seconds", {"weights": int(13.2 * GIB)}),
        ("INFO [gpu_model_runner.py:2582] Model loading took 2.2845 GiB and 74.2 seconds", {"weights": int(2.2845 * GIB)}),
        ("Loading model weights took 13.9476 GB", {"weights": int(13.9476 * GIB)}),
        ("GPU KV cache size: 215,401 tokens", {"pool_tokens": 215401}),
        ("CPU KV cache size: 4,096 tokens, Maximum concurrency for 512 tokens per request: 8.00x",
         {"pool_tokens": 4096, "max_model_len": 512, "concurrency": 8.0}),
        (FOUR_PARTS, {"total": int(139.81 * GIB), "utilization": 0.92, "weights": int(112.9 * GIB), "non_torch": int(0.32 * GIB),
                      "graphs": int(0.44 * GIB), "activation": int(1.51 * GIB), "suggested_pin": 14200000000}),
        (THREE_PARTS, {"consumed": int(113.4 * GIB), "activation": int(1.95 * GIB), "weights": None, "suggested_pin": 14200000000}),
        ("CUDA graph pool memory: 0.28 GiB (actual), 0.64 GiB (estimated), difference: 0.36 GiB (56.3%).",
         {"graphs": int(0.28 * GIB), "graphs_estimated": int(0.64 * GIB)}),
        ("Graph capturing finished in 12 secs, took 0.71 GiB", {"graphs": int(0.71 * GIB)}),
        ("To serve at least one request with the models's max seq len (221000), (10.12 GiB KV cache is needed, which is larger than the "
         "available KV cache memory (5.59 GiB). Based on the available memory, the estimated maximum model length is 122080. Try",
         {"needed_for": 221000, "needed": int(10.12 * GIB), "kv_available": int(5.59 * GIB), "estimated_max_len": 122080}),
        ("Auto-fit max_model_len: reduced from 204800 to 94208 to fit in available KV cache memory (11.15 GiB GPU)",
         {"fitted_len": 94208, "kv_available": int(11.15 * GIB)}),
        ("ValueError: No available memory for the cache blocks. Try increasing", {"no_memory": True}),
        ("Initializing a V1 LLM engine (v0.26.0) with config: model='x', max_seq_len=8192, tensor_parallel_size=2, pipeline_parallel_size=1, "
         "kv_cache_dtype=fp8, enforce_eager=False", {"version": "0.26.0", "tp": 2}),
    ],
)  # fmt: skip
def test_wordings(line: str, expected: dict) -> None:
    log = parse_log(f"(EngineCore pid=1) INFO 11-24 10:00:00 [x.py:1] {line}")
    for name, value in expected.items():
        assert getattr(log, name) == value, name


def test_ranks_are_merged_as_the_engine_does() -> None:
    text = "Model loading took 10.0 GiB\nModel loading took 12.0 GiB\nAvailable KV cache memory: 5.0 GiB\nAvailable KV cache memory: 4.0 GiB\n"
    log = parse_log(text)
    assert log.weights == 12 * GIB and log.kv_available == 4 * GIB


def test_a_wrong_kv_dtype_is_named() -> None:
    """The AWQ log above read with an FP8 cache: the line that is off says so, and by a factor of two."""
    entry = LOGS[0]
    check = check_log(model_of(entry), parse_log(entry["text"]), None, Ask(tp=2, pp=1, kv_dtype="fp8", block_size=16))
    off = [line for line in check.lines if not line.holds]
    assert off and all("bytes per token" in line.constant for line in off) and not check.holds
    assert off[0].off == pytest.approx(1.0, abs=0.01)


def test_measured_overheads_are_compared_each() -> None:
    model = model_of({"model": "minimax-m2.7", "to": "awq"})
    check = check_log(
        model,
        parse_log(FOUR_PARTS + "\nAvailable KV cache memory: 13.9 GiB"),
        parse_node("1xH200"),
        Ask(kv_dtype="fp8"),
    )
    names = [line.name for line in check.lines]
    assert names[:4] == ["weights per GPU", "non-torch", "peak activation", "CUDA graphs, as reserved"]
    assert check.holds, [line for line in check.lines if not line.holds]
    wrong = FOUR_PARTS.replace("1.51 GiB for peak activation", "9.51 GiB for peak activation")
    bad = [line for line in check_log(model, parse_log(wrong), parse_node("1xH200"), Ask()).lines if not line.holds]
    assert [line.name for line in bad] == ["peak activation"] and bad[0].constant.startswith("activation")


def test_a_log_of_something_else_is_refused() -> None:
    assert is_empty(parse_log("hello\nworld"))
    with pytest.raises(NodeError, match="none of vLLM's memory lines"):
        check_log(model_of({"model": "minimax-m2.7"}), EngineLog(), parse_node("1xH200"), Ask())


@pytest.mark.parametrize(
    "line",
    [
        "non-default args: {'tensor_parallel_size': None, 'pipeline_parallel_size': 'auto'}",
        "non-default args: {'gpu_memory_utilization': 'auto'}",
        "GPU KV cache size: , tokens",
        "Available KV cache memory: , GiB",
    ],
)
def test_values_that_are_no_numbers_are_passed_over(line: str) -> None:
    log = parse_log(f"{line}\n{FOUR_PARTS}")
    assert (log.tp, log.pp, log.pool_tokens, log.kv_available) == (1, 1, None, None)
    assert check_log(model_of({"model": "minimax-m2.7"}), log, None, Ask()).lines


def test_a_log_in_which_nothing_can_be_compared_is_no_agreement() -> None:
    with pytest.raises(NodeError, match="states no size that the prediction covers"):
        check_log(model_of({"model": "minimax-m2.7"}), parse_log("Available KV cache memory: 10.0 GiB"), None, Ask())


@pytest.mark.parametrize("line", [
    "GPU KV cache size: " + "9" * 400 + " tokens", "Model loading took " + "9" * 5000 + " GiB", "GPU KV cache size: " + "1," * 200_000 + " tokens",
    "LLM engine (v1) with config: tensor_parallel_size=\u00b2, kv_cache_memory_bytes=" + "9" * 5000 + ", data_parallel_size=" + "9" * 5000,
    "`--kv-cache-memory=" + "9" * 5000 + "` (3 GiB) to fit into requested memory", "non-default args: {'a': x" + " " * 300_000 + "y, 'b': 1}",
    "Free memory on device " + "x" * 300_000, "max seq len (" + "1" * 300_000, "Value error, " + "x" * 300_000, "Error" * 60_000, "a" * 300_000,
    "Free memory on device (1" * 15_000, "non-default args: " + "{" * 300_000,
])  # fmt: skip
def test_lines_that_are_made_to_be_slow_or_too_large(line: str) -> None:
    """Infinite numbers, digits that are none, and patterns that took time quadratic in a line."""
    log = parse_log(line)
    assert (log.tp, log.pp, log.dp, log.dcp) == (1, 1, 1, 1)
    assert log.pool_tokens is log.weights is log.suggested_pin is log.kv_pinned is None
    assert len(DEFAULT.reason(line)) < 700


def test_a_log_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 2000)
    monkeypatch.setattr(fitting, "LOG_BYTES", 1999)
    with pytest.raises(NodeError, match=r"log .* has more than 1,999 bytes: cut it"):
        fitting._log_mode(None, log, None, Ask(), False)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["H100", "H100PCIe", "A100", "A100PCIe", "A100SXM40GB"])
def test_vllm_has_other_defaults_for_every_board_whose_name_has_a100(name: str) -> None:
    assert VllmLog().server_defaults(GPUS[name.lower()]) == ((2048, 256) if "A100" in name else (8192, 1024))
