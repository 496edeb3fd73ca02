"""The measuring pass against plain forward passes of whole models, and against a conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from m3quant.calibration.head import compare_heads
from m3quant.calibration.layers import Layer, layer_spec
from m3quant.calibration.quantizers import layer_quantizer
from m3quant.calibration.ranks import ALONE
from m3quant.calibration.stream import HiddenStates, embed_source, read_head, read_layer
from m3quant.checkpoint import Checkpoint
from m3quant.convert.measure import MeasureSettings, measure
from m3quant.errors import CalibrationError
from m3quant.planning.fit import Fitting
from m3quant.planning.plan import make_plan
from m3quant.planning.sensitivity import Sensitivity, load_sensitivity
from m3quant.quant.reading import SourceReader
from m3quant.recipe.recipe import build_recipe
from m3quant.running.progress import Silent
from tests.support.convert.common import FEW, make_source, random_windows, run_plan

DATA = {**FEW, "windows": 3, "heldout_windows": 2}
CANDIDATES = {
    "routed_experts": ("int2-g128-asym", "int4-g128"),
    "attention": ("int8-g128",),
    "shared_experts": ("int8-g128",),
    "dense_mlp": ("int4-g128", "int8-g128"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fitting, Any, Any]:
    """(fitting, windows, what was measured) of a tiny random checkpoint: a dense layer and one with experts."""
    source = make_source(tmp_path_factory.mktemp("source") / "m3", "m3")
    fitting = Fitting(Checkpoint.open(source), DATA, candidates=CANDIDATES)
    windows = random_windows(fitting.base)
    return fitting, windows, measure(fitting, windows, "text", MeasureSettings(), Silent())


def changed_layer(fitting: Fitting, windows: Any, index: int, role: str, scheme: str) -> tuple[Layer, torch.Tensor]:
    """The layer with one role quantized, and the source's hidden states as they enter it."""
    reader = SourceReader(fitting.base.checkpoint, fitting.base.sources)
    recipe = build_recipe({"rounding": "feedback", "schemes": {role: scheme}, "data": DATA})
    plan = make_plan(fitting.checkpoint, recipe)
    config, prefix = plan.checkpoint.config, plan.family.layer_prefix(index)
    x = embed_source(reader, torch.from_numpy(windows.ids), torch.float32).read(slice(None))
    for before in range(index):
        x = Layer(layer_spec(config, before), read_layer(reader, before)).forward(x)
    spec, tensors = layer_spec(config, index), read_layer(reader, index)
    schemes = {t.name.removeprefix(prefix): t.scheme for t in plan.units[index + 1].tensors if t.action == "quantize"}
    quantizer, settings = layer_quantizer(recipe, torch.bfloat16, False, ALONE)
    rows = HiddenStates(x[: DATA["windows"]])
    found = quantizer.quantize(spec, tensors, schemes, rows, rows, settings)
    for name, weight in found.weights.items():
        tensors[name] = weight.dequantized().to(torch.bfloat16)
    return Layer(spec, tensors), x


def test_errors_and_probes_are_those_of_whole_models(measured: tuple[Fitting, Any, Sensitivity]) -> None:
    fitting, windows, found = measured
    reader = SourceReader(fitting.base.checkpoint, fitting.base.sources)
    config = fitting.checkpoint.config
    last = fitting.base.family.num_layers
    index, first = last - 2, DATA["windows"]
    role = "routed_experts" if "routed_experts" in found.layers[index].candidates else "dense_mlp"
    changed, x = changed_layer(fitting, windows, index, role, "int4-g128")
    plain = Layer(layer_spec(config, index), read_layer(reader, index))
    right, wrong = plain.forward(x[first:]), changed.forward(x[first:])
    error = float((wrong - right).double().square().sum() / right.double().square().sum())
    layer = found.layers[index]
    assert layer.candidates[role]["int4-g128"].error == pytest.approx(error, rel=1e-4)
    for after in range(index + 1, last):
        plain = Layer(layer_spec(config, after), read_layer(reader, after))
        right, wrong = plain.forward(right), plain.forward(wrong)
    head, tokens = read_head(reader), torch.from_numpy(windows.ids)[first:]
    kl = compare_heads(head, head, HiddenStates(right), HiddenStates(wrong), tokens).kl.double().mean().item()
    probe = next(p for p in layer.probes[role] if p.scheme == "int4-g128")
    assert probe.kl == pytest.approx(kl, rel=1e-3) and kl > 0
    left = 1.0 if role == "routed_experts" else found.others_left
    assert layer.candidates[role]["int4-g128"].kl == pytest.approx(probe.kl * left)


def test_a_pilot_is_a_conversion(measured: tuple[Fitting, Any, Sensitivity], tmp_path: Path) -> None:
    fitting, _, found = measured
    pilot = found.pilots[0]
    assert pilot.layers[-1]["routed_experts"] == "int2-g128-asym"
    plan = make_plan(fitting.checkpoint, fitting.recipe_of(pilot.layers))
    manifest = run_plan(plan, tmp_path / "out")
    assert pilot.kl == pytest.approx(manifest["heldout"]["kl_mean"], rel=1e-3)


def test_everything_is_measured_and_read_back(measured: tuple[Fitting, Any, Sensitivity], tmp_path: Path) -> None:
    fitting, _, found = measured
    for layer, own in zip(found.layers, fitting.choices.candidates, strict=True):
        assert {role: list(names) for role, names in own.items()} == {r: list(c) for r, c in layer.candidates.items()}
        for errors in layer.candidates.values():
            by_bits = [candidate.error for candidate in errors.values()]
            assert by_bits == sorted(by_bits, reverse=True) and by_bits[-1] > 0
    path = tmp_path / "sensitivity.json"
    path.write_bytes(found.dump())
    assert load_sensitivity(path) == found
    assert "/" not in json.loads(found.dump())["text"]["source"]


def test_measuring_needs_held_out_windows(tmp_path: Path) -> None:
    source = make_source(tmp_path / "m2", "m2")
    fitting = Fitting(Checkpoint.open(source), {**DATA, "heldout_windows": 0})
    with pytest.raises(CalibrationError, match="heldout_windows"):
        measure(fitting, random_windows(fitting.base), "text", MeasureSettings(), Silent())


class Stopping(Silent):
    """A progress that kills the run within its second layer."""

    def advance(self, count: int) -> None:
        super().advance(count)
        if self.lines[-1].startswith("layer 0"):
            raise KeyboardInterrupt


def test_a_killed_pass_goes_on_to_the_same_numbers(measured: tuple[Fitting, Any, Sensitivity], tmp_path: Path) -> None:
    fitting, windows, found = measured
    folder = tmp_path / "sensitivity.json.partial"
    with pytest.raises(KeyboardInterrupt):
        measure(fitting, windows, "text", MeasureSettings(save_seconds=0), Stopping(), folder)
    assert (folder / "state.json").exists()
    progress = Silent()
    again = measure(fitting, windows, "text", MeasureSettings(), progress, folder)
    assert again == found and not folder.exists()
    assert "continuing after layer 0" in progress.lines[1] and progress.done == progress.total
