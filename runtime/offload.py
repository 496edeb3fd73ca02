"""Weights and cache in the host's memory: what leaves the GPU, and what the host must have for it. Pure; no machine is asked.

vLLM's UVA offloader (model_executor/offloader/uva.py, the same in 0.32 and 0.33) goes through a stage's layers in order and through a layer's
parameters in theirs, moves each to pinned memory, and stops at the first parameter that finds the limit reached. The GPU reads them there in
place. A parameter holds all experts of the rank: first the codes of w1 and w3 together, then those of w2, then the scales likewise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .weights import Group, Split, rank_share, stage_of_layers

EXPERTS = "routed_experts"
_DOWN = ("w2", "down_proj")
# Names of tensors, in the order in which fused_moe makes the parameters that hold them (compressed_tensors_moe_wna16.py, fp8.py and
# unquantized_fused_moe_method.py). weight_shape is left out: a few kB a layer.
_CODES = ("weight_packed", "weight")
_SCALES = ("weight_scale", "weight_scale_inv")


@dataclass(frozen=True)
class Moved:
    """Bytes of routed experts of one rank that lie on the host. pinned: what torch takes for them, whose allocator of pinned memory rounds
    each tensor up to a power of two (ATen/core/CachingHostAllocator.h)."""

    weights: int = 0
    pinned: int = 0


NOTHING = Moved()


def moved_experts(groups: Iterable[Group], split: Split, kv_heads: int, layers: int, limit: int) -> list[Moved]:
    """Per pipeline stage: what a limit of so many bytes a rank moves: at least that if the experts have as many, at most a parameter more."""
    parameters = _parameters(groups, split, kv_heads)
    found = []
    for stage in stage_of_layers(layers, split.pp):
        weights = pinned = 0
        for size in (size for layer in stage for size in parameters.get(layer, ())):
            if weights >= limit:
                break
            weights += size
            pinned += 1 << (size - 1).bit_length()
        found.append(Moved(weights, pinned))
    return found


def _parameters(groups: Iterable[Group], split: Split, kv_heads: int) -> dict[int, list[int]]:
    """Layer -> bytes of its experts' parameters on one rank, in the engine's order."""
    sizes: dict[int, dict[tuple[int, int], int]] = {}
    for group in groups:
        if group.role != EXPERTS or group.layer is None:
            continue
        kind = 0 if group.leaf in _CODES else 1 if group.leaf in _SCALES else None
        if kind is not None:
            own = sizes.setdefault(group.layer, {})
            key = (kind, int(group.part in _DOWN))
            own[key] = own.get(key, 0) + rank_share(group, split, kv_heads)
    return {layer: [own[key] for key in sorted(own)] for layer, own in sizes.items()}


def expert_leaves(groups: Iterable[Group]) -> frozenset[tuple[str, str]]:
    """(last part of the name, dtype) of the tensors that routed experts are stored in."""
    return frozenset((group.leaf, group.dtype) for group in groups if group.role == EXPERTS)


def host_bytes(cache: int, moved: Sequence[Moved], split: Split) -> int:
    """Host memory of all ranks: the cache's buffer and the pinned weights."""
    return cache + sum(stage.pinned for stage in moved) * split.tp * split.dp


def host_tokens(cache: int, bytes_per_token: Sequence[int], block_size: int, split: Split) -> int:
    """Tokens of prefixes that a buffer holds: whole blocks, each of the bytes that all ranks keep of it (v1/kv_offload/cpu/spec.py)."""
    block = sum(_page(each * block_size) for each in bytes_per_token) * split.tp
    return cache // block * block_size if block else 0


def _page(size: int, page: int = 4096) -> int:
    return -(-size // page) * page
