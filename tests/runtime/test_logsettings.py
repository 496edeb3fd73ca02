"""Settings that an engine's log states: taken over, or named as not covered; never blamed on a constant."""

import pytest

from m3quant.engines import DEFAULT
from m3quant.engines.vllm.log import parse_log
from m3quant.engines.vllm.log_settings import read_settings
from m3quant.errors import NodeError
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.checklog import LogCheck, check_log
from m3quant.runtime.fit import Ask, assess
from m3quant.runtime.hardware import Gpu, Node, parse_node
from m3quant.runtime.model import open_subject
from m3quant.runtime.weights import Split, rank_weights
from tests.support.paths import DATA

M2 = open_subject(str(DATA / "minimax-m2.7"))
M3 = open_subject(str(DATA / "minimax-m3"))
M3_AWQ = M3.converted(build_recipe(named_recipe("awq")))

DP8 = """INFO 07-01 [utils.py:233] non-default args: {'model': 'm', 'data_parallel_size': 8, 'enable_expert_parallel': True, 'gpu_memory_utilization': 0.9, 'kv_cache_dtype': 'fp8'}
(EngineCore_DP0 pid=1) INFO [gpu_model_runner.py:4000] Model loading took 31.9 GiB memory and 70.0 seconds
(EngineCore_DP0 pid=1) INFO [gpu_worker.py:400] Available KV cache memory: 35.2 GiB
(EngineCore_DP0 pid=1) INFO [kv_cache_utils.py:1307] GPU KV cache size: 297,600 tokens
"""
DCP2 = """non-default args: {'tensor_parallel_size': 8, 'decode_context_parallel_size': 2, 'block_size': 128, 'kv_cache_dtype': 'fp8', 'language_model_only': True}
Available KV cache memory: 40.0 GiB
GPU KV cache size: 2,867,584 tokens
"""
# Public: M3 NVFP4 on eight B200, a pool of 2,558,976 tokens at vLLM's defaults; and a 4-bit M3 on two.
B200_8 = """non-default args: {'model': 'm3-nvfp4', 'tensor_parallel_size': 8, 'block_size': 128, 'tool_call_parser': 'minimax_m3'}
GPU KV cache size: 2,558,976 tokens, Maximum concurrency for 1,048,576 tokens per request: 2.44x
"""
B200_2 = """INFO [api_utils.py:273] non-default args: {'dtype': 'bfloat16', 'max_model_len': 8192, 'tensor_parallel_size': 2, 'gpu_memory_utilization': 0.8, 'max_num_batched_tokens': 32768, 'max_num_seqs': 128, 'model': 'm3-4bit'}
INFO [config.py:77] Setting KV cache block size to 128 to match MiniMax-M3 sparse block size (was 16).
INFO [core.py:114] Initializing a V1 LLM engine (v0.23.1rc1) with config: model='m3-4bit', dtype=torch.bfloat16, tensor_parallel_size=2, data_parallel_size=1, quantization=compressed-tensors, kv_cache_dtype=auto, speculative_config=None
INFO [indexer.py:497] MiniMax M3 indexer: selected MSA (fmha_sm100 score + Triton top-k) [topk_blocks=16, indexer_kv_dtype=bf16]
INFO [gpu_model_runner.py:6288] Encoder cache will be initialized with a budget of 32768 tokens, and profiled with 4 video items of the maximum feature size.
INFO [gpu_model_runner.py:6605] Estimated CUDA graph memory: 1.97 GiB total
INFO [gpu_worker.py:515] Available KV cache memory: 16.81 GiB
INFO [kv_cache_utils.py:2146] GPU KV cache size: 237,312 tokens
"""


def lines(check: LogCheck) -> dict[str, bool]:
    return {line.name: line.holds for line in check.lines}


def test_replicas_share_the_experts_and_keep_a_cache_each() -> None:
    """DP 8 with expert parallelism: 32 of 256 experts per rank, everything else whole; every replica has all KV heads."""
    for node in (parse_node("8xH100"), None):
        check = check_log(M2.stored, parse_log(DP8), node, Ask())
        assert check.fit.setup.split == Split(1, 1, True, dp=8) and check.holds, check.lines
    whole = rank_weights(M2.stored.groups, Split(), 8, 62)[0]
    shared = rank_weights(M2.stored.groups, Split(expert_parallel=True, dp=8), 8, 62)[0]
    assert shared["routed_experts"] * 8 == whole["routed_experts"]
    assert {r: b for r, b in shared.items() if r != "routed_experts"} == {
        r: b for r, b in whole.items() if r != "routed_experts"
    }
    # without expert parallelism vLLM cuts every expert over all tp x dp ranks
    assert rank_weights(M3.stored.groups, Split(4, dp=2), 4, 60)[0]["routed_experts"] * 8 == sum(
        g.engine_bytes for g in M3.stored.groups if g.role == "routed_experts"
    )
    with pytest.raises(NodeError, match=r"TP 1 x PP 1 x DP 8 is 8 ranks, but 4xH100 has 4"):
        check_log(M2.stored, parse_log(DP8), parse_node("4xH100"), Ask())


def test_decode_context_parallel_ranks_keep_different_tokens() -> None:
    check = check_log(M3_AWQ, parse_log(DCP2), None, Ask())
    assert (
        check.fit.setup.split.dcp == 2
        and check.holds
        and check.lines[0].predicted == pytest.approx(2_867_584, rel=1e-3)
    )
    with pytest.raises(NodeError, match="does not divide TP 8"):
        check_log(
            M3_AWQ,
            parse_log(DCP2.replace("'decode_context_parallel_size': 2", "'decode_context_parallel_size': 3")),
            None,
            Ask(),
        )


def test_public_pools_of_m3_with_vision_lie_in_the_range() -> None:
    """Vision is on unless the log says otherwise; what the arguments lack is the engine's default on that card."""
    node = Node(8, Gpu("179.06GiB", int(179.06 * 2**30), 0.0, "test", "unknown"))
    check = check_log(M3_AWQ, parse_log(B200_8), node, Ask())
    setup = check.fit.setup
    assert setup.split.vision and (setup.max_num_seqs, setup.max_num_batched_tokens) == (1024, 16384)
    assert check.holds and check.lines[0].low <= 2_558_976 <= check.lines[0].high
    # what a plan of its own promises there is no more than 5 % above what the engine had
    promised = assess(M3_AWQ, node, Ask(tp=8, pp=1, vision=True, max_num_seqs=1024)).pool.tokens
    assert promised * 0.95 <= 2_558_976

    two = check_log(M3_AWQ, parse_log(B200_2), Node(2, node.gpu), Ask())
    assert two.holds and len(two.lines) == 4, two.lines
    assert two.fit.setup.split.vision and two.log.settings["indexer_kv_dtype"] == "bf16"
    text_alone = check_log(
        M3_AWQ,
        parse_log(B200_2.replace("'m3-4bit'}", "'m3-4bit', 'language_model_only': True}").replace("Encoder cache", "")),
        None,
        Ask(),
    )
    assert not text_alone.fit.setup.split.vision


@pytest.mark.parametrize(
    ("spelled", "name"),
    [("bf16", "bfloat16"), ("torch.bfloat16", "bfloat16"), ("fp8_inc", "fp8_inc"), ("fp8_e4m3fn", "fp8_e4m3"), ("half", "float16"), ("FP8", "fp8")],
)  # fmt: skip
def test_engine_spellings_of_the_cache_dtype(spelled: str, name: str) -> None:
    assert DEFAULT.memory.kv_name(spelled) == name and name in DEFAULT.memory.kv_bytes
    log = parse_log(
        f"non-default args: {{'tensor_parallel_size': 2, 'kv_cache_dtype': '{spelled}'}}\nAvailable KV cache memory: 10 GiB\nGPU KV cache size: 5 tokens\n"
    )
    assert check_log(M2.stored, log, None, Ask()).fit.setup.kv_dtype == name


def test_engine_spellings_of_the_index_dtype() -> None:
    assert [DEFAULT.memory.index_name(n) for n in ("bf16", "fp8_e4m3", "torch.bfloat16", "auto", "fp8")] == [
        "bfloat16",
        "fp8",
        "bfloat16",
        "bfloat16",
        "fp8",
    ]
    log = parse_log(
        "non-default args: {'tensor_parallel_size': 2, 'kv_cache_dtype': 'fp8_e4m3', 'attention_config': AttentionConfig(backend=None, "
        "indexer_kv_dtype='bf16')}\nAvailable KV cache memory: 19.51 GiB\nGPU KV cache size: 462,336 tokens\n"
    )
    check = check_log(M3_AWQ, log, None, Ask())
    assert check.holds and check.fit.setup.index_dtype == "bfloat16" and check.fit.setup.split.vision


@pytest.mark.parametrize("dtype", ["fp8_ds_mla", "nvfp4", "int8_per_token_head", "turboquant_k8v4", "something_new"])
def test_a_cache_whose_bytes_are_not_known_ends_no_comparison(dtype: str) -> None:
    text = DP8.replace("'kv_cache_dtype': 'fp8'", f"'kv_cache_dtype': '{dtype}'")
    check = check_log(M2.stored, parse_log(text), parse_node("8xH100"), Ask())
    assert list(lines(check)) == ["weights per GPU", "available for the KV cache"]
    assert check.uncompared == {f"kv_cache_dtype={dtype}": ("cache",)}
    index = check_log(M3_AWQ, parse_log(B200_2.replace("indexer_kv_dtype=bf16", "indexer_kv_dtype=mxfp4")), None, Ask())
    assert "indexer_kv_dtype=mxfp4" in index.uncompared and next(iter(lines(index))) == "CUDA graphs, as reserved"
    with pytest.raises(NodeError, match=f"nothing of this log can be compared: .*kv_cache_dtype={dtype}"):
        check_log(
            M2.stored,
            parse_log(
                f"non-default args: {{'kv_cache_dtype': '{dtype}'}}\nAvailable KV cache memory: 10 GiB\nGPU KV cache size: 5 tokens"
            ),
            None,
            Ask(),
        )


@pytest.mark.parametrize(
    ("setting", "left"),
    [("'prefill_context_parallel_size': 2", []), ("'speculative_config': {'method': 'eagle3', 'max_model_len': 77}", []),
     ("'cpu_offload_gb': 26.0", ["KV tokens by the engine's own memory"]), ("'num_redundant_experts': 32", ["KV tokens by the engine's own memory"]),
     ("'num_gpu_blocks_override': 13", ["weights per GPU", "available for the KV cache"]),
     ("'enable_dbo': True", ["weights per GPU", "KV tokens by the engine's own memory"])],
)  # fmt: skip
def test_settings_that_are_not_modelled_are_named(setting: str, left: list[str]) -> None:
    log = parse_log(DP8.replace("'kv_cache_dtype'", f"{setting}, 'kv_cache_dtype'"))
    if not left:
        with pytest.raises(NodeError, match=setting.partition(":")[0].strip("'")):
            check_log(M2.stored, log, parse_node("8xH100"), Ask())
        return
    check = check_log(M2.stored, log, parse_node("8xH100"), Ask())
    assert list(lines(check)) == left and len(check.uncompared) == 1


def test_unknown_arguments_are_named_without_their_values() -> None:
    found = read_settings(
        "non-default args: {'model': 'x', 'api_key': ['secret'], 'some_new_thing': 'value', 'port': 8000}"
    )
    assert (
        found.given
        and found.others == ["some_new_thing"]
        and "secret" not in str(found)
        and "value" not in str(found.values)
    )
    assert (
        read_settings(
            "args: Namespace(tensor_parallel_size=4, api_key=None, speculative_config={'tensor_parallel_size': 1})"
        ).values["tensor_parallel_size"]
        == "4"
    )


def test_text_alone_by_limits_and_by_flag() -> None:
    for argument in ("'limit_mm_per_prompt': {'image': 0, 'video': 0}", "'language_model_only': True"):
        assert not check_log(
            M3_AWQ, parse_log(DCP2.replace("'language_model_only': True", argument)), None, Ask()
        ).fit.setup.split.vision
    some = DCP2.replace("'language_model_only': True", "'limit_mm_per_prompt': {'image': 4, 'video': 0}")
    assert check_log(M3_AWQ, parse_log(some), None, Ask()).fit.setup.split.vision
    assert not check_log(M3_AWQ, parse_log(some), None, Ask(vision=False)).fit.setup.split.vision


def test_a_long_line_is_read_in_linear_time() -> None:
    text = "non-default args: {" + "'a': [(" * 200_000 + "\n" + "non-default args: {" + "x=1, " * 200_000
    assert read_settings(text).given
