"""MiniMax-M3's layers in plain torch: the Gemma norm, dense attention's projections, and block-sparse attention.

The sparse layers choose their blocks as M3 does (MiniMax Sparse Attention, arXiv:2606.13392): an index branch scores every key, each block of 128
keys takes its best score, and each query attends to the `topk_blocks` best blocks, its own among them. So an index
projection that was never loaded changes the output of any prompt longer than topk_blocks x 128 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.models.minimax_m3.nvidia.model as m3
from vllm.forward_context import get_forward_context


def gemma_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * (1 + weight) over the last dimension, in float32, returned in x's dtype."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * (1.0 + weight.float())).to(x.dtype)


def norm_forward(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    total = x if residual is None else x + residual
    normed = gemma_norm(total, self.weight, self.variance_epsilon)
    return normed if residual is None else (normed, total)


def normed_heads(x: torch.Tensor, norm: Any, head_dim: int) -> torch.Tensor:
    return norm(x.unflatten(-1, (-1, head_dim))).flatten(-2).contiguous()


def attention_forward(self: Any, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """M3's dense layers: vLLM's own attention, with the norms and the rotation that its CUDA kernel fuses done here."""
    qkv, _ = self.qkv_proj(hidden_states)
    q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
    q, k = normed_heads(q, self.q_norm, self.head_dim), normed_heads(k, self.k_norm, self.head_dim)
    q, k = self.rotary_emb(positions, q, k)
    output, _ = self.o_proj(self.attn(q, k, v.contiguous()))
    return output


def selected_blocks(scores: torch.Tensor, first: int, topk: int, block: int, init: int, local: int) -> torch.Tensor:
    """Which blocks of keys each query attends to.

    scores: [R, Q, K] index scores, queries at positions first..first+Q-1, keys at 0..K-1.
    Returns bool [R, Q, ceil(K / block)]. The first `init` and the nearest `local` blocks are always among the `topk`.
    """
    queries, keys = scores.shape[-2:]
    position = torch.arange(first, first + queries)
    scores = scores.masked_fill(torch.arange(keys) > position[:, None], -torch.inf)
    padding = -keys % block
    best = torch.nn.functional.pad(scores, (0, padding), value=-torch.inf).unflatten(-1, (-1, block)).amax(-1)
    # An index projection that was never loaded may hold NaN: the query's own block is read all the same.
    best = best.masked_fill(best.isnan(), -torch.inf)
    blocks = torch.arange(best.shape[-1])
    own = (position // block)[:, None]
    best = best.masked_fill((blocks < init) & (blocks <= own), 1e30)
    best = best.masked_fill((blocks > own - local) & (blocks <= own), 1e29)
    value, index = best.topk(min(topk, best.shape[-1]), dim=-1)
    return torch.zeros_like(best, dtype=torch.bool).scatter(-1, index, value > -torch.inf)


class SlotStore:
    """Rows by cache slot. vLLM's CPU cache has a layout of its own and no room for index keys, so the rows are kept here."""

    def __init__(self) -> None:
        self.rows = torch.empty(0)

    def write(self, slots: torch.Tensor, values: torch.Tensor) -> None:
        needed = int(slots.max()) + 1
        if self.rows.shape[0] < needed:
            grown = values.new_zeros(needed, *values.shape[1:])
            grown[: self.rows.shape[0]] = self.rows if self.rows.numel() else 0
            self.rows = grown
        self.rows[slots] = values


class SparseAttention(m3.MiniMaxM3Attention):  # type: ignore[misc]
    """Stands for vLLM's MiniMaxM3SparseAttention: the same parameters under the same names, attention in float32."""

    def __init__(
        self,
        config: Any,
        layer_id: int,
        quant_config: Any = None,
        prefix: str = "",
        cache_config: Any = None,
        topk_indices_buffer: Any = None,
    ) -> None:
        super().__init__(config, layer_id, quant_config, prefix, cache_config)
        sparse = config.sparse_attention_config
        self.index_dim = sparse["sparse_index_dim"]
        self.index_heads = sparse["sparse_num_index_heads"]
        self.selection = {
            "topk": sparse["sparse_topk_blocks"],
            "block": sparse["sparse_block_size"],
            "init": sparse.get("sparse_init_block", 0),
            "local": sparse.get("sparse_local_block", 0),
        }
        self.qkv_proj = m3.MinimaxM3QKVParallelLinearWithIndexer(
            self.hidden_size,
            self.head_dim,
            self.total_num_heads,
            self.total_num_kv_heads,
            self.index_heads,
            self.index_dim,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.index_q_norm = m3.MiniMAXGemmaRMSNorm(self.index_dim, eps=config.rms_norm_eps)
        self.index_k_norm = m3.MiniMAXGemmaRMSNorm(self.index_dim, eps=config.rms_norm_eps)
        self.cache_config = cache_config
        self.stored = {name: SlotStore() for name in ("key", "value", "index")}

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        sizes = [self.q_size, self.kv_size, self.kv_size, self.index_heads * self.index_dim, self.index_dim]
        q, k, v, index_q, index_k = qkv.split(sizes, dim=-1)
        q, k = normed_heads(q, self.q_norm, self.head_dim), normed_heads(k, self.k_norm, self.head_dim)
        q, k = self.rotary_emb(positions, q, k)
        index_q = normed_heads(index_q, self.index_q_norm, self.index_dim)
        index_k = normed_heads(index_k, self.index_k_norm, self.index_dim)
        index_q, index_k = self.rotary_emb(positions, index_q, index_k)
        output = torch.zeros_like(q)
        metadata = get_forward_context().attn_metadata
        if metadata is not None:  # None while vLLM measures memory
            self._attend(metadata[self.attn.layer_name], q, {"key": k, "value": v, "index": index_k}, index_q, output)
        result, _ = self.o_proj(output)
        return result

    def _attend(
        self, metadata: Any, q: torch.Tensor, new: dict[str, torch.Tensor], index_q: torch.Tensor, output: torch.Tensor
    ) -> None:
        tokens = metadata.num_actual_tokens
        for name, values in new.items():
            self.stored[name].write(metadata.slot_mapping[:tokens], values[:tokens].float())
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        block = self.cache_config.block_size
        for request, length in enumerate(lengths):
            mine = slice(starts[request], starts[request + 1])
            at = torch.arange(length)
            slots = metadata.block_table[request].long()[at // block] * block + at % block
            past = {name: store.rows[slots] for name, store in self.stored.items()}
            output[mine] = self._attend_one(q[mine].float(), index_q[mine].float(), past).to(output.dtype)

    def _attend_one(self, q: torch.Tensor, index_q: torch.Tensor, past: dict[str, torch.Tensor]) -> torch.Tensor:
        """q [Q, heads * dim] are the last Q positions of a sequence whose keys and values are `past` [K, ..]."""
        queries, keys = q.shape[0], past["key"].shape[0]
        first = keys - queries
        index_heads = index_q.unflatten(-1, (self.index_heads, self.index_dim)).transpose(0, 1)
        chosen = selected_blocks(index_heads @ past["index"].T, first, **self.selection)
        allowed = chosen.repeat_interleave(self.selection["block"], -1)[..., :keys]
        allowed = allowed & (torch.arange(keys) <= torch.arange(first, keys)[:, None])
        group = self.num_heads // self.index_heads  # query heads that share a selection
        kv_group = self.num_heads // self.num_kv_heads
        head = q.unflatten(-1, (self.num_heads, self.head_dim)).transpose(0, 1)
        key = (
            past["key"].unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(0, 1).repeat_interleave(kv_group, 0)
        )
        value = (
            past["value"]
            .unflatten(-1, (self.num_kv_heads, self.head_dim))
            .transpose(0, 1)
            .repeat_interleave(kv_group, 0)
        )
        logits = (head @ key.mT) * self.scaling
        logits = logits.masked_fill(~allowed.repeat_interleave(group, 0), -torch.inf)
        return (logits.softmax(-1) @ value).transpose(0, 1).flatten(-2)


def install() -> None:
    m3.MiniMAXGemmaRMSNorm.forward = norm_forward
    m3.MiniMaxM3Attention.forward = attention_forward
    m3.MiniMaxM3SparseAttention = SparseAttention
    # One process: nothing to reduce, so the fused all-reduce and norm is the norm.
    m3.fused_allreduce_gemma_rms_norm = lambda x, residual, norm, *_, **__: norm_forward(norm, x, residual)
