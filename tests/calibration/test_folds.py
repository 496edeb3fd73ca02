"""Exact folds: the model computes what it computed before, and picks the same experts and the same key blocks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from m3quant.calibration import attention
from m3quant.calibration.folds import ATTENTION_NORM, MLP_NORM, all_groups, fold_groups, fold_norm, pair_folds
from m3quant.calibration.layers import Layer
from m3quant.calibration.ops import Activation, gated, rms_norm
from m3quant.calibration.spec import LayerSpec, layer_spec
from m3quant.errors import PlanError
from m3quant.schemes import parse_scheme
from tests.support.calibration import tiny
from tests.support.calibration.plain_folds import apply_folds
from tests.support.calibration.planted import Tensors, linears, tiny_layer

ROUTER = "block_sparse_moe.gate.weight"

INT4, FP8 = parse_scheme("int4-g128"), parse_scheme("fp8-channel")


def scales(size: int, seed: int, spread: float = 0.5) -> torch.Tensor:
    return torch.exp(torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_groups_of_m2() -> None:
    spec, tensors = tiny_layer("m2", 0)
    attention, mlp = all_groups(spec)
    assert attention.norm == ATTENTION_NORM
    assert attention.readers == tuple(f"self_attn.{n}_proj.weight" for n in "qkv") and attention.compensated == ()
    assert mlp.norm == MLP_NORM and mlp.compensated == (ROUTER,)
    assert set(mlp.readers) == {n for n in tensors if n.endswith(("w1.weight", "w3.weight"))}


def test_groups_of_m3_hold_the_indexer_the_shared_expert_and_the_router() -> None:
    spec, tensors = tiny_layer("m3", 1)
    attention, mlp = all_groups(spec)
    assert {"self_attn.index_q_proj.weight", "self_attn.index_k_proj.weight"} <= set(attention.readers)
    shared = {f"block_sparse_moe.shared_experts.{n}_proj.weight" for n in ("gate", "up")}
    assert shared <= set(mlp.readers) and mlp.compensated == (ROUTER,)
    hidden = {n for n in linears(tensors) if tensors[n].shape[1] == spec.hidden_size}
    assert set(attention.readers) | set(mlp.readers) == hidden


def test_groups_of_a_dense_m3_layer() -> None:
    spec, _ = tiny_layer("m3", 0)
    attention, mlp = all_groups(spec)
    assert len(attention.readers) == 3
    assert mlp.readers == ("mlp.gate_proj.weight", "mlp.up_proj.weight") and mlp.compensated == ()


def test_only_groups_with_an_integer_reader_are_searched_and_they_keep_all_their_readers() -> None:
    spec, tensors = tiny_layer("m3", 1)
    schemes = {n: INT4 if ".experts." in n else FP8 for n in linears(tensors)}
    (group,) = fold_groups(spec, schemes)
    assert group == all_groups(spec)[1]
    assert "block_sparse_moe.shared_experts.up_proj.weight" in group.readers
    assert fold_groups(spec, dict.fromkeys(schemes, FP8)) == []
    assert fold_groups(spec, {}) == []
    assert len(fold_groups(spec, dict.fromkeys(schemes, INT4))) == 2


@pytest.mark.parametrize(
    ("mean", "std", "naive"), [(-0.95, 0.02, 1e-2), (-0.6, 0.15, 1e-3), (0.0, 0.1, 2e-4)], ids=["-.95", "-.6", "0"]
)
def test_the_coarse_grid_of_a_one_plus_norm_is_no_trap(mean: float, std: float, naive: float) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = (torch.randn(6144, generator=generator) * std + mean).bfloat16()
    wanted, x = scales(6144, 1), torch.randn(6144, generator=generator).double()
    weight = torch.randn(6144, generator=generator).double()
    stored, effective = fold_norm(norm, wanted, one_plus=True)
    assert stored.dtype == torch.bfloat16 and effective.dtype == torch.float32

    before = x * (1 + norm.double()) * weight
    after = x * (1 + stored.double()) * (weight * effective.double())
    assert float(((after - before) / before.abs().clamp(min=1e-30)).abs().max()) < 2e-7
    asked = x * (1 + ((1 + norm.double()) / wanted.double() - 1).bfloat16().double()) * (weight * wanted.double())
    assert float(((asked - before) / before.abs().clamp(min=1e-30)).abs().mean()) > naive


def test_a_plain_norm_is_exact_too() -> None:
    norm = scales(4096, 0, 0.3).bfloat16()
    stored, effective = fold_norm(norm, scales(4096, 1), one_plus=False)
    error = stored.double() * effective.double() / norm.double() - 1
    assert float(error.abs().max()) < 1e-7


@pytest.mark.parametrize("one_plus", [True, False])
def test_channels_whose_norm_is_or_becomes_zero_are_left_alone(one_plus: bool) -> None:
    # M3: 1 + w = 0; 1 + w = 2^-8, where a scale of 3 would round 1 + w' to 0. M2: w = 0; w that underflows.
    norm = torch.tensor([-1.0, -1 + 2.0**-8, 0.25] if one_plus else [0.0, 2.0**-133, 0.25]).bfloat16()
    stored, effective = fold_norm(norm, torch.tensor([3.0, 3.0, 3.0]), one_plus)
    assert torch.equal(stored[:2], norm[:2]) and torch.equal(effective[:2], torch.ones(2))
    assert stored[2] != norm[2] and bool(torch.isfinite(effective).all())
    assert float(effective[2]) == pytest.approx(3.0, rel=1e-2)


def forward(
    specs: list[LayerSpec], per_layer: list[Tensors], x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """(hidden states after the last layer, experts chosen per MoE layer, key blocks chosen per sparse layer)."""
    blocks: list[torch.Tensor] = []
    select = attention.select_blocks

    def recorded(*args: Any) -> torch.Tensor:
        blocks.append(select(*args))
        return blocks[-1]

    experts = []
    with monkeypatch.context() as patch:
        patch.setattr(attention, "select_blocks", recorded)
        for spec, tensors in zip(specs, per_layer, strict=True):
            layer = Layer(spec, tensors, dtype=torch.float32)
            x = x + layer.attention(layer.attention_input(x))
            normed = layer.mlp_input(x)
            if spec.moe:
                experts.append(layer.routing(normed).experts.sort(dim=1).values)
            x = x + layer.mlp(normed)
    return x, experts, blocks


@pytest.mark.parametrize("family", ["m2", "m3"])
@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.bfloat16])
def test_folding_changes_neither_logits_nor_routing_nor_blocks(
    family: str, norm_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.m2_config() if family == "m2" else tiny.m3_config()
    source = (tiny.m2_tensors if family == "m2" else tiny.m3_tensors)(config, 3, torch.float32)
    body = "model." if family == "m2" else "language_model.model."
    count = 2 if family == "m2" else 3
    specs = [layer_spec(config, index) for index in range(count)]
    plain, folded = [], []
    for index, spec in enumerate(specs):
        prefix = f"{body}layers.{index}."
        tensors = {n.removeprefix(prefix): t for n, t in source.items() if n.startswith(prefix)}
        tensors |= {n: tensors[n].to(norm_dtype) for n in (ATTENTION_NORM, MLP_NORM)}
        wanted = {ATTENTION_NORM: scales(256, 10 + index), MLP_NORM: scales(256, 20 + index)}
        pairs = {pair.down: scales(128, 30 + index) for pair in pair_folds(spec)} if family == "m2" else None
        plain.append(tensors)
        folded.append(apply_folds(spec, tensors, wanted, pairs))
        assert not torch.equal(folded[-1][MLP_NORM], tensors[MLP_NORM])

    x = torch.randn(2, 384, 256, generator=torch.Generator().manual_seed(0))
    before, experts, blocks = forward(specs, plain, x, monkeypatch)
    after, experts_after, blocks_after = forward(specs, folded, x, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(experts, experts_after, strict=True))
    assert len(blocks) == (0 if family == "m2" else 2)
    assert all(torch.equal(a, b) for a, b in zip(blocks, blocks_after, strict=True))
    head = source["lm_head.weight" if family == "m2" else "language_model.lm_head.weight"]
    norm = source[f"{body}norm.weight"]
    logits, logits_after = (F.linear(rms_norm(h, norm, 1e-6, family == "m3"), head) for h in (before, after))
    assert relative(logits_after, logits) < 1e-5


def test_a_fold_that_leaves_the_router_out_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, tensors = tiny_layer("m3", 1, dtype=torch.float32)
    folded = apply_folds(spec, tensors, {MLP_NORM: scales(256, 0)})
    folded[ROUTER] = tensors[ROUTER]
    x = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0))
    before, experts, _ = forward([spec], [tensors], x, monkeypatch)
    after, experts_after, _ = forward([spec], [folded], x, monkeypatch)
    assert not torch.equal(experts[0], experts_after[0]) and relative(after, before) > 1e-2


def test_a_missing_reader_is_refused() -> None:
    spec, tensors = tiny_layer("m3", 1)
    del tensors["self_attn.index_k_proj.weight"]
    with pytest.raises(PlanError, match=r"reader self_attn\.index_k_proj\.weight is missing"):
        apply_folds(spec, tensors, {ATTENTION_NORM: scales(256, 0)})


def test_the_pair_fold_is_refused_under_swigluoai() -> None:
    spec, tensors = tiny_layer("m3", 1)
    with pytest.raises(PlanError, match=r"layer 1: .*not exact under activation 'swigluoai'"):
        pair_folds(spec)
    down = "block_sparse_moe.experts.0.w2.weight"
    with pytest.raises(PlanError, match="not exact"):
        apply_folds(spec, tensors, {}, {down: scales(128, 0)})


def test_the_pair_fold_is_exact_under_silu_and_wrong_under_swigluoai() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(64, 512, generator=generator, dtype=torch.float64) for _ in range(3))
    t = scales(512, 1).double()
    errors = {}
    for kind in ("silu", "swigluoai"):
        act = Activation(kind)
        before, after = gated(gate, up, act) @ down.T, gated(gate, up / t, act) @ (down * t).T
        errors[kind] = relative(after, before)
    assert errors["silu"] < 1e-14 and errors["swigluoai"] > 0.1
