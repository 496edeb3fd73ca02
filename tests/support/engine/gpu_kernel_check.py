"""vLLM's M3 block-sparse prefill kernel alone, against plain float32 attention, for several GQA groups: where do NaNs begin?

python tests/support/engine/gpu_kernel_check.py        # one GPU, vLLM importable
"""

from __future__ import annotations

import torch
from vllm.models.minimax_m3.common.ops.sparse_attn import minimax_m3_sparse_attn

BLOCK, DIM, KV_HEADS, TOPK = 128, 128, 2, 4


def check(group: int, tokens: int) -> None:
    torch.manual_seed(0)
    blocks = -(-tokens // BLOCK)
    heads = KV_HEADS * group
    q = torch.randn(tokens, heads, DIM, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(blocks, KV_HEADS, BLOCK, 2 * DIM, device="cuda", dtype=torch.bfloat16)
    position = torch.arange(tokens, device="cuda")
    rank = torch.arange(TOPK, device="cuda")
    chosen = (position // BLOCK)[:, None] - rank  # the local block and those before it
    index = chosen.masked_fill(chosen < 0, -1).int().expand(KV_HEADS, -1, -1).contiguous()
    table = torch.arange(blocks, device="cuda", dtype=torch.int32)[None]
    starts, length = (
        torch.tensor([0, tokens], device="cuda", dtype=torch.int32),
        torch.tensor([tokens], device="cuda", dtype=torch.int32),
    )
    out = torch.full_like(q, float("nan"))
    minimax_m3_sparse_attn(
        q, cache, index, table, starts, length, torch.zeros_like(length), tokens, KV_HEADS, DIM**-0.5, out
    )
    flat = cache.float().permute(1, 0, 2, 3).reshape(KV_HEADS, -1, 2 * DIM)[:, :tokens]
    key, value = flat[..., :DIM].repeat_interleave(group, 0), flat[..., DIM:].repeat_interleave(group, 0)
    near = (position[:, None] // BLOCK - position[None] // BLOCK < TOPK) & (position[None] <= position[:, None])
    scores = (q.float().transpose(0, 1) @ key.transpose(1, 2)) * DIM**-0.5
    expected = scores.masked_fill(~near, float("-inf")).softmax(-1) @ value
    bad = ~torch.isfinite(out).all(-1).all(-1)
    error = (out.float() - expected.transpose(0, 1)).abs().nan_to_num(0).max()
    first = int(bad.nonzero()[0]) if bool(bad.any()) else None
    print(
        f"group {group}, {tokens} tokens: max error {error:.4f}, {int(bad.sum())} rows not finite, first {first}",
        flush=True,
    )


for size in (1, 2, 4, 8, 16):
    check(size, 1000)
