"""One layer through the quantizer: better than rounding, complete, reproducible; bad input has a stated fallback."""

import json
from typing import Any

import pytest
import torch

from m3quant.calibration.feedback import mlp, rows
from m3quant.calibration.feedback.quantizer import FeedbackQuantizer
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.folds import MLP_NORM
from m3quant.calibration.layers import Layer
from m3quant.calibration.quantized_layer import QuantizedLayer
from m3quant.calibration.ranges import fake_quantize
from m3quant.calibration.spec import LayerSpec
from m3quant.calibration.stream import HiddenStates
from m3quant.quant.formats import round_trip
from m3quant.schemes import Scheme
from tests.support.calibration.planted import Tensors, linears, salient
from tests.support.calibration.planted import tiny_layer as whole_layer

CASES = {"m2": ("m2", 1), "m3-dense": ("m3", 0), "m3-sparse": ("m3", 1)}
FAST = FeedbackSettings(rounds=1)
SWEEP = FeedbackSettings(rounds=0)
INT4, FP8 = Scheme("int", 4, 128), Scheme("fp8", 8)
BIAS = "block_sparse_moe.e_score_correction_bias"


def tiny_layer(family: str, index: int) -> tuple[LayerSpec, Tensors]:
    """One layer with six experts, of which a token is sent to two."""
    return whole_layer(family, index, num_local_experts=6, num_experts_per_tok=2)


def mixed(tensors: Tensors) -> dict[str, Scheme]:
    """INT4 experts, FP8 around them."""
    return {name: INT4 if ".experts." in name else FP8 for name in linears(tensors)}


def streams(windows: int = 4, length: int = 288) -> tuple[HiddenStates, HiddenStates]:
    """(quantized, source): the same states, the first a little off."""
    source = salient(windows, length, 256)
    return HiddenStates(source + 0.02 * salient(windows, length, 256, seed=1)), HiddenStates(source)


def quantize(
    spec: LayerSpec,
    tensors: Tensors,
    schemes: dict[str, Scheme],
    x: Any = None,
    settings: FeedbackSettings = FAST,
    **more: Any,
) -> QuantizedLayer:
    quantized, source = x or streams()
    return FeedbackQuantizer().quantize(spec, tensors, schemes, quantized, source, settings, **more)


def output(spec: LayerSpec, tensors: Tensors, changed: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return Layer(spec, {**tensors, **changed}).forward(x)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[LayerSpec, Tensors, QuantizedLayer]:
    spec, tensors = tiny_layer(*CASES[request.param])
    return spec, tensors, quantize(spec, tensors, mixed(tensors))


def test_the_layer_loses_less_than_by_rounding(case: tuple[LayerSpec, Tensors, QuantizedLayer]) -> None:
    """On windows that took no part, against the source's own output from the source's stream."""
    spec, tensors, found = case
    schemes = mixed(tensors)
    assert set(found.weights) == set(schemes)
    rounded = {
        name: fake_quantize(tensors[name].float(), s)
        if s.kind == "int"
        else round_trip(tensors[name].float(), s, name=name)
        for name, s in schemes.items()
    }
    stored = {name: weight.dequantized() for name, weight in found.weights.items()}
    source = salient(6, 288, 256)[4:]
    off = source + 0.02 * salient(6, 288, 256, seed=1)[4:]
    wanted = output(spec, tensors, {}, source)
    errors = [float((output(spec, tensors, changed, off) - wanted).square().sum()) for changed in (rounded, stored)]
    assert errors[1] < 0.9 * errors[0]


def test_what_is_logged_is_json_and_complete(case: tuple[LayerSpec, Tensors, QuantizedLayer]) -> None:
    spec, tensors, found = case
    assert json.loads(json.dumps(found.log)) == found.log
    assert {name for block in found.log["blocks"] for name in block["weights"]} == set(mixed(tensors))
    for block in found.log["blocks"]:
        assert block["block_error"]["feedback"] < block["block_error"]["round_to_nearest"]
    assert (found.ledger is None) == (spec.moe is None) and found.other == {}


def test_the_layer_is_left_with_the_sources_weights() -> None:
    spec, tensors = tiny_layer("m3", 1)
    layer = Layer(spec, tensors)
    quantize(spec, tensors, mixed(tensors), streams(1, 64), SWEEP, layer=layer)
    assert all(torch.equal(layer.weight(name), tensors[name]) for name in linears(tensors))


def same(one: QuantizedLayer, other: QuantizedLayer) -> bool:
    return all(
        torch.equal(weight.codes.view(torch.uint8), other.weights[name].codes.view(torch.uint8))
        and torch.equal(weight.scale, other.weights[name].scale)
        for name, weight in one.weights.items()
    )


@pytest.mark.parametrize("name", ["m2", "m3-sparse"])
def test_a_second_run_in_other_chunks_gives_the_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, tensors = tiny_layer(*CASES[name])
    x = streams(2, 96)
    whole = quantize(spec, tensors, mixed(tensors), x, FAST)
    monkeypatch.setitem(mlp._CHUNK_BYTES, "cpu", 1)
    chunked = quantize(spec, tensors, mixed(tensors), x, FAST)
    assert same(whole, chunked)
    assert [b.get("weights") for b in chunked.log["blocks"]] == [b.get("weights") for b in whole.log["blocks"]]


def test_rows_of_many_experts_in_one_block_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a block holds the rows of as many experts as fit."""
    spec, tensors = tiny_layer("m3", 1)
    tensors[BIAS] = tensors[BIAS].clone()
    tensors[BIAS][2] = -100.0  # an expert without routed rows
    x, settings = streams(2, 96), FeedbackSettings(rounds=0, min_expert_tokens=4)
    apart = quantize(spec, tensors, mixed(tensors), x, settings)
    monkeypatch.setitem(rows._BLOCK_ROWS, "cpu", 100)
    together = quantize(spec, tensors, mixed(tensors), x, settings)
    assert same(apart, together)


def test_errors_of_the_stream_are_made_good_only_where_asked_for() -> None:
    spec, tensors = tiny_layer("m2", 1)
    wanted = output(spec, tensors, {}, streams()[1].read(slice(None)))
    errors = {}
    for targets, residual in ((True, True), (False, False)):
        settings = FeedbackSettings(rounds=0, source_targets=targets, residual=residual)
        found = quantize(spec, tensors, mixed(tensors), settings=settings)
        stored = {name: weight.dequantized() for name, weight in found.weights.items()}
        errors[targets] = float((output(spec, tensors, stored, streams()[0].read(slice(None))) - wanted).square().sum())
    assert errors[True] < errors[False]


@pytest.mark.parametrize("keep", ["w1", "w2", "o_proj", "experts", "shared"])
def test_what_is_kept_stays_out(keep: str) -> None:
    spec, tensors = tiny_layer("m3", 1)
    schemes = {
        name: scheme for name, scheme in mixed(tensors).items() if keep not in name.replace("shared_experts", "shared")
    }
    found = quantize(spec, tensors, schemes, streams(1, 128), SWEEP)
    assert set(found.weights) == set(schemes) and len(schemes) < len(mixed(tensors))


def test_nothing_to_quantize_is_said() -> None:
    spec, tensors = tiny_layer("m3", 0)
    found = quantize(spec, tensors, {}, streams(1, 64))
    assert found.weights == {} and [block["chosen"] for block in found.log["blocks"]] == ["unquantized"] * 2


def notes(found: QuantizedLayer, part: str) -> list[str]:
    """What is noted of the weights whose name holds `part`."""
    return [
        note
        for block in found.log["blocks"]
        for name, weight in block["weights"].items()
        if part in name
        for note in weight.get("notes", [])
    ]


def finite(found: QuantizedLayer) -> bool:
    return all(bool(torch.isfinite(weight.dequantized()).all()) for weight in found.weights.values())


def test_an_expert_without_a_row_is_rounded_and_named() -> None:
    spec, tensors = tiny_layer("m2", 1)
    tensors[BIAS] = tensors[BIAS].clone()
    tensors[BIAS][3] = -100.0
    found = quantize(spec, tensors, mixed(tensors), streams(2, 64), FeedbackSettings(rounds=0, min_expert_tokens=0))
    assert finite(found) and found.ledger is not None and found.ledger.natural[3] == 0
    own = notes(found, "experts.3.")
    assert sum("no rows: the layer's moment was used" in note for note in own) == 2
    assert sum("no rows: all input channels were taken to be alike" in note for note in own) == 1
    assert sum("rounded to nearest" in note for note in own) == 3
    assert not any("no rows" in note for note in notes(found, "experts.4."))


def test_a_channel_that_is_always_zero_is_named() -> None:
    spec, tensors = tiny_layer("m2", 1)
    tensors[MLP_NORM] = tensors[MLP_NORM].clone()
    tensors[MLP_NORM][17] = 0
    found = quantize(spec, tensors, mixed(tensors), streams(2, 64), SWEEP)
    assert finite(found) and "1 input channels are always zero" in notes(found, "experts.0.w1")


def test_fewer_rows_than_columns_are_enough() -> None:
    spec, tensors = tiny_layer("m2", 1)
    found = quantize(spec, tensors, mixed(tensors), streams(1, 24), FeedbackSettings(rounds=0, min_expert_tokens=4))
    assert finite(found) and set(found.weights) == set(mixed(tensors))


def test_activations_beyond_float32_are_left_out_and_counted() -> None:
    """Some tokens' hidden states overflow inside the experts' GLU; the others are calibrated on."""
    spec, tensors = tiny_layer("m2", 1)
    name = "block_sparse_moe.experts.{}.{}.weight"
    for expert in range(spec.moe.num_experts if spec.moe else 0):
        for which in ("w1", "w3"):
            tensors[name.format(expert, which)] = tensors[name.format(expert, which)].clone()
            tensors[name.format(expert, which)][5] = 3e19  # w1 x times w3 x is beyond 3.4e38
    found = quantize(spec, tensors, mixed(tensors), streams(2, 64), SWEEP)
    assert finite(found)
    assert any("not finite" in note or "exceed float32" in note for note in notes(found, "w2"))


def test_large_moments_overflow_into_a_stated_fallback() -> None:
    spec, tensors = tiny_layer("m2", 1)
    tensors[MLP_NORM] = torch.full_like(tensors[MLP_NORM], 3e19)
    found = quantize(spec, tensors, mixed(tensors), streams(2, 64), SWEEP)
    assert finite(found) and any(
        "exceed float32" in note or "not finite" in note for note in notes(found, "experts.0.")
    )
