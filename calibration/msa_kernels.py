# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels for MiniMax Sparse Attention on a GPU; `msa` holds the plain form of both and decides which runs.

Scores are BF16 products accumulated in float32 and stay float32 up to the softmax. No temporary grows with the square
of the window, and none is larger than the block scores of one chunk of queries.
"""

from typing import Any

import torch
import triton
import triton.language as tl

# Launch settings, measured on one H200 by tests/benchmarks/eval_gpu.py.
SCORES = {"QUERIES": 128, "num_warps": 8, "num_stages": 3}
ATTENTION = {"KEYS": 64, "num_warps": 4, "num_stages": 3}
_LOG2E = 1.4426950408889634


@triton.jit
def _block_scores_kernel(
    q_ptr, k_ptr, out_ptr, start, stop, length, blocks, heads, q_batch, q_head, k_batch,
    DIM: tl.constexpr, SIZE: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Best score per key block for QUERIES queries of one index head; blocks after a query's own are left alone."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    pair = tl.program_id(1)
    batch, head = pair // heads, pair % heads
    rows = start + tile * QUERIES + tl.arange(0, QUERIES)
    dims = tl.arange(0, DIM)
    q_base = q_ptr + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    q = tl.load(q_base + rows.to(tl.int64)[:, None] * DIM + dims[None, :], mask=rows[:, None] < stop, other=0.0)
    k_base = k_ptr + batch.to(tl.int64) * k_batch
    out_rows = out_ptr + (pair.to(tl.int64) * (stop - start) + (rows - start)) * blocks
    last = tl.minimum(start + (tile + 1) * QUERIES, stop) - 1
    # Two loops, so that the mask costs nothing where every key comes before every query.
    whole = (start + tile * QUERIES) // SIZE
    for block in range(0, whole):
        keys = block * SIZE + tl.arange(0, SIZE)
        k = tl.load(k_base + keys.to(tl.int64)[None, :] * DIM + dims[:, None])
        tl.store(out_rows + block, tl.max(tl.dot(q, k), axis=1), mask=rows < stop)
    for block in range(whole, last // SIZE + 1):
        keys = block * SIZE + tl.arange(0, SIZE)
        k = tl.load(k_base + keys.to(tl.int64)[None, :] * DIM + dims[:, None], mask=keys[None, :] < length, other=0.0)
        scores = tl.where(keys[None, :] <= rows[:, None], tl.dot(q, k), float("-inf"))
        tl.store(out_rows + block, tl.max(scores, axis=1), mask=rows < stop)


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, blocks_ptr, out_ptr, length, kv_heads, scale, q_batch, q_head, q_row, kv_batch, kv_head, kv_row,
    SHARED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One query position of one KV head: its SHARED query heads over its chosen blocks, softmax carried along."""
    position = tl.program_id(0)
    pair = tl.program_id(1)
    batch, head = pair // kv_heads, pair % kv_heads
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    q_base = q_ptr + batch.to(tl.int64) * q_batch + position.to(tl.int64) * q_row
    heads = (head * SHARED + rows).to(tl.int64)
    q = tl.load(q_base + heads[:, None] * q_head + dims[None, :], mask=rows[:, None] < SHARED, other=0.0)
    kv_base = batch.to(tl.int64) * kv_batch + head.to(tl.int64) * kv_head
    chosen = blocks_ptr + (pair.to(tl.int64) * length + position) * SLOTS
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    parts = SIZE // KEYS
    for step in range(SLOTS * parts):
        # No branch on an empty slot, which would keep the loads from being pipelined: its keys are masked instead. The
        # first slot is never empty, so that the peak is finite from its first key on.
        block = tl.load(chosen + step // parts)
        keys = block * SIZE + step % parts * KEYS + tl.arange(0, KEYS)
        offsets = kv_base + keys.to(tl.int64)[:, None] * kv_row + dims[None, :]
        inside = (keys <= position) & (block >= 0)
        k = tl.load(k_ptr + offsets, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        kept = tl.exp2(peak - higher)
        total = total * kept + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + offsets, mask=inside[:, None], other=0.0)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * kept[:, None])
        peak = higher
    mixed = mixed / total[:, None]
    out = (
        out_ptr + ((batch.to(tl.int64) * length + position) * kv_heads * SHARED + heads)[:, None] * DIM + dims[None, :]
    )
    tl.store(out, mixed.to(out_ptr.dtype.element_ty), mask=rows[:, None] < SHARED)


def fits(tensor: torch.Tensor, block_size: int) -> bool:
    """Whether the kernels take these widths and this dtype: half precision, powers of two from 16 up."""
    dim = tensor.shape[-1]
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return half and all(16 <= n <= 256 and n & (n - 1) == 0 for n in (dim, block_size))


def block_scores(
    index_q: torch.Tensor, index_k: torch.Tensor, start: int, stop: int, block_size: int, out: torch.Tensor
) -> None:
    """Fill out [B, Hi, stop - start, blocks] float32, -inf before, with the best causal score of each block so far.

    index_q [B, Hi, L, D] and index_k [B, 1, L, D] half precision, each query row and key row contiguous.
    """
    batch, heads, length, dim = index_q.shape
    q, k = _rows(index_q), _rows(index_k)
    grid = (triton.cdiv(stop - start, SCORES["QUERIES"]), batch * heads)
    _block_scores_kernel[grid](
        q, k, out, start, stop, length, out.shape[-1], heads, q.stride(0), q.stride(1), k.stride(0),
        DIM=dim, SIZE=block_size, **SCORES,
    )  # fmt: skip


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with rows of its last two dimensions packed, as the block-score kernel reads them."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: torch.Tensor, block_size: int, scaling: float
) -> torch.Tensor:
    """As `msa.block_sparse_attention`; query [B, Hq, L, D], key and value [B, Hkv, L, D], any strides but the last's."""
    batch, kv_heads, length, dim = key.shape
    shared = query.shape[1] // kv_heads
    q = query if query.stride(-1) == 1 else query.contiguous()
    if key.stride() != value.stride() or key.stride(-1) != 1:
        key, value = key.contiguous(), value.contiguous()
    chosen = blocks.to(torch.int32).contiguous()
    # Token-major, as o_proj reads it; the caller sees [B, Hq, L, D].
    out = torch.empty(batch, length, query.shape[1], dim, dtype=query.dtype, device=query.device)
    arguments: tuple[Any, ...] = (q, key, value, chosen, out, length, kv_heads, scaling * _LOG2E)
    strides = (q.stride(0), q.stride(1), q.stride(2), key.stride(0), key.stride(1), key.stride(2))
    _attention_kernel[(length, batch * kv_heads)](
        *arguments, *strides, SHARED=shared, ROWS=max(16, triton.next_power_of_2(shared)), DIM=dim, SIZE=block_size,
        SLOTS=chosen.shape[-1], **{**ATTENTION, "KEYS": min(ATTENTION["KEYS"], block_size)},
    )  # fmt: skip
    return out.transpose(1, 2)
