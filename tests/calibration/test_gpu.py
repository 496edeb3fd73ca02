"""The CUDA paths against the CPU ones, and what a layer takes on the GPU. Skipped where there is no GPU."""

from pathlib import Path

import pytest
import torch

from m3quant.calibration import msa, ops
from m3quant.calibration.layers import Layer, layer_shapes, layer_spec
from m3quant.calibration.msa import SparseSpec, block_sparse_attention, select_blocks
from m3quant.calibration.ops import Activation, Routing
from m3quant.calibration.stream import nll, read_layer
from tests.support.calibration.tiny import FolderSource, make_tiny_m2, make_tiny_m3

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def randn(*shape: int, seed: int, std: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


# Rows of 100 BF16 numbers are not whole 16-byte words, so they take the padded products instead of the grouped kernel.
@pytest.mark.parametrize("inner", [128, 100])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
def test_experts_on_the_gpu_equal_the_cpu(inner: int, dtype: torch.dtype, bound: float) -> None:
    hidden, experts, tokens = 256, 32, 200
    h = randn(tokens, hidden, seed=1).to(dtype)
    w1, w3 = (randn(experts, inner, hidden, seed=seed, std=hidden**-0.5).to(dtype) for seed in (2, 3))
    w2 = randn(experts, hidden, inner, seed=4, std=inner**-0.5).to(dtype)
    chosen = randn(tokens, experts // 2, seed=5).topk(4, dim=-1).indices  # half of the experts get nothing
    routing = Routing(chosen, randn(tokens, 4, seed=6).sigmoid())
    act = Activation("swigluoai")
    expected = ops.experts_forward(h.float(), routing, w1.float(), w3.float(), w2.float(), act)
    on_gpu = Routing(chosen.cuda(), routing.weights.cuda())
    found = ops.experts_forward(h.cuda(), on_gpu, w1.cuda(), w3.cuda(), w2.cuda(), act)
    assert relative(found, expected) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
def test_sparse_attention_on_the_gpu_equals_the_cpu(dtype: torch.dtype, bound: float) -> None:
    spec = SparseSpec(index_heads=2, index_dim=64, block_size=128, topk_blocks=3, local_blocks=1, init_blocks=0)
    length = 1500
    blocks = select_blocks(randn(2, 2, length, 64, seed=1), randn(2, 1, length, 64, seed=2), spec)
    query = randn(2, 8, length, 128, seed=3).to(dtype)
    key, value = (randn(2, 2, length, 128, seed=seed).to(dtype) for seed in (4, 5))
    expected = block_sparse_attention(query.float(), key.float(), value.float(), blocks, 128, 128**-0.5)
    found = block_sparse_attention(query.cuda(), key.cuda(), value.cuda(), blocks.cuda(), 128, 128**-0.5)
    assert relative(found, expected) < bound


# The widths of the released M3, odd lengths, several windows, and a group of query heads that is not a power of two.
@pytest.mark.parametrize(
    ("batch", "length", "kv_heads", "shared", "dim", "topk"),
    [(1, 3000, 4, 16, 128, 16), (2, 777, 2, 3, 64, 4), (1, 4096, 1, 16, 128, 2)],
)
def test_sparse_kernels_equal_the_plain_path(
    batch: int, length: int, kv_heads: int, shared: int, dim: int, topk: int
) -> None:
    assert msa._kernels() is not None, "Triton is missing beside this torch"
    spec = SparseSpec(
        index_heads=kv_heads, index_dim=128, block_size=128, topk_blocks=topk, local_blocks=1, init_blocks=0
    )
    index_q = randn(batch, length, kv_heads, 128, seed=1).bfloat16().transpose(1, 2)
    index_k = randn(batch, 1, length, 128, seed=2).bfloat16()
    blocks = select_blocks(index_q.cuda(), index_k.cuda(), spec).cpu()
    # Two blocks whose scores differ by rounding alone may swap; a wrong score moves many.
    same = blocks.sort(dim=-1).values == select_blocks(index_q.float(), index_k.float(), spec).sort(dim=-1).values
    assert same.float().mean() > 0.999
    query = randn(batch, length, kv_heads * shared, dim, seed=3).bfloat16().transpose(1, 2)
    key, value = (randn(batch, kv_heads, length, dim, seed=seed).bfloat16() for seed in (4, 5))
    expected = block_sparse_attention(query.float(), key.float(), value.float(), blocks, 128, dim**-0.5)
    found = block_sparse_attention(query.cuda(), key.cuda(), value.cuda(), blocks.cuda(), 128, dim**-0.5)
    assert found.shape == expected.shape and relative(found, expected) < 6e-3


@pytest.mark.parametrize("make", [make_tiny_m2, make_tiny_m3])
def test_losses_on_the_gpu_equal_the_cpu(make: type, tmp_path: Path) -> None:
    source = FolderSource(make(tmp_path, seed=7))
    tokens = torch.randint(0, 500, (2, 700), generator=torch.Generator().manual_seed(8))
    expected = nll(source, tokens)
    # BF16 weights, float32 compute: the expert-by-expert path.
    assert relative(nll(source, tokens, "cuda", torch.float32), expected) < 1e-4
    rounded = nll(source, tokens, "cuda")
    assert abs(float(rounded.mean() - expected.mean())) < 0.05


def test_a_layer_is_on_the_gpu_once(tmp_path: Path) -> None:
    source = FolderSource(make_tiny_m2(tmp_path, hidden_size=512, intermediate_size=512, num_local_experts=32))
    spec, tensors = layer_spec(source.config, 0), read_layer(source, 0)
    size = sum(tensors[name].nbytes for name in layer_shapes(spec))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer = Layer(spec, tensors, "cuda")
    assert torch.cuda.max_memory_allocated() - before < 1.02 * size
    # BF16 weights with float32 compute: never a float32 copy of more than one expert's matrix at a time.
    layer = Layer(spec, tensors, "cuda", torch.float32)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layer.mlp(torch.ones(1, 4, 512, device="cuda"))
    assert torch.cuda.max_memory_allocated() - before < 0.2 * size


def test_set_weight_on_the_gpu_leaves_the_source_alone(tmp_path: Path) -> None:
    source = FolderSource(make_tiny_m2(tmp_path, seed=9))
    tensors = {name: tensor.cuda() for name, tensor in read_layer(source, 0).items()}
    name = "block_sparse_moe.experts.5.w1.weight"
    before = tensors[name].clone()
    layer = Layer(layer_spec(source.config, 0), tensors, "cuda")
    layer.set_weight(name, torch.zeros_like(before))
    assert torch.equal(tensors[name], before) and not layer.weight(name).any()
