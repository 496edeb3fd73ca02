"""Calibrating a layer: what is stored is better than rounding to nearest, is what the log says, and is reproducible."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from m3quant.calibration.awq import CalibratedLayer, calibrate_layer
from m3quant.calibration.awq_settings import AwqSettings
from m3quant.calibration.folds import ATTENTION_NORM, MLP_NORM, all_groups
from m3quant.calibration.layers import Layer
from m3quant.calibration.ops import gated
from m3quant.calibration.spec import LayerSpec
from m3quant.calibration.stream import HiddenStates
from m3quant.errors import CalibrationError
from m3quant.quant.integer import fake_quantize
from m3quant.schemes import Scheme, parse_scheme
from tests.support.calibration.planted import Tensors, all_int, linears, salient, tiny_layer

ROUTER = "block_sparse_moe.gate.weight"

BIAS = "block_sparse_moe.e_score_correction_bias"
FAST = AwqSettings(n_grid=6)
CASES = {"m2": ("m2", 1), "m3-dense": ("m3", 0), "m3-sparse": ("m3", 1)}


def inputs(windows: int = 4, length: int = 320) -> torch.Tensor:
    """Hidden states whose third block makes M3's indexer choose (two blocks of 128)."""
    return salient(windows, length, 256)


def calibrate(
    family: str, index: int, scheme: str = "int4-g128", settings: AwqSettings = FAST, windows: int = 2
) -> tuple[LayerSpec, Tensors, CalibratedLayer]:
    spec, tensors = tiny_layer(family, index)
    return spec, tensors, calibrate_layer(spec, tensors, all_int(tensors, scheme), inputs(windows), settings)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[LayerSpec, Tensors, CalibratedLayer]:
    return calibrate(*CASES[request.param], windows=4)


def stored_layer(spec: LayerSpec, tensors: Tensors, result: CalibratedLayer) -> Layer:
    """The layer as an engine would load it: dequantized integers, changed tensors, everything else as it was."""
    stored: dict[str, torch.Tensor] = dict(tensors) | result.other
    stored |= {name: result.dequantized(name) for name, scheme in result.schemes.items() if scheme.kind == "int"}
    return Layer(spec, stored)


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    return float((output.double() - reference.double()).square().sum() / reference.double().square().sum())


def test_the_stored_layer_has_the_errors_that_the_log_says(case: tuple[LayerSpec, Tensors, CalibratedLayer]) -> None:
    spec, tensors, result = case
    source, stored = Layer(spec, tensors), stored_layer(spec, tensors, result)
    attention, mlp = result.log["blocks"]
    x = inputs()
    reference, output = (layer.attention(layer.attention_input(x)) for layer in (source, stored))
    assert relative_error(output, reference) == pytest.approx(attention["block_error"][attention["chosen"]], rel=1e-2)
    x = x + output
    reference, output = (layer.mlp(layer.mlp_input(x)) for layer in (source, stored))
    assert relative_error(output, reference) == pytest.approx(mlp["block_error"][mlp["chosen"]], rel=1e-2)
    if spec.moe:
        chosen = [layer.routing(layer.mlp_input(x)).experts.sort(dim=1).values for layer in (source, stored)]
        assert torch.equal(*chosen)


def test_salient_channels_make_ranges_and_folds_pay(case: tuple[LayerSpec, Tensors, CalibratedLayer]) -> None:
    for block in case[2].log["blocks"]:
        errors = block["block_error"]
        assert block["chosen"] == "folds_and_ranges"
        assert errors["folds_and_ranges"] < errors["ranges"] < errors["round_to_nearest"]
        assert errors["folds_and_ranges"] < 0.65 * errors["round_to_nearest"]
        (group,) = block["groups"]
        assert group["accepted"] and group["chosen_loss"] < group["identity_loss"]
        assert group["chosen_loss"] == min(loss for _, loss in group["losses"])
        assert block["ranges"]["gain"] > 0.1 and 0.5 <= block["ranges"]["mean_shrink"] < 1.0


def test_what_a_fold_changes_is_complete(case: tuple[LayerSpec, Tensors, CalibratedLayer]) -> None:
    spec, tensors, result = case
    assert set(result.other) == {ATTENTION_NORM, MLP_NORM} | ({ROUTER} if spec.moe else set())
    assert all(result.other[name].dtype == tensors[name].dtype for name in result.other)
    assert {name for group in all_groups(spec) for name in group.readers} <= set(result.column)
    if spec.activation.kind == "silu":
        downs = {n for n in result.column if n.endswith("w2.weight")}
        assert downs and set(result.row) == {n.replace("w2", "w3") for n in downs}
        assert result.log["blocks"][1]["pair"]["accepted"] == len(downs)
    else:
        assert result.row == {} and "pair" not in result.log["blocks"][1]


def test_weights_are_folded_source_weights(case: tuple[LayerSpec, Tensors, CalibratedLayer]) -> None:
    _, tensors, result = case
    for name in linears(tensors):
        expected = tensors[name].float()
        expected = expected * result.column[name] if name in result.column else expected
        expected = expected / result.row[name][:, None] if name in result.row else expected
        assert torch.equal(result.weight(name), expected)
        scale, zero_point = result.qparams(name)
        assert torch.equal(scale, scale.bfloat16().float()) and bool((scale != 0).all()) and zero_point is None


def test_the_log_and_the_ledger_are_json(case: tuple[LayerSpec, Tensors, CalibratedLayer]) -> None:
    spec, _, result = case
    assert json.loads(json.dumps(result.log)) == result.log
    assert (result.ledger is None) == (spec.moe is None)
    if result.ledger:
        assert json.loads(json.dumps(result.ledger.to_json()))["layer"] == spec.index
        assert result.log["experts"]["tokens"] == 4 * 320


def test_the_same_input_gives_the_same_bytes(case: tuple[LayerSpec, Tensors, CalibratedLayer], tmp_path: Path) -> None:
    """A second run, reading its hidden states from a file as a resumed one does."""
    spec, tensors, first = case
    x = inputs()
    with HiddenStates.empty((x.shape[0], x.shape[1], x.shape[2]), spill=tmp_path / "x.states") as states:
        states.write(slice(0, len(x)), x)
        second = calibrate_layer(spec, tensors, all_int(tensors), states, FAST)
    for name in linears(tensors):
        assert torch.equal(first.weight(name), second.weight(name))
        assert torch.equal(first.qparams(name)[0], second.qparams(name)[0])
    assert all(torch.equal(first.other[n], second.other[n]) for n in first.other)
    assert first.log | {"seconds": 0} == second.log | {"seconds": 0}


def on_the_grid(tensors: Tensors) -> Tensors:
    """Every linear replaced by one that asymmetric int4 in groups of 32 stores without any error."""
    generator, out = torch.Generator().manual_seed(0), dict(tensors)
    for name in linears(tensors):
        codes = torch.randint(-8, 8, tensors[name].shape, generator=generator)
        codes[:, ::32], codes[:, 1::32] = -8, 7
        out[name] = (codes / 64).bfloat16()
    return out


@pytest.mark.parametrize(("family", "index"), CASES.values(), ids=CASES)
def test_identity_is_kept_when_nothing_helps(family: str, index: int) -> None:
    spec, tensors = tiny_layer(family, index)
    tensors = on_the_grid(tensors)
    result = calibrate_layer(spec, tensors, all_int(tensors, "int4-g32-asym"), inputs(1), FAST)
    for block in result.log["blocks"]:
        assert block["chosen"] == "round_to_nearest"
        assert [group["ratio"] for group in block["groups"]] == [None]
        assert [group["accepted"] for group in block["groups"]] == [False]
        assert block["block_error"]["round_to_nearest"] < 1e-12
    assert result.other == result.column == result.row == result.shrink == {}


def test_the_loss_is_the_plain_one_in_float64() -> None:
    spec, tensors = tiny_layer("m3", 1)
    assert spec.moe is not None
    schemes, settings = all_int(tensors), AwqSettings(n_grid=2, range_search=False, search_tokens=40)
    x = inputs(2, 64)
    result = calibrate_layer(spec, tensors, schemes, x, settings)
    layer = stored_layer(spec, tensors, result)  # for the attention that feeds the block
    x = x + layer.attention(layer.attention_input(x))
    source = Layer(spec, tensors)
    h = source.mlp_input(x).flatten(0, 1)
    routing = source.routing(h)
    tokens = settings.split(len(h), 40, spec.index, purpose=1)[0]

    def output(token: int, names: tuple[str, str, str], rounded: bool) -> torch.Tensor:
        gate, up, down = (tensors[name].double() for name in names)
        if rounded:
            gate, up = (fake_quantize(tensors[name], schemes[name]).double() for name in names[:2])
        row = h[token].double()
        return down @ gated(gate @ row, up @ row, spec.activation)

    loss = 0.0
    shared = tuple(f"block_sparse_moe.shared_experts.{n}_proj.weight" for n in ("gate", "up", "down"))
    for token in tokens.tolist():
        error = torch.zeros(256, dtype=torch.float64)
        for expert, weight in zip(routing.experts[token].tolist(), routing.weights[token].tolist(), strict=True):
            names = tuple(f"block_sparse_moe.experts.{expert}.{n}.weight" for n in ("w1", "w3", "w2"))
            error += weight * (output(token, names, True) - output(token, names, False))
        error += output(token, shared, True) - output(token, shared, False)
        loss += float(error.square().sum())
    (group,) = result.log["blocks"][1]["groups"]
    assert group["identity_loss"] == pytest.approx(loss, rel=1e-4)


def test_kept_and_fp8_readers_follow_the_fold() -> None:
    spec, tensors = tiny_layer("m3", 1)
    schemes: dict[str, Scheme] = {n: s for n, s in all_int(tensors).items() if ".experts." in n}
    kept, fp8 = (f"block_sparse_moe.shared_experts.{n}_proj.weight" for n in ("gate", "up"))
    schemes[fp8] = parse_scheme("fp8-channel")
    result = calibrate_layer(spec, tensors, schemes, inputs(), FAST)
    attention, mlp = result.log["blocks"]
    assert attention["chosen"] == "unquantized" and mlp["chosen"] == "folds_and_ranges"
    assert set(result.other) == {MLP_NORM, ROUTER, kept}
    assert result.log["rounded_readers"] == [kept]
    assert result.other[kept].dtype == torch.bfloat16 and result.other[ROUTER].dtype == torch.float32
    assert torch.equal(result.weight(fp8), tensors[fp8].float() * result.column[fp8])
    with pytest.raises(CalibrationError, match="fp8-channel, which has no integer scale"):
        result.qparams(fp8)
    stored = dict(tensors) | result.other | {fp8: result.weight(fp8)}
    stored |= {n: result.weight(n) for n, scheme in schemes.items() if scheme.kind == "int"}
    x = inputs()
    source, folded = Layer(spec, tensors), Layer(spec, stored)
    reference, output = (layer.mlp(layer.mlp_input(x)) for layer in (source, folded))
    assert relative_error(output, reference) < 1e-5  # one BF16 rounding of the kept reader, about (2^-9)^2


def test_nothing_to_calibrate_leaves_everything_as_it_was() -> None:
    spec, tensors = tiny_layer("m3", 1)
    schemes = {n: parse_scheme("fp8-channel") for n in linears(tensors)}
    result = calibrate_layer(spec, tensors, schemes, inputs(1), FAST)
    assert [block["chosen"] for block in result.log["blocks"]] == ["unquantized", "unquantized"]
    assert result.other == result.column == result.row == result.shrink == {}
    assert result.ledger is not None and sum(result.ledger.natural) == 320 * 2


@pytest.mark.parametrize("scheme", ["int4-g32-asym", "int4-channel", "int8-g128"])
def test_every_integer_scheme_gains(scheme: str) -> None:
    _, _, result = calibrate("m3", 1, scheme)
    for block in result.log["blocks"]:
        assert block["block_error"][block["chosen"]] < 0.85 * block["block_error"]["round_to_nearest"]


def test_scales_are_exact_in_the_dtype_they_are_stored_in() -> None:
    settings = AwqSettings(n_grid=2, scale_dtype=torch.float16)
    _, tensors, result = calibrate("m3", 0, "int4-g64-asym", settings)
    for name in linears(tensors):
        scale, zero_point = result.qparams(name)
        assert torch.equal(scale, scale.half().float())
        assert zero_point is not None and zero_point.dtype == torch.int8


def test_searches_can_be_switched_off() -> None:
    _, _, ranges_only = calibrate("m2", 1, settings=AwqSettings(smooth=False))
    assert ranges_only.column == ranges_only.row == ranges_only.other == {} and ranges_only.shrink
    _, _, folds_only = calibrate("m2", 1, settings=AwqSettings(range_search=False, n_grid=4))
    assert folds_only.column and folds_only.shrink == {}
    _, _, neither = calibrate("m2", 1, settings=AwqSettings(range_search=False, smooth=False))
    assert [block["chosen"] for block in neither.log["blocks"]] == ["round_to_nearest"] * 2


def starved(settings: AwqSettings) -> tuple[Tensors, CalibratedLayer]:
    """An M2 layer whose experts 2 and 5 are never chosen."""
    spec, tensors = tiny_layer("m2", 1)
    tensors[BIAS] = tensors[BIAS].clone()
    tensors[BIAS][[2, 5]] = -10.0
    return tensors, calibrate_layer(spec, tensors, all_int(tensors), inputs(2, 128), settings)


def test_starved_experts_are_topped_up_listed_and_still_searched() -> None:
    _, result = starved(AwqSettings(n_grid=2, min_expert_tokens=24))
    assert result.ledger is not None
    assert result.ledger.starved == [2, 5] == result.log["experts"]["starved"]
    assert result.ledger.topped_up[2] == result.ledger.topped_up[5] == 24
    assert result.log["experts"]["zero_natural"] == 2 and result.log["experts"]["tokens_added"] == 48
    for which in ("w1", "w2", "w3"):
        shrink = result.shrink[f"block_sparse_moe.experts.2.{which}.weight"]
        assert 0.5 < float(shrink.abs().mean()) < 1.0


def test_an_expert_without_any_token_is_searched_by_its_weights() -> None:
    tensors, result = starved(AwqSettings(n_grid=2, min_expert_tokens=0))
    assert result.ledger is not None and result.ledger.natural[2] == 0 and result.ledger.starved == []
    assert all(bool(torch.isfinite(result.qparams(name)[0]).all()) for name in linears(tensors))


def test_strict_coverage_refuses() -> None:
    with pytest.raises(CalibrationError, match=r"layer 1: 2 of 16 experts .* 2 \(0\), 5 \(0\)"):
        starved(AwqSettings(strict_coverage=True, min_expert_tokens=8))


@pytest.mark.parametrize("name", ["self_attn.o_proj.weight", "block_sparse_moe.experts.3.w2.weight", MLP_NORM, ROUTER])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_weight_is_named(name: str, value: float) -> None:
    spec, tensors = tiny_layer("m2", 1)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[7] = value
    with pytest.raises(CalibrationError, match=rf"layer 1: {name.replace('.', '[.]')} holds 1 NaN or Inf"):
        calibrate_layer(spec, tensors, all_int(tensors), inputs(1, 64), FAST)


@pytest.mark.parametrize("attention", ["int4-g128", "keep"])
def test_a_bad_activation_is_named(attention: str) -> None:
    spec, tensors = tiny_layer("m2", 1)
    schemes: dict[str, Any] = {
        n: parse_scheme(attention) if "self_attn" in n else s for n, s in all_int(tensors).items()
    }
    x = inputs(1, 64)
    x[0, 3, 5] = float("inf")
    with pytest.raises(CalibrationError, match=r"layer 1: the input of the .* block holds"):
        calibrate_layer(spec, tensors, schemes, x, FAST)
