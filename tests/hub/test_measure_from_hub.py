"""Measuring a checkpoint on the Hub: what a folder gives, within the disk that was given, continued after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from m3quant.api.measuring import measure_file
from m3quant.checkpoint import Checkpoint
from m3quant.checkpoint.shard_plan import plan_shards
from m3quant.convert import measure as measuring
from m3quant.errors import OptionError, StoppedError
from m3quant.planning.plan import make_plan
from m3quant.planning.streaming import layer_steps
from m3quant.recipe.recipe import build_recipe, named_recipe
from tests.support.convert.common import add_tokenizer, make_source
from tests.support.convert.hub_in_process import REPO, serve
from tests.support.convert.resharded import reshard, watched

TEXT = ("bundled",)


def measured(source: Path | str, path: Path, **how: Any) -> bytes:
    measure_file(Checkpoint.open(source), path, "cpu", TEXT, 2, 1, **how)
    return path.read_bytes()


def test_measuring_reads_layer_by_layer_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = reshard(add_tokenizer(make_source(tmp_path / "m3", "m3", num_hidden_layers=3)), tmp_path / "source", 7)
    expected = measured(folder, tmp_path / "local.json")
    with pytest.raises(OptionError, match="is a folder"):
        measured(folder, tmp_path / "x.json", cache_disk=10**9)
    fetched = serve(folder, tmp_path / "hf", monkeypatch)
    plan = make_plan(Checkpoint.open(folder), build_recipe(named_recipe("awq")))
    need = plan_shards(layer_steps(plan, 0), plan.checkpoint.shard_sizes, None)
    assert need.least < 0.8 * need.fetch_bytes
    with pytest.raises(OptionError, match=f"at least {need.least:,} bytes"):
        measured(REPO, tmp_path / "x.json", cache_disk=need.least - 1)
    path = tmp_path / "remote.json"
    one, settings = measuring.Measuring._measure_layer, measuring.MeasureSettings
    # The state is saved after every layer.
    monkeypatch.setattr(measuring, "MeasureSettings", lambda **given: settings(**given, save_seconds=0.0))

    def stops(self: Any, unit: Any, tensors: Any) -> None:
        if unit.layer == 2:
            raise StoppedError("the test stops here")
        one(self, unit, tensors)

    monkeypatch.setattr(measuring.Measuring, "_measure_layer", stops)
    shards = tmp_path / "remote.json.shards"
    with watched(shards) as most, pytest.raises(StoppedError, match="stops here"):
        measured(REPO, path, cache_disk=need.least)
    assert 0 < most[0] <= need.least and shards.exists()  # for the run that continues
    monkeypatch.setattr(measuring.Measuring, "_measure_layer", one)
    fetched.clear()
    assert measured(REPO, path, cache_disk=need.least) == expected
    assert set(fetched) < set(plan.checkpoint.shards), "finished layers were fetched again"
    assert not shards.exists() and not path.with_name("remote.json.partial").exists()
