"""MiniMax Sparse Attention (arXiv:2606.13392) for long windows, without a window x window matrix.

The index branch scores every key for every query, a block of keys scores as its best key, and a query attends to its
`topk_blocks` best blocks up to itself, the local ones forced in. The maths is that of transformers 5.23
`models/minimax_m3_vl` (`MiniMaxM3VLIndexer`, eager attention); the order of work is not: (query, block) pairs are
sorted by block, each block's keys meet all the queries that chose it in one product, and a query's partial softmaxes
are merged by their maxima and sums. Queries are taken in chunks, so that temporaries have a fixed size and the rest
grows with window x topk_blocks, not with the square of the window.

On a GPU in half precision the kernels of `msa_kernels` do both steps without those temporaries; float32 and the CPU take
the plain path here, and tests/benchmarks/eval_gpu.py compares the two.
"""

from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F

from m3quant.calibration.ops import at_least_float32, grouped_linear
from m3quant.families.spec import SparseSpec

# Elements of the largest temporary of one chunk of queries (256 MB in float32).
_CHUNK_ELEMENTS = 1 << 26


def select_blocks(index_q: torch.Tensor, index_k: torch.Tensor, spec: SparseSpec) -> torch.Tensor:
    """Choose key blocks: index_q [B, Hi, L, D], index_k [B, 1, L, D], normed and rotated -> [B, Hi, L, k] int64.

    k = min(topk_blocks, ceil(L / block_size)); -1 fills slots that have no block at or before the query. Scores are
    float32 and top-k runs over the same row of block scores as in transformers, so ties fall alike. `init_blocks` first
    blocks are forced as vLLM does (transformers ignores the setting; it is 0 in the released models).
    """
    batch, heads, length, _ = index_q.shape
    size = spec.block_size
    blocks = -(-length // size)
    kernels = _kernels_for(index_q, size)
    q, k = (index_q, index_k) if kernels else (at_least_float32(index_q), at_least_float32(index_k))
    device, dtype = q.device, torch.float32 if kernels else q.dtype
    local = torch.arange(spec.local_blocks, device=device)
    block_ids = torch.arange(blocks, device=device)
    chosen = torch.empty(batch, heads, length, min(spec.topk_blocks, blocks), dtype=torch.int64, device=device)
    step = _chunk(batch * heads * blocks * (1 if kernels else size), length)
    for start in range(0, length, step):
        stop = min(start + step, length)
        best = torch.full((batch, heads, stop - start, blocks), float("-inf"), dtype=dtype, device=device)
        (kernels.block_scores if kernels else _block_scores)(q, k, start, stop, size, best)
        own = torch.arange(start, stop, device=device) // size
        forced = (own[:, None] - local).clamp(min=0).expand(batch, heads, -1, -1)
        best.scatter_(-1, forced, float("inf"))
        best.masked_fill_((block_ids < spec.init_blocks) & (block_ids <= own[:, None]), float("inf"))
        top = best.topk(chosen.shape[-1], dim=-1)
        chosen[:, :, start:stop] = top.indices.masked_fill(top.values == float("-inf"), -1)
    return chosen


def _block_scores(q: torch.Tensor, k: torch.Tensor, start: int, stop: int, size: int, out: torch.Tensor) -> None:
    """Put into out [B, Hi, stop - start, blocks] the best causal score of each block up to the queries' own."""
    keys = min(-(-stop // size) * size, k.shape[-2])
    scores = q[:, :, start:stop] @ k[:, :, :keys].transpose(-1, -2)
    positions = torch.arange(start, stop, device=q.device)
    scores = scores.masked_fill(torch.arange(keys, device=q.device) > positions[:, None], float("-inf"))
    scores = F.pad(scores, (0, -keys % size), value=float("-inf"))
    seen = scores.shape[-1] // size
    out[..., :seen] = torch.unflatten(scores, -1, (seen, size)).amax(dim=-1)


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
    one block each, the first slot filled, none after the query's own. Softmax in float32, from float32 scores where the
    kernels run; the plain path on CUDA in BF16 rounds the scores to BF16 first, as transformers' eager attention does.
    """
    if kernels := _kernels_for(query, block_size):
        result: torch.Tensor = kernels.sparse_attention(query, key, value, blocks, block_size, scaling)
        return result
    batch, kv_heads, length, dim = key.shape
    shared = query.shape[1] // kv_heads
    count = -(-length // block_size)
    pad = (0, 0, 0, count * block_size - length)
    key_blocks = F.pad(key, pad).reshape(batch * kv_heads * count, block_size, dim)
    value_blocks = F.pad(value, pad).reshape(batch * kv_heads * count, block_size, dim).transpose(-1, -2)
    # [B, Hkv, L, G, D]: the query heads of a KV head side by side, as the rows that one pair brings to its block.
    grouped = torch.unflatten(query, 1, (kv_heads, shared)).transpose(2, 3)
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


def _kernels_for(x: torch.Tensor, block_size: int) -> ModuleType | None:
    """The Triton kernels where they can run: on a GPU, with Triton installed, in half precision and these widths."""
    kernels = _kernels() if x.is_cuda else None
    return kernels if kernels and kernels.fits(x, block_size) else None


@cache
def _kernels() -> ModuleType | None:
    try:
        from m3quant.calibration import msa_kernels
    except ImportError:  # torch for other GPUs comes without Triton
        return None
    return msa_kernels
