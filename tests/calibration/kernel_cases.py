"""The GPU's path against the plain one: each kernel on fresh data, and a whole layer.

Run by test_kernels.py in a process of its own, or by hand on a GPU: pytest tests/calibration/kernel_cases.py. Without a
GPU it needs TRITON_INTERPRET=1 from the start, because Triton reads that when it is first imported.
"""

from typing import Any

import pytest
import torch

from m3quant.calibration import glu, grouped, kernels, ranges, round_weight
from m3quant.calibration.awq import calibrate_layer
from m3quant.calibration.awq_settings import AwqSettings
from m3quant.calibration.ops import Activation, gated
from m3quant.schemes import parse_scheme
from tests.support.calibration.planted import salient, tiny_layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = (1.0, 1.1, 0.85, 0.7)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["int4-g128", "int4-g32", "int4-g64-asym", "int8-g32"])
def test_one_pass_gives_what_plain_steps_give(name: str, dtype: torch.dtype) -> None:
    scheme, weight = parse_scheme(name), (normal(2, 20, 256) * 0.05).to(dtype)
    weight[0, 3] = 0  # groups of zeros
    column, row, moment = torch.exp(normal(1, 256) * 0.3), torch.exp(normal(2, 20) * 0.3), normal(2, 256).square()
    expected = round_weight.reference(weight, scheme, column, row, moment, None, FEW)
    assert expected.shrink is not None
    acting, shrink, before, after = kernels.round_groups(weight, scheme, column, row, moment, FEW, errors=True)
    assert acting is not None and shrink is not None and before is not None and after is not None
    assert float((shrink != expected.shrink).float().mean()) < 0.01  # ties, summed in another order
    assert float(before.double().sum()) == pytest.approx(expected.before, rel=1e-6)
    assert float(after.double().sum()) == pytest.approx(expected.after, rel=1e-6)
    given = kernels.round_groups(weight, scheme, column, row, shrink=expected.shrink)[0]
    assert given is not None and torch.equal(given, expected.acting)


def test_every_form_of_the_pass() -> None:
    scheme, weight = parse_scheme("int4-g64"), normal(3, 5, 128)
    column = torch.exp(normal(3, 128))
    expected = round_weight.reference(weight, scheme, column, None, None, None).acting
    full = kernels.round_groups(weight, scheme, column)[0]
    difference = kernels.round_groups(weight, scheme, column, difference=True)[0]
    rounded = kernels.round_groups(weight, scheme, column, tf32=True)[0]
    assert full is not None and difference is not None and rounded is not None
    assert torch.equal(full, expected) and torch.equal(difference, expected - weight)
    assert bool((rounded.view(torch.int32) & 0x1FFF == 0).all())
    torch.testing.assert_close(rounded, expected, rtol=2**-11, atol=0)
    positive = kernels.round_groups(weight, scheme, moment=normal(1, 128).square(), factors=FEW, signed=False)[1]
    assert positive is not None and bool((positive > 0).all())


@pytest.mark.parametrize("act", [Activation(), Activation("swigluoai")])
def test_the_gate_is_the_plain_one_in_tf32(act: Activation) -> None:
    gate, up = normal(3, 7, 50) * 4, normal(3, 7, 50, seed=1) * 4
    expected = gated(gate.double(), up.double(), act)
    found = kernels.gate_rows(gate, up, act)
    assert bool((found.view(torch.int32) & 0x1FFF == 0).all())
    torch.testing.assert_close(found.double(), expected, rtol=2**-10, atol=1e-6)


def test_rows_are_cut_into_blocks_and_summed_in_order() -> None:
    tokens = [
        torch.tensor([0, 2, 4, 5, 7]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([2]),
        torch.tensor([7, 0]),
    ]
    rows = [(t, torch.rand(len(t), generator=torch.Generator().manual_seed(len(t)))) for t in tokens]
    h = normal(8, 6).cpu()
    total = grouped.PairSum(rows, h)
    expected = torch.zeros(8, 6)
    for slot, (own, gates) in enumerate(rows):
        expected.index_add_(0, own, h[own] * (slot + 1) * gates[:, None])
    for _ in range(2):  # a second pass overwrites the first
        seen, found = 0, torch.full((8, 6), torch.nan)
        for block in grouped.row_blocks(rows, width=2):
            slots = torch.arange(4) if block.units is None else block.units
            assert set(slots.tolist()) <= {0, 2, 3}
            outputs = h[block.tokens] * (slots + 1)[:, None, None] * block.gates[..., None]
            found[block.pairs] = outputs.flatten(0, 1)[block.kept]
            seen += len(block.kept)
        assert seen == 8
        total.put(0, found[:5])
        total.put(5, found[5:])
        torch.testing.assert_close(total.total(), expected)


@pytest.mark.parametrize(
    ("units", "most", "each"), [(256, 37, 32), (128, 9, 8), (37, 37, 37), (5, 1, 1), (300, 37, 19)]
)
def test_chunks_divide_among_the_gpus_of_a_node(units: int, most: int, each: int) -> None:
    assert glu.even_chunk(units, most) == each <= most


@pytest.mark.parametrize(("family", "scheme"), [("m2", "int4-g128"), ("m3", "int4-g128-asym")])
def test_a_layer_is_calibrated_as_by_the_reference(family: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few: dict[str, Any] = {"num_local_experts": 3, "num_experts_per_tok": 1}
    spec, tensors = tiny_layer(family, 1, **few)
    schemes = {n: parse_scheme(scheme) for n in tensors if ".experts." in n}
    settings, x = AwqSettings(n_grid=2), salient(1, 300, 256)
    expected = calibrate_layer(spec, tensors, schemes, x, settings)
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "_TILE", 1 << 16)  # fewer programs to interpret
        monkeypatch.setattr(grouped, "batched_on", lambda tensor: True)
        for module in (ranges, round_weight):
            monkeypatch.setattr(module, "fused", kernels.supports)
    monkeypatch.setattr(grouped, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(grouped, "WIDTH", 32)
    found = calibrate_layer(spec, tensors, schemes, x, settings, DEVICE, torch.float32)
    mine, plain = found.log["blocks"][1], expected.log["blocks"][1]
    assert mine["chosen"] == plain["chosen"]
    (one,), (two,) = mine["groups"], plain["groups"]
    assert one["ratio"] == two["ratio"]
    for (_, a), (_, b) in zip(one["losses"], two["losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    for name, error in mine["block_error"].items():
        assert error == pytest.approx(plain["block_error"][name], rel=5e-3)  # 300 tokens: one other tie shows
    names = [n for n in expected.shrink if "w2" not in n]  # w2 follows the scale of its pair, which is continuous
    same = torch.cat([(found.shrink[n].cpu() == expected.shrink[n]).flatten() for n in names])
    assert float(same.float().mean()) > 0.99
    assert found.log["experts"] == expected.log["experts"]
