"""The flow that a GPU takes (stacked layers, experts packed several at once, written in the background), on the CPU.

It must write the bytes of the plain flow, and survive what that survives.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from m3quant.calibration.boundary import Streams
from m3quant.calibration.layers import layer_spec
from m3quant.calibration.stream import read_layer
from m3quant.checkpoint import Checkpoint, ShardRecord
from m3quant.convert import calibrated, expert_stacks, layer_writer
from m3quant.convert.device_layers import DeviceLoader
from m3quant.convert.device_warm_up import TOKENS, WarmUp, pass_once
from m3quant.errors import CheckpointError, StoppedError
from m3quant.quant.reading import SourceReader
from m3quant.running.progress import Silent
from tests.support.convert.common import config_of, make_plan_of, make_source, rewrite, run_plan, same_output, stored
from tests.support.convert.sources import quantized_source

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrated, "stacked_on", lambda device: True)
    monkeypatch.setattr(expert_stacks, "_ELEMENTS", 100_000)  # three experts of the tiny layers at once


@pytest.mark.parametrize("format", ["compressed-tensors", "autoawq"])
@pytest.mark.parametrize("family", ["m2", "m3"])
def test_the_bytes_are_those_of_the_plain_flow(
    tmp_path: Path, family: str, format: str, request: pytest.FixtureRequest
) -> None:
    if family == "m3" and format == "autoawq":
        pytest.skip("vLLM has no AutoAWQ loader for M3, so no recipe may ask for it")
    recipe: dict[str, Any] = {} if format == "compressed-tensors" else {"schemes": {"routed_experts": "int4-g128"}}
    plan = make_plan_of(make_source(tmp_path / "src", family), "awq", format=format, **recipe)
    run_plan(plan, tmp_path / "plain")
    request.getfixturevalue("stacked")
    run_plan(plan, tmp_path / "stacked")
    assert same_output(tmp_path / "plain", tmp_path / "stacked") == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "kind"), [("m2", None), ("m3", None), ("m2", "fp8"), ("m3", "mxfp8")])
def test_a_layer_loads_as_it_is_read(tmp_path: Path, family: str, kind: str | None, device: str) -> None:
    source = make_source(tmp_path / "src", family)
    if kind:
        source, _ = quantized_source(source, tmp_path / "quantized", kind, scales_apart=True)
    reader = SourceReader(Checkpoint.open(source))
    with DeviceLoader(reader, torch.device(device)) as loader:
        for index in range(2):
            loaded, expected = loader.load(layer_spec(reader.config, index)), read_layer(reader, index)
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(loaded[name].cpu(), expected[name]) for name in expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_among_fp8_experts_is_told_by_tensor(tmp_path: Path, device: str) -> None:
    source, _ = quantized_source(make_source(tmp_path / "src", "m2"), tmp_path / "quantized", "fp8")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    tensors = stored(source)
    tensors[name].view(torch.uint8)[-1, -1] = 0x7F
    reader = SourceReader(Checkpoint.open(rewrite(tmp_path / "bad", tensors, config_of(source))))
    with DeviceLoader(reader, torch.device(device)) as loader:
        loader.load(layer_spec(reader.config, 0))
        with pytest.raises(CheckpointError, match=rf"NaN/Inf in {name}: 1 of"):
            loader.load(layer_spec(reader.config, 1))


def test_a_failure_behind_the_search_stops_the_run_and_the_same_command_continues(
    tmp_path: Path, stacked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer's streams cannot be saved: nothing of it is journalled, though the second is already under way."""
    plan = make_plan_of(make_source(tmp_path / "src", "m2"), "awq")
    run_plan(plan, tmp_path / "whole")
    save = Streams.save

    def full(self: Streams, stem: Path) -> None:
        raise StoppedError("hidden states cannot be saved: No space left on device.")

    monkeypatch.setattr(Streams, "save", full)
    with pytest.raises(StoppedError, match="hidden states cannot be saved"):
        run_plan(plan, tmp_path / "out", boundary_every=1)
    assert not list((tmp_path / "out").glob(".*.tmp")), "the layer in progress was left behind"
    monkeypatch.setattr(Streams, "save", save)
    progress = Silent()
    run_plan(plan, tmp_path / "out", progress=progress, boundary_every=1)
    assert any(line.startswith("continuing: 1 of 3") for line in progress.lines)
    assert same_output(tmp_path / "whole", tmp_path / "out") == []


def test_a_layer_that_cannot_be_written_leaves_no_shard(
    tmp_path: Path, stacked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m2"), "awq")

    class Full(layer_writer.UnitWriter):
        def close(self) -> ShardRecord:
            raise StoppedError("disk full")

    monkeypatch.setattr(layer_writer, "UnitWriter", Full)
    with pytest.raises(StoppedError, match="disk full"):
        run_plan(plan, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name != ".m3quant") == [plan.units[0].shard]


@pytest.mark.parametrize("family", ["m2", "m3"])
def test_what_warms_a_gpu_up_is_a_pass_through_a_layer_of_every_kind(family: str, tmp_path: Path) -> None:
    config = json.loads((make_source(tmp_path / "src", family) / "config.json").read_text())
    layers = config.get("text_config", config)["num_hidden_layers"]
    for index in range(layers):
        spec = layer_spec(config, index)
        assert pass_once(spec, torch.device("cpu")).shape == (1, TOKENS, spec.hidden_size)


def test_a_warm_up_that_fails_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[object] = []
    monkeypatch.setattr("threading.excepthook", seen.append)

    def fail(self: WarmUp, spec: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(WarmUp, "_run", fail)
    config = json.loads((make_source(tmp_path / "src", "m2") / "config.json").read_text())
    WarmUp([], layer_spec(config, 0), torch.device("cpu")).close()
    assert not seen and not capfd.readouterr().err
