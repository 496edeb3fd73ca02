"""Measuring a checkpoint on the Hub: what a folder gives, within the disk that was given, continued after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from m3quant.checkpoint import Checkpoint
from m3quant.checkpoint.shard_plan import plan_shards
from m3quant.convert.measure import MeasureSettings, Measuring, measure
from m3quant.errors import OptionError, StoppedError
from m3quant.planning.fit import Fitting
from m3quant.planning.sensitivity import Sensitivity
from m3quant.planning.streaming import layer_steps
from m3quant.running.progress import Silent
from tests.support.convert.common import FEW, make_source, random_windows
from tests.support.convert.hub_in_process import REPO, serve
from tests.support.convert.resharded import reshard

CANDIDATES = {"routed_experts": ("int4-g128",), "attention": ("int8-g128",)}


def test_measuring_reads_layer_by_layer_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = reshard(make_source(tmp_path / "m3", "m2", num_hidden_layers=2), tmp_path / "source", 5)
    shards, state = tmp_path / "shards", tmp_path / "state"

    def measured(source: Path | str, cache_disk: int | None = None) -> Sensitivity:
        fitting = Fitting(Checkpoint.open(source), {**FEW, "windows": 2, "heldout_windows": 1}, candidates=CANDIDATES)
        how = MeasureSettings(save_seconds=0.0, shards=shards, cache_disk=cache_disk)
        return measure(fitting, random_windows(fitting.base), "text", how, Silent(), state)

    expected = measured(folder)
    with pytest.raises(OptionError, match="is a folder"):
        measured(folder, 10**9)
    fetched = serve(folder, tmp_path / "hf", monkeypatch)
    plan = Fitting(Checkpoint.open(folder), {**FEW, "windows": 2, "heldout_windows": 1}, candidates=CANDIDATES).base
    need = plan_shards(layer_steps(plan, 0), plan.checkpoint.shard_sizes, None)
    assert need.least < 0.8 * need.fetch_bytes, "the shards are too few for a test of a cache"
    with pytest.raises(OptionError, match=f"at least {need.least:,} bytes"):
        measured(REPO, need.least - 1)
    one = Measuring._measure_layer

    def stops(self: Any, unit: Any, tensors: Any) -> None:
        if unit.layer == 1:
            raise StoppedError("the test stops here")
        one(self, unit, tensors)

    monkeypatch.setattr(Measuring, "_measure_layer", stops)
    with pytest.raises(StoppedError, match="stops here"):
        measured(REPO, need.least)
    assert shards.exists()  # for the run that continues
    monkeypatch.setattr(Measuring, "_measure_layer", one)
    fetched.clear()
    assert measured(REPO, need.least) == expected
    assert set(fetched) < set(plan.checkpoint.shards), f"{fetched}: shards of finished layers were fetched again"
    assert not shards.exists() and not state.exists()
