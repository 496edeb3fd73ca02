"""vLLM's memory in addition to the weights: constants with their sources. A correction by `plan --check-log` is made here."""

from __future__ import annotations

from ..device import GIB, MIB
from ..memory import MemoryModel, gib

# Bytes of one cached element by --kv-cache-dtype (vLLM 0.33 config/cache.py). 'auto' is resolved first, from the checkpoint.
KV_BYTES = {"bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1}
INDEX_BYTES = {"bfloat16": 2, "fp8": 1}
# Spellings of command lines, logs and torch.
_KV_ALIASES = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float8_e4m3fn": "fp8_e4m3", "fp8_e4m3fn": "fp8_e4m3", "e4m3": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2", "e5m2": "fp8_e5m2",
}  # fmt: skip
_INDEX_ALIASES = {
    **_KV_ALIASES,
    "auto": "bfloat16",
    "none": "bfloat16",
    "fp8_e4m3": "fp8",
    "fp8_e4m3fn": "fp8",
    "float8_e4m3fn": "fp8",
}
# Caches that engines have and whose bytes are not modelled: their scales are next to the codes, or their layout is of other models.
UNMODELLED_CACHES = (
    "fp8_ds_mla", "nvfp4", "nvfp4_4over6", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head", "mxfp4", "turboquant_*",
)  # fmt: skip
DEFAULT_UTILIZATION = 0.92  # vLLM 0.26 to 0.33 config/cache.py
DEFAULT_BATCHED_TOKENS = 8192  # what vLLM's API server takes on H100 and H200 (engine/arg_utils.py)
DEFAULT_NUM_SEQS = 32  # m3quant's own: vLLM's 1024 reserve graphs and sampler memory that one node's KV cannot use
BLOCK_SIZE = 128  # M3's kernels accept no other; M2 takes it too

# CUDA and NCCL buffers that appear after vLLM's first look at free memory, and what the allocator keeps beyond the tensors.
NON_TORCH_ONE = gib(
    0.05,
    0.5,
    1.8,
    "0.26 GiB for M2 INT4 on an H200, vLLM 0.26 (serve_gpu.py); NCCL and attention buffers 0.5-1 (comment in vLLM's mem_utils.py)",
)
NON_TORCH_MANY = gib(
    0.1,
    1.2,
    2.6,
    "0.11-0.15 GiB for M2 and M3 INT4 at TP2 on H100s and H200s, vLLM 0.26 (serve_gpu.py); 1.8-2.1 for Qwen3-235B at TP8 on 80 GB cards (vllm#18446)",
)
NON_TORCH_WIDE = gib(
    0.1,
    1.8,
    6.0,
    "TP8 x EP or DP: 1.8-2.1 GiB for Qwen3-235B at TP8 (vllm#18446), and all-reduce and all-to-all buffers of more than four ranks; "
    "M3 NVFP4 on 8x B200 left at most 26 GiB for all overheads together (tests/data/serving-logs)",
)
# CUDA graphs by captured batch sizes: 0.19, 0.28, 0.71 and 1.42 GiB in public logs, 1.97 for 256 sizes (M3 on two B200);
# the estimate that vLLM subtracts errs both ways.
GRAPHS_BASE, GRAPHS_PER_SIZE, GRAPHS_PER_SIZE_MOST = int(0.25 * GIB), int(2.3 * MIB), 9 * MIB
LARGE_GPU = (
    160 * GIB
)  # from here vLLM captures up to 1024 sequences and takes 16,384 tokens per step (engine/arg_utils.py)
# Sum of the tensors below against logs of 1.66, 1.78 and 2.53 GiB peak activation on 80-95 GiB cards.
ACTIVATION_RANGE = (0.6, 1.0, 1.8)
HIDDEN_COPIES = 4  # residual, normed input, attention output and MoE output of one layer
SAMPLER_COPIES = 4  # float32 logits, their sorted copy, probabilities and a mask
VISION_COPIES = 4  # residual, normed input, attention output and one more of a vision layer
VISION_RANGE = (0.4, 1.0, 2.5)
VISION_TOKENS = 8192  # a video's: the encoder's budget is at least one item (log of M3 on two B200)
CAPTURED, CAPTURED_LARGE = 512, 1024

MEMORY = MemoryModel(
    kv_bytes=KV_BYTES,
    index_bytes=INDEX_BYTES,
    kv_aliases=_KV_ALIASES,
    index_aliases=_INDEX_ALIASES,
    unmodelled_caches=UNMODELLED_CACHES,
    utilization=DEFAULT_UTILIZATION,
    batched_tokens=DEFAULT_BATCHED_TOKENS,
    num_seqs=DEFAULT_NUM_SEQS,
    block_size=BLOCK_SIZE,
    non_torch_one=NON_TORCH_ONE,
    non_torch_many=NON_TORCH_MANY,
    non_torch_wide=NON_TORCH_WIDE,
    graphs_base=GRAPHS_BASE,
    graphs_per_size=GRAPHS_PER_SIZE,
    graphs_per_size_most=GRAPHS_PER_SIZE_MOST,
    large_gpu=LARGE_GPU,
    captured=CAPTURED,
    captured_large=CAPTURED_LARGE,
    activation_range=ACTIVATION_RANGE,
    hidden_copies=HIDDEN_COPIES,
    sampler_copies=SAMPLER_COPIES,
    vision_copies=VISION_COPIES,
    vision_range=VISION_RANGE,
    vision_tokens=VISION_TOKENS,
)
