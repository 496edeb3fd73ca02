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
from typing import Any

from ..engines import DEFAULT, engine_named
from ..engines.device import CPU, Gpu
from ..engines.drafts import Draft
from ..engines.memory import Estimate, MemoryModel
from ..engines.stated import stated_cache
from ..errors import NodeError
from ..families import Family
from ..families.config import MAX_SIZE, ConfigPart
from .guard.pool import draft_slots
from .hardware import Node
from .offload import EXPERTS, NOTHING, Moved, moved_experts
from .weights import Group, Split, as_kept, rank_weights, stage_of_layers

DRAFT = "draft"  # the role of a draft model's weights in tables
MAX_MERGE = 16  # more than any tower merges along an edge


@dataclass(frozen=True)
class Setup:
    """How the engine of that name and release (None: the newest that was read) is asked to run. kv_dtype and index_dtype are resolved names, never 'auto'.

    kv_offload: bytes of host memory for cache, of all ranks together; weight_offload: of routed experts, of each rank at least.
    """

    split: Split = field(default_factory=Split)
    kv_dtype: str = "bfloat16"
    index_dtype: str = "bfloat16"
    utilization: float = DEFAULT.memory.utilization
    max_num_seqs: int = DEFAULT.memory.num_seqs
    max_num_batched_tokens: int = DEFAULT.memory.batched_tokens
    block_size: int = DEFAULT.memory.block_size
    enforce_eager: bool = False
    engine: str = DEFAULT.name
    release: str | None = None
    draft: Draft | None = None
    kv_offload: int = 0
    weight_offload: int = 0

    @property
    def rows(self) -> int:
        """Tokens of one request whose logits a decoding step computes."""
        return 1 + (self.draft.tokens if self.draft else 0)

    @property
    def draft_slots(self) -> int:
        """Cache slots beyond its tokens that a request may take, as the guard reserves them."""
        return draft_slots(self.draft.tokens if self.draft else 0, self.split.pp)

    @property
    def memory(self) -> MemoryModel:
        """The constants of the engine's release."""
        return engine_named(self.engine).memory_of(self.release)


def check_setup(setup: Setup) -> None:
    """Raise NodeError for a value that no engine takes."""
    kv, index = setup.memory.kv_bytes, setup.memory.index_bytes
    if setup.kv_dtype not in kv:
        raise NodeError(
            f"KV dtype '{setup.kv_dtype}' {_unknown(setup, setup.kv_dtype)}: use --kv-dtype with {', '.join(kv)}."
        )
    if setup.index_dtype not in index:
        raise NodeError(
            f"index dtype '{setup.index_dtype}' {_unknown(setup, setup.index_dtype)}: use {' or '.join(index)}."
        )
    if not 0 < setup.utilization <= 1:
        raise NodeError(f"GPU memory utilization {setup.utilization:g} must lie in (0, 1].")
    if min(setup.kv_offload, setup.weight_offload) < 0:
        raise NodeError("host memory for cache or weights must not be negative.")
    for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
        if getattr(setup, name) < 1:
            raise NodeError(f"{name.replace('_', '-')} must be at least 1.")
    split = setup.split
    if min(split.tp, split.pp, split.dp, split.dcp) < 1:
        raise NodeError("TP, PP, DP and DCP must be at least 1.")
    if split.tp % split.dcp:
        raise NodeError(f"decode context parallel size {split.dcp} does not divide TP {split.tp}.")


def _unknown(setup: Setup, name: str) -> str:
    return "is one whose bytes m3quant does not model" if setup.memory.unmodelled(name) else "is not known"


def kv_dtype_of(config: Mapping[str, Any], asked: str = "auto", weights_dtype: str = "bfloat16") -> str:
    """The KV dtype the engine will use: `asked`, or what the checkpoint states for 'auto', or the model's dtype."""
    return asked if asked != "auto" else stated_cache(config) or weights_dtype


def kv_bytes_per_token(family: Family, setup: Setup) -> list[int]:
    """Per pipeline stage: bytes of KV and index cache that one rank keeps for one token.

    kv = 2 x layers x max(1, kv_heads / tp) x head_dim x bytes; index = index layers x index_dim x bytes, on every rank.
    """
    geometry = family.kv_geometry
    heads = max(1, geometry.kv_heads // setup.split.tp)
    per_layer = 2 * heads * geometry.head_dim * setup.memory.kv_bytes[setup.kv_dtype]
    per_index = geometry.index_dim * setup.memory.index_bytes[setup.index_dtype]
    stages = [
        sum(per_layer + (per_index if family.has_index_keys(layer) else 0) for layer in stage)
        for stage in stage_of_layers(geometry.layers, setup.split.pp)
    ]
    if setup.draft is not None:  # it runs where the last layer does
        stages[-1] += setup.draft.kv_per_token(setup.split.tp, setup.memory.kv_bytes[setup.kv_dtype])
    return stages


def activation(family: Family, setup: Setup) -> Estimate:
    """Transient peak of one step of max_num_batched_tokens on one rank. With DP the experts see the gathered tokens of all replicas,
    at once or in pieces.

    The MoE caches are Marlin's (fused_moe/experts/marlin_moe.py): T x top_k x (max(2 x inner, hidden) + inner) elements. A
    dense MLP keeps gate, up and their product.
    """
    geometry, memory = family.kv_geometry, setup.memory
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
    sampler = memory.sampler_copies * setup.max_num_seqs * setup.rows * vocab * 4
    copies = memory.hidden_copies + (setup.draft.taps if setup.draft else 0)
    rest = attention + copies * tokens * hidden * 2 + sampler
    low, expected, high = (
        int((mlp * times + rest) * factor) for times, factor in zip(gathered, memory.activation_range, strict=True)
    )
    estimate = Estimate(
        low,
        expected,
        high,
        f"MLP or Marlin MoE caches, attention, hidden states and sampler of one step; {memory.activation_evidence}",
    )
    return estimate + vision_peak(family.config, hidden, tokens, memory) if setup.split.vision else estimate


def vision_peak(config: Mapping[str, Any], hidden: int, tokens: int, memory: MemoryModel) -> Estimate:
    """The vision tower's profiling pass, on one rank: patches of as many image tokens as a step has, or of one video, in BF16.

    Each token merges s x s patches: s^2 x (vision_copies x width + qkv + both sides of the MLP) + the merging MLP of 4 x hidden.
    """
    vision = ConfigPart(config, "config.json").needed_part("vision_config")
    width, inner = vision.count("hidden_size", MAX_SIZE), vision.count("intermediate_size", MAX_SIZE)
    compression = config["vision_config"].get("img_token_compression_config")
    merge = compression.get("spatial_merge_size") if isinstance(compression, Mapping) else None
    patches = merge**2 if type(merge) is int and 0 < merge <= MAX_MERGE else 1
    per_token = 2 * (patches * ((memory.vision_copies + 3) * width + 2 * inner) + 4 * hidden)
    low, expected, high = (
        int(max(tokens, memory.vision_tokens) * per_token * factor) for factor in memory.vision_range
    )
    return Estimate(
        low, expected, high, "vision tower's profiling pass; range from M3 on two and eight B200, not measured here"
    )


def non_torch(setup: Setup) -> Estimate:
    """Buffers in addition to torch's tensors on one rank, and the kernels' workspace for steps longer than the default."""
    split, memory = setup.split, setup.memory
    if split.ranks == 1:
        buffers = memory.non_torch_one
    else:
        buffers = memory.non_torch_wide if split.expert_ranks > 4 else memory.non_torch_many
    more = memory.non_torch_per_token * max(0, setup.max_num_batched_tokens - memory.batched_tokens)
    if not more:
        return buffers
    source = f"{setup.max_num_batched_tokens:,} tokens a step: {memory.non_torch_per_token_evidence}"
    return buffers + Estimate(0, more, more, source)


def graphs(setup: Setup, gpu: Gpu) -> Estimate:
    """What vLLM sets aside for CUDA graphs: capture sizes up to min(2 x max_num_seqs x rows, 512), 1024 on Blackwell's large cards."""
    if setup.enforce_eager:
        return Estimate(0, 0, 0, "--enforce-eager: no graphs")
    memory = setup.memory
    largest = min(
        2 * setup.max_num_seqs * setup.rows,
        memory.captured_large if gpu.total_bytes >= memory.large_gpu else memory.captured,
    )
    expected = memory.graphs_base + memory.graphs_per_size * largest
    return Estimate(
        expected // 5,
        expected,
        max(2 * expected, memory.graphs_per_size_most * largest),
        memory.graphs_evidence,
    )


@dataclass(frozen=True)
class RankMemory:
    """One rank of one pipeline stage, bytes. weights: on the GPU; moved: on the host. `kv_*`: what is left for the cache at the high, expected and low overhead."""

    stage: int
    layers: int
    total: int
    requested: int
    weights: dict[str, int]
    non_torch: Estimate
    activation: Estimate
    graphs: Estimate
    bytes_per_token: int
    moved: Moved = NOTHING

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
    kept = as_kept(groups, setup.memory)
    weights = rank_weights(kept, setup.split, geometry.kv_heads, geometry.layers)
    moved = moved_experts(kept, setup.split, geometry.kv_heads, geometry.layers, setup.weight_offload)
    for own, host in zip(weights, moved, strict=True):
        if host.weights:
            own[EXPERTS] -= host.weights
    if setup.draft is not None:
        weights[-1][DRAFT] = setup.draft.rank_bytes(setup.split.tp)
    stages = stage_of_layers(geometry.layers, setup.split.pp)
    none = Estimate(0, 0, 0, "the CPU build reserves the cache alone")
    cpu = node.gpu.name == CPU
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
                non_torch=none if cpu else non_torch(setup),
                activation=none if cpu else activation(family, setup),
                graphs=none if cpu else graphs(setup, node.gpu),
                bytes_per_token=per_token[i],
                moved=moved[i],
            )
            for i in range(setup.split.pp)
        ),
    )
