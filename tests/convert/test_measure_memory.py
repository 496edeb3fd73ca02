"""Measuring asks for its device memory first, and holds what it says that it holds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from m3quant.api import fit
from m3quant.calibration.layers import LayerTensors, layer_spec
from m3quant.calibration.quantized_layer import QuantizedLayer, StoredWeight
from m3quant.calibration.spec import LayerSpec
from m3quant.checkpoint import Checkpoint
from m3quant.convert.device_memory import check_measuring
from m3quant.convert.measure import MeasureSettings, Measuring, measure
from m3quant.convert.measure_plan import device_bytes, pilot_recipes, probe_windows
from m3quant.errors import StoppedError
from m3quant.planning.fit import Fitting
from m3quant.planning.headers import from_config
from m3quant.planning.resources import resources
from m3quant.running.progress import Silent
from tests.convert.test_device_memory import GB, GPU, has
from tests.convert.test_measure import CANDIDATES, DATA, FEW
from tests.support.convert.common import make_source, random_windows
from tests.support.paths import DATA as CONFIGS
from tests.support.paths import ROOT


@cache
def fitting_of(model: str, windows: int = 16) -> Fitting:
    return Fitting(from_config(CONFIGS / model / "config.json"), {"windows": windows, "heldout_windows": windows})


def test_it_takes_more_than_a_conversion_and_grows_with_its_text() -> None:
    fitting, more = fitting_of("minimax-m3"), fitting_of("minimax-m3", 64)
    converting = resources(fitting.base, on_gpu=True).device
    probes, pilots = 234 * 5 * 512 * 6144 * 4, 4 * 32 * 512 * 6144 * 2  # 16 GB hold five windows of each of 234 probes
    heldout = 3 * 16 * 512 * 6144 * 4
    experts = 2 * 128 * 3 * 6144 * 3072 - 12_500_000_000
    assert device_bytes(fitting) == converting + probes + pilots + heldout + experts
    assert device_bytes(more) > device_bytes(fitting)
    sizes = [round(device_bytes(fitting_of(model)) / 1e9) for model in ("minimax-m2.7", "minimax-m3")]
    assert f"{sizes[0]} GB\nfor M2.7 and {sizes[1]} GB for M3" in (ROOT / "docs" / "fit.md").read_text(encoding="utf-8")


def test_streams_are_those_that_a_pass_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heldout, source = 4, make_source(tmp_path / "m3", "m3")
    fitting = Fitting(Checkpoint.open(source), {**DATA, "heldout_windows": heldout}, candidates=CANDIDATES)
    held = dict[str, list[int]]()

    def note(self: Measuring, text: str) -> Any:
        state = self.state
        held.update(
            exact=[state.exact.nbytes],
            probes=[probe.states.nbytes for probe in state.probes],
            pilots=[pilot.states.nbytes for pilot in state.pilots],
        )
        return SimpleNamespace()

    monkeypatch.setattr(Measuring, "_result", note)
    measure(fitting, random_windows(fitting.base), "text", MeasureSettings(), Silent())
    hidden, length = fitting.base.family.hidden_size, FEW["window_length"]
    one = length * hidden * 4  # a CPU computes in float32
    assert held["exact"] == [heldout * one] and held["pilots"] == [(3 + heldout) * one] * len(pilot_recipes(fitting))
    assert set(held["probes"]) == {probe_windows(fitting, heldout, one) * one}
    more = device_bytes(fitting) - resources(fitting.base, on_gpu=True).device
    assert more == sum(held["probes"]) + 3 * sum(held["exact"]) + sum(held["pilots"]) // 2


def test_a_gpu_without_room_is_told_with_ways_that_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = fitting_of("minimax-m3", 64)
    need = device_bytes(fitting)
    has(monkeypatch, need, need)
    check_measuring(fitting, GPU)
    check_measuring(fitting, torch.device("cpu"))
    has(monkeypatch, need - GB, need + GB)
    with pytest.raises(StoppedError, match=r"measuring takes .* end what else runs on it") as raised:
        check_measuring(fitting, GPU)
    words = str(raised.value)
    windows = int(words.partition("--windows ")[2].split()[0])
    assert f"--heldout-windows {windows}" in words and "larger GPU" not in words and "Nothing was changed" in words
    assert windows < 64 and device_bytes(fitting_of("minimax-m3", windows)) <= need - GB
    has(monkeypatch, 24 * GB, 25 * GB)
    with pytest.raises(StoppedError, match="give --device cpu, which takes far longer or take a larger GPU") as raised:
        check_measuring(fitting, GPU)
    assert "--windows" not in str(raised.value)


def test_it_is_asked_before_text_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, file = make_source(tmp_path / "m3", "m3"), tmp_path / "s.json"
    has(monkeypatch, GB // 10, 85 * GB)
    monkeypatch.setattr("m3quant.api.measuring.calibration_windows", lambda *_: pytest.fail("text was read"))
    with pytest.raises(StoppedError, match="measuring takes"):
        fit(source, measure=True, sensitivity=file, device="cuda")
    assert not file.exists()


def test_experts_are_rounded_one_after_the_other_as_all_at_once(tmp_path: Path) -> None:
    """As a GPU holds them, in stacks, and as a CPU does."""
    fitting = Fitting(Checkpoint.open(make_source(tmp_path / "m3", "m3")), DATA, candidates=CANDIDATES)
    config = fitting.checkpoint.config
    spec = layer_spec(config, fitting.base.family.num_layers - 1)
    assert spec.moe is not None
    plain, stacked, experts = layer_tensors(spec)
    weights = {}
    for name in [*experts, next(name for name in plain if name.endswith("o_proj.weight"))]:
        codes = torch.randint(-8, 8, plain[name].shape, dtype=torch.int8)
        weights[name] = StoredWeight(codes, torch.rand(len(codes), 1) + 0.5)
    rounded = cast("QuantizedLayer", SimpleNamespace(weights=weights, other={}))
    measuring = cast("Measuring", SimpleNamespace(device=torch.device("cpu")))
    x = torch.randn(2, 16, fitting.base.family.hidden_size)
    one, other = (Measuring._rounded(measuring, spec, given, rounded, torch.float32) for given in (plain, stacked))
    assert torch.equal(one.forward(x), other.forward(x))
    before = Measuring._rounded(measuring, spec, stacked, cast("QuantizedLayer", SimpleNamespace(weights={}, other={})), torch.float32)  # fmt: skip
    assert not torch.equal(one.forward(x), before.forward(x))  # and the source's stacks are as they were
    assert all(torch.equal(stacked[name], plain[name]) for name in experts)


def layer_tensors(spec: LayerSpec) -> tuple[dict[str, torch.Tensor], LayerTensors, list[str]]:
    """Random tensors of a layer, the same with experts in stacks, and the names of all experts' weights."""
    from m3quant.families.spec import STACKS, layer_shapes

    torch.manual_seed(0)
    plain = {name: torch.randn(*shape).to(torch.bfloat16) / 8 for name, shape in layer_shapes(spec).items()}
    assert spec.moe is not None
    names = {which: [spec.moe.expert_name(e, which) for e in range(spec.moe.num_experts)] for which in STACKS}
    stacks = {which: torch.stack([plain[name] for name in own]) for which, own in names.items()}
    return plain, LayerTensors(plain, stacks, spec.moe), [name for own in names.values() for name in own]
