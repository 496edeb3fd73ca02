"""The memory of one rank: weights, KV and index cache, and everything else an engine takes, as vLLM counts it.

    requested = ceil(total_bytes * gpu_memory_utilization)        v1/worker/utils.py: request_memory
    kv_bytes  = requested - weights - non_torch - activation - graphs      v1/worker/gpu_worker.py: determine_available_memory
    blocks    = floor(kv_bytes / page_bytes), one of them the null block   v1/core/kv_cache_utils.py

Weights and cache sizes are exact. The rest are `Estimate`s: a range with its source, never a single number. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from ..errors import NodeError
from ..families import Family
from ..families.config import MAX_SIZE, ConfigPart
from .hardware import CPU, GIB, Gpu, Node
from .weights import Group, Split, rank_weights, stage_of_layers

MIB = 2**20

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
# Caches that engines have and whose bytes are not modelled: their scales lie beside the codes, or their layout is of other models.
UNMODELLED_CACHES = (
    "fp8_ds_mla", "nvfp4", "nvfp4_4over6", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head", "mxfp4", "turboquant_*",
)  # fmt: skip
DEFAULT_UTILIZATION = 0.92  # vLLM 0.26 to 0.33 config/cache.py
DEFAULT_BATCHED_TOKENS = 8192  # what vLLM's API server takes on H100 and H200 (engine/arg_utils.py)
DEFAULT_NUM_SEQS = 32  # ours: vLLM's 1024 reserve graphs and sampler memory that one node's KV cannot use
BLOCK_SIZE = 128  # M3's kernels accept no other; M2 takes it too


@dataclass(frozen=True)
class Estimate:
    """A quantity that no header tells: bytes expected, and the least and most seen or thought possible."""

    low: int
    expected: int
    high: int
    source: str

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            self.low + other.low,
            self.expected + other.expected,
            self.high + other.high,
            f"{self.source}; {other.source}",
        )

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def gib(low: float, expected: float, high: float, source: str) -> Estimate:
    return Estimate(int(low * GIB), int(expected * GIB), int(high * GIB), source)


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
)  # from here vLLM captures up to 1024 sequences and takes 16,384 tokens a step (engine/arg_utils.py)
# Sum of the tensors below against logs of 1.66, 1.78 and 2.53 GiB peak activation on 80-95 GiB cards.
ACTIVATION_RANGE = (0.6, 1.0, 1.8)
HIDDEN_COPIES = 4  # residual, normed input, attention output and MoE output of one layer
SAMPLER_COPIES = 4  # float32 logits, their sorted copy, probabilities and a mask
MAX_MERGE = 16  # more than any tower merges along an edge
VISION_COPIES = 4  # residual, normed input, attention output and one more of a vision layer
VISION_RANGE = (0.4, 1.0, 2.5)
VISION_TOKENS = 8192  # a video's: the encoder's budget is at least one item (log of M3 on two B200)


@dataclass(frozen=True)
class Setup:
    """How the engine is asked to run. kv_dtype and index_dtype are resolved names, never 'auto'."""

    split: Split = field(default_factory=Split)
    kv_dtype: str = "bfloat16"
    index_dtype: str = "bfloat16"
    utilization: float = DEFAULT_UTILIZATION
    max_num_seqs: int = DEFAULT_NUM_SEQS
    max_num_batched_tokens: int = DEFAULT_BATCHED_TOKENS
    block_size: int = BLOCK_SIZE
    enforce_eager: bool = False


def check_setup(setup: Setup) -> None:
    """Raise NodeError for a value that no engine takes."""
    if setup.kv_dtype not in KV_BYTES:
        raise NodeError(
            f"KV dtype '{setup.kv_dtype}' {_unknown(setup.kv_dtype)}: use --kv-dtype with {', '.join(KV_BYTES)}."
        )
    if setup.index_dtype not in INDEX_BYTES:
        raise NodeError(
            f"index dtype '{setup.index_dtype}' {_unknown(setup.index_dtype)}: use {' or '.join(INDEX_BYTES)}."
        )
    if not 0 < setup.utilization <= 1:
        raise NodeError(f"GPU memory utilization {setup.utilization:g} must lie in (0, 1].")
    for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
        if getattr(setup, name) < 1:
            raise NodeError(f"{name.replace('_', '-')} must be at least 1.")
    split = setup.split
    if min(split.tp, split.pp, split.dp, split.dcp) < 1:
        raise NodeError("TP, PP, DP and DCP must be at least 1.")
    if split.tp % split.dcp:
        raise NodeError(f"decode context parallel size {split.dcp} does not divide TP {split.tp}.")


def kv_name(text: str) -> str:
    """The name in KV_BYTES of a KV dtype as an engine, torch or a person spells it; itself where it has none."""
    name = text.strip().lower().removeprefix("torch.")
    return _KV_ALIASES.get(name, name)


def index_name(text: str) -> str:
    """The same for the index keys' dtype, in INDEX_BYTES."""
    name = text.strip().lower().removeprefix("torch.")
    return _INDEX_ALIASES.get(name, name)


def _unknown(name: str) -> str:
    known = any(fnmatch(name, pattern) for pattern in UNMODELLED_CACHES)
    return "is one whose bytes m3quant does not model" if known else "is not known"


def kv_dtype_of(config: Mapping[str, Any], asked: str = "auto", weights_dtype: str = "bfloat16") -> str:
    """The KV dtype the engine will use: `asked`, or what the checkpoint states for 'auto' (`kv_cache_scheme`, ModelOpt's
    `kv_cache_quant_algo`, under the name it has there), or the model's dtype. FP8 weights alone never mean an FP8 cache."""
    if asked != "auto":
        return asked
    quantization = (
        config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}
    )
    scheme = quantization.get("kv_cache_scheme")
    if isinstance(scheme, Mapping) and scheme.get("num_bits"):
        kind = scheme.get("type", "float")
        return "fp8" if (scheme["num_bits"], kind) == (8, "float") else f"{kind}{scheme['num_bits']}"
    algorithm = str(quantization.get("kv_cache_quant_algo") or "none").lower()
    return weights_dtype if algorithm == "none" else algorithm


def kv_bytes_per_token(family: Family, setup: Setup) -> list[int]:
    """Per pipeline stage: bytes of KV and index cache that one rank keeps for one token.

    kv = 2 x layers x max(1, kv_heads / tp) x head_dim x bytes; index = index layers x index_dim x bytes, on every rank.
    """
    geometry = family.kv_geometry
    heads = max(1, geometry.kv_heads // setup.split.tp)
    per_layer = 2 * heads * geometry.head_dim * KV_BYTES[setup.kv_dtype]
    per_index = geometry.index_dim * INDEX_BYTES[setup.index_dtype]
    return [
        sum(per_layer + (per_index if family.has_index_keys(layer) else 0) for layer in stage)
        for stage in stage_of_layers(geometry.layers, setup.split.pp)
    ]


def activation(family: Family, setup: Setup) -> Estimate:
    """Transient peak of one step of max_num_batched_tokens on one rank. With DP the experts see the gathered tokens of all replicas,
    at once or in pieces.

    The MoE caches are Marlin's (fused_moe/experts/marlin_moe.py): T x top_k x (max(2 x inner, hidden) + inner) elements. A
    dense MLP keeps gate, up and their product.
    """
    geometry = family.kv_geometry
    tokens, tp = setup.max_num_batched_tokens, setup.split.tp
    hidden, vocab = family.hidden_size, family.vocab_size
    gathered = (1, 1, 1)
    if family.moe:
        inner = family.moe.intermediate_size // (1 if setup.split.expert_parallel else setup.split.expert_ranks)
        mlp = tokens * family.moe.top_k * (max(2 * inner, hidden) + inner) * 2
        gathered = (1, setup.split.dp, setup.split.dp)
    else:
        mlp = tokens * 3 * (max(spec.dense_intermediate_size for spec in family.layers) // tp) * 2
    heads = family.num_heads // tp + 2 * max(1, geometry.kv_heads // tp)
    attention = 2 * tokens * heads * geometry.head_dim * 2
    sampler = SAMPLER_COPIES * setup.max_num_seqs * vocab * 4
    rest = attention + HIDDEN_COPIES * tokens * hidden * 2 + sampler
    low, expected, high = (
        int((mlp * times + rest) * factor) for times, factor in zip(gathered, ACTIVATION_RANGE, strict=True)
    )
    estimate = Estimate(
        low,
        expected,
        high,
        "MLP or Marlin MoE caches, attention, hidden states and sampler of one step; range from public logs",
    )
    return estimate + vision_peak(family.config, hidden, tokens) if setup.split.vision else estimate


def vision_peak(config: Mapping[str, Any], hidden: int, tokens: int) -> Estimate:
    """The vision tower's profiling pass, on one rank: patches of as many image tokens as a step has, or of one video, in BF16.

    Each token merges s x s patches: s^2 x (VISION_COPIES x width + qkv + both sides of the MLP) + the merging MLP of 4 x hidden.
    """
    vision = ConfigPart(config, "config.json").needed_part("vision_config")
    width, inner = vision.count("hidden_size", MAX_SIZE), vision.count("intermediate_size", MAX_SIZE)
    compression = config["vision_config"].get("img_token_compression_config")
    merge = compression.get("spatial_merge_size") if isinstance(compression, Mapping) else None
    patches = merge**2 if type(merge) is int and 0 < merge <= MAX_MERGE else 1
    per_token = 2 * (patches * ((VISION_COPIES + 3) * width + 2 * inner) + 4 * hidden)
    low, expected, high = (int(max(tokens, VISION_TOKENS) * per_token * factor) for factor in VISION_RANGE)
    return Estimate(
        low, expected, high, "vision tower's profiling pass; range from M3 on two and eight B200, not measured here"
    )


def graphs(setup: Setup, gpu: Gpu) -> Estimate:
    """What vLLM sets aside for CUDA graphs: capture sizes up to min(2 x max_num_seqs, 512), 1024 on Blackwell's large cards."""
    if setup.enforce_eager:
        return Estimate(0, 0, 0, "--enforce-eager: no graphs")
    largest = min(2 * setup.max_num_seqs, 1024 if gpu.total_bytes >= LARGE_GPU else 512)
    expected = GRAPHS_BASE + GRAPHS_PER_SIZE * largest
    return Estimate(
        expected // 5,
        expected,
        max(2 * expected, GRAPHS_PER_SIZE_MOST * largest),
        "0.19-1.97 GiB in public logs, by captured sizes; vLLM's estimate errs both ways",
    )


@dataclass(frozen=True)
class RankMemory:
    """One rank of one pipeline stage, bytes. `kv_*`: what is left for the cache at the high, expected and low overhead."""

    stage: int
    layers: int
    total: int
    requested: int
    weights: dict[str, int]
    non_torch: Estimate
    activation: Estimate
    graphs: Estimate
    bytes_per_token: int

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def overhead(self) -> Estimate:
        return self.non_torch + self.activation + self.graphs

    def kv_bytes(self, overhead: int) -> int:
        return self.requested - self.weight_bytes - overhead


@dataclass(frozen=True)
class Pool:
    """The KV pool that all requests share: the smallest rank's blocks. tokens: usable, without the null block."""

    blocks: int
    block_size: int

    @property
    def tokens(self) -> int:
        return max(0, self.blocks - 1) * self.block_size

    def concurrency(self, context: int) -> int:
        """Whole requests of `context` tokens at once."""
        return max(0, self.blocks - 1) // math.ceil(context / self.block_size) if context > 0 else 0

    def engine_tokens(self, max_model_len: int) -> int:
        """The number that vLLM prints as `GPU KV cache size`: int(blocks / blocks per request x max_model_len)."""
        return int(max(0, self.blocks) / math.ceil(max_model_len / self.block_size) * max_model_len)


def pool_of(kv_bytes: Sequence[int], bytes_per_token: Sequence[int], block_size: int, dcp: int = 1) -> Pool:
    """Blocks of the smallest rank, from each rank's cache bytes and bytes per token. A stage without layers keeps no cache.

    dcp: ranks that keep different tokens, so that one block on each holds dcp x block_size of them.
    """
    pages = [
        kv // (per_token * block_size) if kv > 0 else 0
        for kv, per_token in zip(kv_bytes, bytes_per_token, strict=True)
        if per_token
    ]
    return Pool(min(pages, default=0), block_size * dcp)


@dataclass(frozen=True)
class Prediction:
    """Memory of every stage's rank on a node."""

    node: Node
    setup: Setup
    ranks: tuple[RankMemory, ...]

    def pool(self, which: str = "high") -> Pool:
        """The pool if every overhead is 'low', 'expected' or 'high'; 'high' is what a plan may promise."""
        kv = [rank.kv_bytes(getattr(rank.overhead, which)) for rank in self.ranks]
        return pool_of(kv, [rank.bytes_per_token for rank in self.ranks], self.setup.block_size, self.setup.split.dcp)

    @property
    def tightest(self) -> RankMemory:
        """The rank that decides: most short of memory, then smallest pool."""
        caching = [rank for rank in self.ranks if rank.bytes_per_token] or self.ranks
        return min(caching, key=lambda r: r.kv_bytes(r.overhead.high) / max(1, r.bytes_per_token))


def predict(node: Node, family: Family, groups: Sequence[Group], setup: Setup) -> Prediction:
    """Memory of each rank. Raises NodeError for a setup that no engine takes."""
    check_setup(setup)
    geometry = family.kv_geometry
    per_token = kv_bytes_per_token(family, setup)
    weights = rank_weights(groups, setup.split, geometry.kv_heads, geometry.layers)
    stages = stage_of_layers(geometry.layers, setup.split.pp)
    none = Estimate(0, 0, 0, "the CPU build reserves the cache alone")
    cpu = node.gpu.name == CPU
    split = setup.split
    many = NON_TORCH_WIDE if split.expert_ranks > 4 else NON_TORCH_MANY
    non_torch = none if cpu else NON_TORCH_ONE if split.ranks == 1 else many
    return Prediction(
        node,
        setup,
        tuple(
            RankMemory(
                stage=i,
                layers=len(stages[i]),
                total=node.gpu.total_bytes,
                requested=node.gpu.total_bytes if cpu else math.ceil(node.gpu.total_bytes * setup.utilization),
                weights={} if cpu else weights[i],
                non_torch=non_torch,
                activation=none if cpu else activation(family, setup),
                graphs=none if cpu else graphs(setup, node.gpu),
                bytes_per_token=per_token[i],
            )
            for i in range(setup.split.pp)
        ),
    )
