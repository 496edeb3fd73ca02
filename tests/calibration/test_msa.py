"""Sparse attention without a window x window matrix, against transformers' eager attention and brute force."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLAttention, MiniMaxM3VLRotaryEmbedding

from m3quant.calibration import msa
from m3quant.calibration.layers import Layer, SparseSpec, layer_spec
from m3quant.calibration.msa import block_sparse_attention, select_blocks
from tests.support.calibration.tiny import m3_config, m3_tensors

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "head_dim": 64,
    "rotary_dim": 32,
    "num_local_experts": 2,
    "vocab_size": 128,
    "sparse_attention_config": {
        "sparse_index_dim": 64,
        "sparse_block_size": 64,
        "sparse_topk_blocks": 3,
    },
}


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse_layer(kv_heads: int = 2, **sparse: int) -> tuple[Layer, dict[str, torch.Tensor], dict[str, Any]]:
    sparse = {**SMALL["sparse_attention_config"], "sparse_num_index_heads": kv_heads, **sparse}
    heads = {"num_attention_heads": 2 * kv_heads, "num_key_value_heads": kv_heads}
    overrides = {**SMALL, **heads, "sparse_attention_config": sparse}
    config = m3_config(**overrides)
    prefix = "language_model.model.layers.1."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in m3_tensors(config, seed=11, dtype=torch.float32).items()
        if name.startswith(prefix)
    }
    return Layer(layer_spec(config, 1), tensors), tensors, config


def eager_attention(tensors: dict[str, torch.Tensor], config: dict[str, Any], normed: torch.Tensor) -> torch.Tensor:
    """transformers' own module, eager, from the same tensors."""
    text = MiniMaxM3VLConfig.from_dict(config).text_config
    text._attn_implementation = "eager"
    module = MiniMaxM3VLAttention(text, 1)
    state = {
        name.removeprefix("self_attn.").replace("index_", "indexer."): tensor
        for name, tensor in tensors.items()
        if name.startswith("self_attn.")
    }
    module.load_state_dict(state)
    length = normed.shape[1]
    positions = torch.arange(length)[None]
    mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    rotary = MiniMaxM3VLRotaryEmbedding(text)(normed, positions)
    with torch.no_grad():
        return module(normed, position_embeddings=rotary, attention_mask=mask, position_ids=positions)[0]


@pytest.mark.parametrize("length", [64, 192, 193, 300, 1000, 2500, 4096])
def test_attention_equals_transformers_eager(length: int) -> None:
    # The reference's memory grows with the square of the window, so the long ones have one KV head.
    layer, tensors, config = sparse_layer(kv_heads=2 if length <= 1000 else 1)
    normed = randn(1, length, 128, seed=length)
    expected = eager_attention(tensors, config, normed)
    error = (layer.attention(normed) - expected).abs().max() / expected.abs().max()
    assert error < 2e-6, f"{length} tokens: {error:.2e}"


@pytest.mark.parametrize(("local", "topk"), [(2, 3), (1, 1), (0, 2)])
def test_other_numbers_of_blocks_equal_transformers_eager(local: int, topk: int) -> None:
    layer, tensors, config = sparse_layer(sparse_local_block=local, sparse_topk_blocks=topk)
    normed = randn(2, 500, 128, seed=5)
    expected = eager_attention(tensors, config, normed)
    error = (layer.attention(normed) - expected).abs().max() / expected.abs().max()
    assert error < 2e-6


def test_selection_leaves_something_out_and_changes_the_result() -> None:
    layer, _, _ = sparse_layer()
    everything, _, _ = sparse_layer(sparse_topk_blocks=64)
    normed = randn(1, 1000, 128, seed=3)
    sparse, full = layer.attention(normed), everything.attention(normed)
    assert torch.allclose(sparse[:, :192], full[:, :192], atol=1e-5)
    assert (sparse[:, 400:] - full[:, 400:]).norm() > 0.05 * full[:, 400:].norm()


def test_select_blocks_equals_brute_force() -> None:
    spec = SparseSpec(index_heads=2, index_dim=8, block_size=4, topk_blocks=3, local_blocks=1, init_blocks=0)
    q, k = randn(2, 2, 30, 8, seed=1), randn(2, 1, 30, 8, seed=2)
    chosen = select_blocks(q, k, spec)
    assert chosen.shape == (2, 2, 30, 3)
    for batch in range(2):
        for head in range(2):
            for i in range(30):
                scores = {
                    block: max(
                        float(q[batch, head, i] @ k[batch, 0, j]) for j in range(4 * block, min(4 * block + 4, i + 1))
                    )
                    for block in range(i // 4)
                }
                best = sorted(scores, key=scores.__getitem__, reverse=True)[:2]
                found = [block for block in chosen[batch, head, i].tolist() if block >= 0]
                assert sorted(found) == sorted([*best, i // 4])
                # Valid blocks come first, so that a slot after a -1 is never needed.
                assert chosen[batch, head, i].tolist()[: len(found)] == found


def test_init_blocks_are_always_chosen() -> None:
    spec = SparseSpec(index_heads=1, index_dim=8, block_size=4, topk_blocks=3, local_blocks=1, init_blocks=1)
    chosen = select_blocks(randn(1, 1, 64, 8, seed=1), randn(1, 1, 64, 8, seed=2), spec)
    assert bool((chosen == 0).any(dim=-1).all())


@pytest.mark.parametrize("elements", [1, 1 << 14, 1 << 18])
def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    layer, _, _ = sparse_layer()
    normed = randn(2, 333, 128, seed=4)
    expected = layer.attention(normed)
    monkeypatch.setattr(msa, "_CHUNK_ELEMENTS", elements)
    assert torch.allclose(layer.attention(normed), expected, rtol=1e-5, atol=1e-6)


class _LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return out


def test_no_tensor_grows_with_the_square_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msa, "_CHUNK_ELEMENTS", 1 << 18)
    layer, _, _ = sparse_layer()
    largest = {}
    for length in (1024, 2048, 4096):
        with _LargestTensor() as seen:
            layer.attention(randn(1, length, 128, seed=6))
        largest[length] = seen.elements
    assert largest[4096] <= 2 * largest[2048] <= 4 * largest[1024]
    assert largest[4096] < 4096 * 4096 // 8


def test_grouped_query_heads_read_their_own_kv_head() -> None:
    # Four query heads on two KV heads whose values differ by a constant: the output tells which one was read.
    query, key = randn(1, 4, 40, 16, seed=1), randn(1, 2, 40, 16, seed=2)
    value = torch.ones(1, 2, 40, 16) * torch.tensor([1.0, -3.0]).view(1, 2, 1, 1)
    blocks = torch.stack([torch.arange(40) // 8, torch.zeros(40, dtype=torch.int64)], dim=-1)
    blocks[:8, 1] = -1
    out = block_sparse_attention(query, key, value, blocks.expand(1, 2, 40, 2), 8, 0.25)
    assert torch.allclose(out[0, :2], torch.ones(2, 40, 16)) and torch.allclose(
        out[0, 2:], torch.full((2, 40, 16), -3.0)
    )
