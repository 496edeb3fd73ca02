"""MiniMax Sparse Attention (arXiv:2606.13392) for long windows, without a window x window matrix.

The index branch scores every key for every query, a block of keys scores as its best key, and a query attends to its
`topk_blocks` best blocks up to itself, the local ones forced in. The maths is that of transformers 5.23
`models/minimax_m3_vl` (`MiniMaxM3VLIndexer`, eager attention); the order of work is not: (query, block) pairs are
sorted by block, each block's keys meet all the queries that chose it in one product, and a query's partial softmaxes
are merged by their maxima and sums. Queries are taken in chunks, so that temporaries have a fixed size and the rest
grows with window x topk_blocks, not with the square of the window.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from m3quant.calibration.ops import at_least_float32, grouped_linear

# Elements of the largest temporary of one chunk of queries (256 MB in float32).
_CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class SparseSpec:
    """Block selection, from config.json's sparse_attention_config. Sizes are in tokens, except `*_blocks`."""

    index_heads: int
    index_dim: int
    block_size: int
    topk_blocks: int
    local_blocks: int
    init_blocks: int

    def covers(self, window: int) -> bool:
        """Whether every causal block of a window of this many tokens is always selected (plain causal attention)."""
        return window <= self.topk_blocks * self.block_size


def select_blocks(index_q: torch.Tensor, index_k: torch.Tensor, spec: SparseSpec) -> torch.Tensor:
    """Choose key blocks: index_q [B, Hi, L, D], index_k [B, 1, L, D], normed and rotated -> [B, Hi, L, k] int64.

    k = min(topk_blocks, ceil(L / block_size)); -1 fills slots that have no block at or before the query. Scores are
    float32 and top-k runs over the same row of block scores as in transformers, so ties fall alike. `init_blocks` first
    blocks are forced as vLLM does (transformers ignores the setting; it is 0 in the released models).
    """
    batch, heads, length, _ = index_q.shape
    size = spec.block_size
    blocks = -(-length // size)
    q, k = at_least_float32(index_q), at_least_float32(index_k)
    device, dtype = q.device, q.dtype
    local = torch.arange(spec.local_blocks, device=device)
    block_ids = torch.arange(blocks, device=device)
    chosen = torch.empty(batch, heads, length, min(spec.topk_blocks, blocks), dtype=torch.int64, device=device)
    step = _chunk(batch * heads * blocks * size, length)
    for start in range(0, length, step):
        stop = min(start + step, length)
        positions = torch.arange(start, stop, device=device)
        keys = min(-(-stop // size) * size, length)
        scores = q[:, :, start:stop] @ k[:, :, :keys].transpose(-1, -2)
        scores = scores.masked_fill(torch.arange(keys, device=device) > positions[:, None], float("-inf"))
        scores = F.pad(scores, (0, -keys % size), value=float("-inf"))
        best = torch.full((batch, heads, stop - start, blocks), float("-inf"), dtype=dtype, device=device)
        seen = scores.shape[-1] // size
        best[..., :seen] = scores.unflatten(-1, (seen, size)).amax(dim=-1)
        own = positions // size
        forced = (own[:, None] - local).clamp(min=0).expand(batch, heads, -1, -1)
        best.scatter_(-1, forced, float("inf"))
        best.masked_fill_((block_ids < spec.init_blocks) & (block_ids <= own[:, None]), float("inf"))
        top = best.topk(chosen.shape[-1], dim=-1)
        chosen[:, :, start:stop] = top.indices.masked_fill(top.values == float("-inf"), -1)
    return chosen


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: torch.Tensor,
    block_size: int,
    scaling: float,
) -> torch.Tensor:
    """Causal attention over chosen blocks: query [B, Hq, L, D], key and value [B, Hkv, L, D] -> [B, Hq, L, D].

    blocks: [B, Hkv, L, k] int64 from `select_blocks`, one choice for the Hq / Hkv query heads of a KV head, at least
    one block each and none after the query's own. Softmax in float32; on CUDA in BF16 the scores are rounded to BF16
    first, as in transformers' eager attention.
    """
    batch, kv_heads, length, dim = key.shape
    shared = query.shape[1] // kv_heads
    count = -(-length // block_size)
    pad = (0, 0, 0, count * block_size - length)
    key_blocks = F.pad(key, pad).reshape(batch * kv_heads * count, block_size, dim)
    value_blocks = F.pad(value, pad).reshape(batch * kv_heads * count, block_size, dim).transpose(-1, -2)
    # [B, Hkv, L, G, D]: the query heads of a KV head side by side, as the rows that one pair brings to its block.
    grouped = query.unflatten(1, (kv_heads, shared)).transpose(2, 3)
    out = torch.empty_like(grouped)
    step = _chunk(batch * kv_heads * blocks.shape[-1] * shared * (block_size + 2 * dim), length)
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        out[:, :, rows] = _attend(grouped[:, :, rows], key_blocks, value_blocks, blocks[:, :, rows], start, scaling)
    return out.transpose(2, 3).flatten(1, 2)


def _attend(
    query: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    blocks: torch.Tensor,
    start: int,
    scaling: float,
) -> torch.Tensor:
    """Queries [B, Hkv, C, G, D] from position `start` against their blocks [B, Hkv, C, k] -> the queries' shape."""
    batch, kv_heads, chunk, shared, dim = query.shape
    groups, size, _ = key_blocks.shape
    slots = blocks.shape[-1]
    per_head = groups // (batch * kv_heads)
    head = torch.arange(batch * kv_heads, device=query.device).view(batch, kv_heads, 1, 1)
    # Empty slots go to a group of their own behind the real ones, and are cut off after sorting.
    group = torch.where(blocks >= 0, head * per_head + blocks, groups).reshape(-1)
    counts = torch.bincount(group, minlength=groups + 1)[:groups]
    pairs = torch.argsort(group, stable=True)[: int(counts.sum())]
    owners = pairs // slots
    x = query.reshape(-1, shared, dim)[owners].flatten(0, 1)
    scores = at_least_float32(grouped_linear(x, key_blocks, counts * shared)).view(-1, shared, size).mul_(scaling)
    first_key = group[pairs] % per_head * size
    last = (start + owners % chunk - first_key)[:, None, None]
    scores = scores.masked_fill_(torch.arange(size, device=query.device) > last, float("-inf"))
    peak = scores.amax(dim=-1)
    weights = scores.sub_(peak[..., None]).exp_()
    total = weights.sum(dim=-1)
    mixed = grouped_linear(weights.flatten(0, 1).to(query.dtype), value_blocks, counts * shared).view(-1, shared, dim)

    wide = scores.dtype
    shape = (batch, kv_heads, chunk, slots, shared)
    peaks = torch.full((group.shape[0], shared), float("-inf"), dtype=wide, device=query.device)
    peaks[pairs] = peak
    factor = torch.softmax(peaks.view(shape), dim=3).flatten(0, 3)
    totals = torch.zeros_like(peaks)
    totals[pairs] = total
    parts = torch.zeros(group.shape[0], shared, dim, dtype=wide, device=query.device)
    parts[pairs] = mixed.to(wide) * factor[pairs][..., None]
    numerator = parts.view(*shape, dim).sum(dim=3)
    denominator = (totals * factor).view(shape).sum(dim=3)
    return (numerator / denominator[..., None]).to(query.dtype)


def _chunk(elements_per_query: int, length: int) -> int:
    return max(1, min(length, _CHUNK_ELEMENTS // elements_per_query))
