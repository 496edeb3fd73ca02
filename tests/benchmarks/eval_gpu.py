"""What evaluation costs at real width, on one GPU: `python -m tests.benchmarks.eval_gpu OUT [--tokens 131072]`.

One M2 layer and one M3 layer of the released shapes, random BF16 weights made on the GPU, one sequence of 131,072 tokens:
seconds and peak memory of attention, MLP or experts, and the head (two streams, KL over the whole vocabulary), each beside
its floor at the matrix rates measured in the same run. Before that the sparse-attention kernels are compared with their plain
form, whole at 3,000 tokens and in sampled rows at full length. Writes OUT/eval_gpu.json. Needs one GPU with 140 GB; about
two minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from m3quant.calibration import msa
from m3quant.calibration.head import Head, compare_heads
from m3quant.calibration.layers import Layer, layer_shapes, layer_spec
from m3quant.calibration.msa import SparseSpec, block_sparse_attention, select_blocks
from m3quant.calibration.spec import LayerSpec
from m3quant.calibration.stream import HiddenStates

from .wide import wide_config

VOCABULARY = 200_064
FLOAT32 = ("block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias")
# Candidates for the launch settings of msa_kernels; the first of each is what is committed.
SCORES = [
    {"QUERIES": 128, "num_warps": 8, "num_stages": 3},
    {"QUERIES": 128, "num_warps": 4, "num_stages": 3},
    {"QUERIES": 128, "num_warps": 8, "num_stages": 2},
    {"QUERIES": 64, "num_warps": 4, "num_stages": 3},
]
ATTENTION = [
    {"KEYS": 64, "num_warps": 4, "num_stages": 3},
    {"KEYS": 64, "num_warps": 4, "num_stages": 2},
    {"KEYS": 128, "num_warps": 4, "num_stages": 2},
    {"KEYS": 64, "num_warps": 2, "num_stages": 3},
    {"KEYS": 128, "num_warps": 8, "num_stages": 2},
    {"KEYS": 32, "num_warps": 2, "num_stages": 4},
]


def measure(run: Callable[[], Any], repeats: int = 3) -> dict[str, float]:
    """Least seconds of `repeats` runs after one that compiles, and bytes at the peak above what was there before."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, best = torch.cuda.memory_allocated(), float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return {"seconds": best, "peak_bytes_above": torch.cuda.max_memory_allocated() - before}


def against(flops: float, rate: float, found: dict[str, float]) -> dict[str, float]:
    floor = flops / rate
    return {**found, "flops": flops, "floor_seconds": floor, "times_floor": found["seconds"] / floor}


def rates() -> dict[str, float]:
    """FLOP/s of square matrix products here, BF16 and float32."""
    out = {}
    for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 4096)):
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        out[str(dtype).removeprefix("torch.")] = 2 * size**3 / measure(lambda a=a, b=b: a @ b, 10)["seconds"]
    return out


@contextmanager
def plain() -> Iterator[None]:
    """The plain path of `msa` instead of its kernels."""
    kept = msa._kernels_for
    msa._kernels_for = lambda x, size: None
    try:
        yield
    finally:
        msa._kernels_for = kept


@contextmanager
def settings(name: str, values: dict[str, int]) -> Iterator[None]:
    from m3quant.calibration import msa_kernels

    table = getattr(msa_kernels, name)
    kept = dict(table)
    table.update(values)
    try:
        yield
    finally:
        table.update(kept)


def attention_inputs(spec: LayerSpec, tokens: int) -> dict[str, torch.Tensor]:
    """Random q, k, v and index q, k as a layer hands them over: BF16, heads before tokens."""

    def heads(count: int, dim: int) -> torch.Tensor:
        return torch.randn(1, tokens, count, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    out = {"q": heads(spec.num_heads, spec.head_dim)}
    out |= {name: heads(spec.num_kv_heads, spec.head_dim) for name in ("k", "v")}
    if spec.sparse:
        out["index_q"] = heads(spec.sparse.index_heads, spec.sparse.index_dim)
        out["index_k"] = heads(1, spec.sparse.index_dim)
    return out


def compare_kernels(spec: LayerSpec, tokens: int) -> dict[str, float]:
    """Kernels against the plain path in float32, whole; both errors relative in the Frobenius norm."""
    sparse = need_sparse(spec)
    x, scaling = attention_inputs(spec, tokens), spec.head_dim**-0.5
    chosen = select_blocks(x["index_q"], x["index_k"], sparse)
    out = block_sparse_attention(x["q"], x["k"], x["v"], chosen, sparse.block_size, scaling)
    with plain():
        expected_blocks = select_blocks(x["index_q"].float(), x["index_k"].float(), sparse)
        wide = [x[name].float() for name in "qkv"]
        expected = block_sparse_attention(wide[0], wide[1], wide[2], chosen, sparse.block_size, scaling)
        rounded = block_sparse_attention(x["q"], x["k"], x["v"], chosen, sparse.block_size, scaling)
    same = chosen.sort(dim=-1).values == expected_blocks.sort(dim=-1).values
    found = {
        "tokens": tokens,
        "same_blocks": float(same.float().mean()),
        "kernel_error": float((out.float() - expected).norm() / expected.norm()),
        "plain_bf16_error": float((rounded.float() - expected).norm() / expected.norm()),
    }
    assert found["same_blocks"] > 0.999 and found["kernel_error"] < 1.2 * found["plain_bf16_error"], found
    return found


def compare_rows(
    x: dict[str, torch.Tensor], chosen: torch.Tensor, out: torch.Tensor, sparse: SparseSpec
) -> dict[str, float]:
    """Sampled query rows at full length against brute force in float64: the chosen blocks and the attention."""
    tokens, size, shared = out.shape[2], sparse.block_size, x["q"].shape[1] // x["k"].shape[1]
    drawn = torch.randint(0, tokens, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [*drawn, 0, size - 1, size, tokens - 1]
    same, total, worst = 0, 0, 0.0
    for row in rows:
        scores = x["index_q"][0, :, row].double() @ x["index_k"][0, 0, : row + 1].double().T
        scores = F.pad(scores, (0, -(row + 1) % size), value=float("-inf")).unflatten(-1, (-1, size)).amax(-1)
        scores[:, -1] = float("inf")
        wanted = scores.topk(min(sparse.topk_blocks, scores.shape[-1]), dim=-1).indices
        for head in range(x["k"].shape[1]):
            mine = [block for block in chosen[0, head, row].tolist() if block >= 0]
            same += len(set(mine) & set(wanted[head].tolist()))
            total += wanted.shape[-1]
            keys = torch.cat([torch.arange(b * size, min((b + 1) * size, row + 1)) for b in sorted(mine)]).cuda()
            q = x["q"][0, head * shared : (head + 1) * shared, row].double()
            weights = (q @ x["k"][0, head, keys].double().T * q.shape[-1] ** -0.5).softmax(-1)
            expected = weights @ x["v"][0, head, keys].double()
            error = (out[0, head * shared : (head + 1) * shared, row].double() - expected).norm() / expected.norm()
            worst = max(worst, float(error))
    found = {"rows": len(rows), "same_blocks": same / total, "worst_error": worst}
    assert found["same_blocks"] > 0.999 and worst < 2e-2, found
    return found


def need_sparse(spec: LayerSpec) -> SparseSpec:
    assert spec.sparse is not None
    return spec.sparse


def attention_alone(spec: LayerSpec, tokens: int, rate: float) -> dict[str, Any]:
    """Attention between the rotary embedding and o_proj, random inputs."""
    x, scaling = attention_inputs(spec, tokens), spec.head_dim**-0.5
    if spec.sparse is None:

        def dense() -> Any:
            return F.scaled_dot_product_attention(
                x["q"], x["k"], x["v"], is_causal=True, scale=scaling, enable_gqa=True
            )

        flops = 4 * spec.num_heads * spec.head_dim * tokens**2 / 2
        return {"dense": against(flops, rate, measure(dense, 2))}
    sparse = spec.sparse
    out: dict[str, Any] = {}

    def select() -> torch.Tensor:
        return select_blocks(x["index_q"], x["index_k"], sparse)

    def attend() -> torch.Tensor:
        return block_sparse_attention(x["q"], x["k"], x["v"], chosen, sparse.block_size, scaling)

    index_flops = 2 * sparse.index_heads * sparse.index_dim * tokens**2 / 2
    covered = min(sparse.topk_blocks * sparse.block_size, tokens)
    keys = covered * tokens - covered**2 / 2
    attend_flops = 4 * spec.num_heads * spec.head_dim * keys
    chosen = select()
    out["rows"] = compare_rows(x, chosen, attend(), sparse)
    out["select"] = against(index_flops, rate, measure(select))
    out["attend"] = against(attend_flops, rate, measure(attend))
    out["settings"] = []
    for name, candidates, run in (("SCORES", SCORES, select), ("ATTENTION", ATTENTION, attend)):
        for candidate in candidates:
            with settings(name, candidate):
                try:
                    found = measure(run, 2)["seconds"]
                except Exception as error:  # a candidate may need more shared memory than there is
                    found = f"{type(error).__name__}: {str(error)[:80]}"
            out["settings"].append({"kernel": name, **candidate, "seconds": found})
            print(out["settings"][-1], flush=True)
    short = min(tokens, 32768)
    part = {name: value[:, :, :short] for name, value in x.items()}
    with plain():
        out["plain"] = {
            "tokens": short,
            "select": measure(lambda: select_blocks(part["index_q"], part["index_k"], sparse), 1),
            "attend": measure(lambda: block_sparse_attention(part["q"], part["k"], part["v"], chosen[:, :, :short], sparse.block_size, scaling), 1),
        }  # fmt: skip
    return out


def make_layer(spec: LayerSpec) -> Layer:
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = {}
    for name, shape in layer_shapes(spec).items():
        tensor = torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32)
        tensor = tensor * 0.1 + (0.0 if spec.norm_one_plus else 1.0) if len(shape) == 1 else tensor / shape[-1] ** 0.5
        tensors[name] = tensor.to(torch.float32 if name in FLOAT32 else torch.bfloat16)
    return Layer(spec, tensors, "cuda")


def whole_layer(spec: LayerSpec, tokens: int, rate: float) -> dict[str, Any]:
    """A layer as evaluation runs it; MoE also in pieces of 16,384 tokens, which is the same result in less memory."""
    layer = make_layer(spec)
    gc.collect()
    weights = torch.cuda.memory_allocated()
    x = torch.randn(1, tokens, spec.hidden_size, device="cuda", dtype=torch.bfloat16)
    moe = spec.moe
    assert moe is not None
    hidden, rows = spec.hidden_size, spec.num_heads * spec.head_dim
    kv = 2 * spec.num_kv_heads * spec.head_dim
    index = (spec.sparse.index_heads + 1) * spec.sparse.index_dim if spec.sparse else 0
    projections = 2 * tokens * hidden * (2 * rows + kv + index)
    experts = 6 * tokens * hidden * (moe.top_k * moe.intermediate_size + moe.shared_intermediate_size)
    pieces = 16384

    def attention() -> torch.Tensor:
        return layer.attention(layer.attention_input(x))

    def mlp() -> torch.Tensor:
        return layer.mlp(layer.mlp_input(x))

    def mlp_in_pieces() -> torch.Tensor:
        return torch.cat([layer.mlp(layer.mlp_input(part)) for part in x.split(pieces, dim=1)], dim=1)

    found: dict[str, Any] = {"weight_bytes": weights, "hidden_bytes": x.numel() * 2}
    found["attention_with_projections"] = {**measure(attention, 2), "projection_floor_seconds": projections / rate}
    found["mlp_in_pieces"] = against(experts, rate, measure(mlp_in_pieces, 2))
    try:
        found["mlp_whole"] = against(experts, rate, measure(mlp, 2))
        found["layer"] = measure(lambda: layer.forward(x), 2)
    except torch.OutOfMemoryError as error:  # expected on 80 GB
        found["mlp_whole"] = str(error)[:120]
    short = x[:, :4096]
    reference = layer.attention(layer.attention_input(short)).float()
    with plain():
        error = (layer.attention(layer.attention_input(short)).float() - reference).norm() / reference.norm()
    found["attention_kernels_against_plain_at_4096"] = float(error)
    found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def head(spec: LayerSpec, tokens: int, rate: dict[str, float]) -> dict[str, Any]:
    """Two streams' last hidden states to KL, losses and top-1 over the whole vocabulary."""
    hidden = spec.hidden_size
    weight = torch.randn(VOCABULARY, hidden, device="cuda", dtype=torch.bfloat16) / hidden**0.5
    norm = torch.zeros(hidden, device="cuda", dtype=torch.bfloat16) + (0.0 if spec.norm_one_plus else 1.0)
    one = Head(norm, weight, spec.eps, spec.norm_one_plus)
    states = torch.randn(1, tokens, hidden, device="cuda", dtype=torch.bfloat16)
    other = states + 0.05 * torch.randn_like(states)
    ids = torch.randint(0, VOCABULARY, (1, tokens))
    part = min(tokens, 4096)
    compare_heads(one, one, HiddenStates(states[:, :part]), HiddenStates(other[:, :part]), ids[:, :part])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    compare_heads(one, one, HiddenStates(states), HiddenStates(other), ids)
    torch.cuda.synchronize()
    found = {"seconds": time.perf_counter() - started, "peak_bytes_above": torch.cuda.max_memory_allocated() - before}
    flops = 2 * 2 * tokens * hidden * VOCABULARY
    return {**against(flops, rate["float32"], found), "bfloat16_floor_seconds": flops / rate["bfloat16"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=131_072)
    arguments = parser.parse_args()
    started = time.perf_counter()
    import transformers
    import triton

    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "tokens": arguments.tokens}
    result |= {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    result["flops_per_second"] = rate = rates()
    arguments.out.mkdir(parents=True, exist_ok=True)

    def note(name: str, run: Callable[[], Any]) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        began = time.perf_counter()
        result[name] = run()
        print(f"{name} ({time.perf_counter() - began:.1f} s): {json.dumps(result[name])}", flush=True)
        result["script_seconds"] = time.perf_counter() - started
        (arguments.out / "eval_gpu.json").write_text(json.dumps(result, indent=2) + "\n")

    specs = {name: layer_spec(wide_config(name, 1), 0) for name in ("m2", "m3")}
    m3 = specs["m3"]
    note("kernels_against_plain", lambda: compare_kernels(m3, 3000))
    wide = replace(m3, num_heads=6, num_kv_heads=2, sparse=replace(need_sparse(m3), index_heads=2, topk_blocks=3))
    note("kernels_against_plain_odd_group", lambda: compare_kernels(wide, 1111))
    for release, spec in reversed(specs.items()):
        tokens = arguments.tokens
        note(f"{release} attention", lambda spec=spec, tokens=tokens: attention_alone(spec, tokens, rate["bfloat16"]))
        note(f"{release} layer", lambda spec=spec, tokens=tokens: whole_layer(spec, tokens, rate["bfloat16"]))
        note(f"{release} head", lambda spec=spec, tokens=tokens: head(spec, tokens, rate))


if __name__ == "__main__":
    main()
