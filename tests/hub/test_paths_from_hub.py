"""The ways through a conversion that a small CPU run does not take by itself, with a source on the Hub and the least disk:
layers as stacks with a writer in the background, as on a GPU, and layers that are passed again."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from m3quant.checkpoint.shard_cache import ShardCache
from m3quant.convert import calibrated
from m3quant.errors import CalibrationError, CheckpointError, StoppedError
from m3quant.planning.plan import Plan
from m3quant.planning.streaming import UNIT, conversion_shards
from m3quant.running.progress import Silent
from tests.support.convert.common import (
    config_of,
    files,
    make_plan_of,
    make_source,
    quickly_calibrated,
    rewrite,
    run_plan,
    stored,
)
from tests.support.convert.hub_in_process import REPO, serve
from tests.support.convert.resharded import reshard, watched
from tests.support.convert.tampering import StopsAfter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    return reshard(make_source(root / "m3", "m3", num_hidden_layers=4), root / "source", 9)


@pytest.fixture(params=[False, True], ids=["layers", "stacks"])
def stacked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(calibrated, "stacked_on", lambda device: request.param)
    return bool(request.param)


def quick(source: Path | str) -> Plan:
    return make_plan_of(source, "awq", **quickly_calibrated("awq"))  # type: ignore[arg-type]


def made(output: Path) -> dict[str, bytes]:
    return files(output, but=("m3quant.json", "eval.json", "m3quant-report/report.html"))


@pytest.mark.parametrize("every", [1, 2, 100], ids="boundary every {}".format)
def test_layers_that_are_passed_again_are_fetched_again(
    folder: Path, stacked: bool, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_plan(quick(folder), tmp_path / "whole", boundary_every=every)
    serve(folder, tmp_path / "hf", monkeypatch)
    plan = quick(REPO)
    least, out = conversion_shards(plan, None).least, tmp_path / "out"
    with watched(out / ".m3quant" / "source") as most:
        with pytest.raises(StoppedError):
            run_plan(plan, out, progress=StopsAfter(2), boundary_every=every, cache_disk=least)
        progress = Silent()
        run_plan(quick(REPO), out, progress=progress, boundary_every=every, cache_disk=least)
    again = sum("hidden states are computed again" in line for line in progress.lines)
    assert (again > 0) == (every > 1)
    assert most[0] <= least
    a, b = made(out), made(tmp_path / "whole")
    assert [name for name in a.keys() | b.keys() if a.get(name) != b.get(name) and not name.endswith(".json")] == []


@pytest.mark.parametrize("failing", [1, 2])
def test_an_error_while_the_next_layer_waits_for_room_ends_the_run(
    folder: Path, stacked: bool, failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer ahead waits for shards of this one to leave; with the error of this one they never do."""
    serve(folder, tmp_path / "hf", monkeypatch)
    plan = quick(REPO)
    need = conversion_shards(plan, None)
    waiting = threading.Event()
    quantize, wait = calibrated._Layerwise.quantize, ShardCache._wait

    def fail(self: Any, spec: Any, *given: Any) -> Any:
        if spec.index == failing:
            assert waiting.wait(30)
            raise CalibrationError("this layer fails")
        return quantize(self, spec, *given)

    def watched_wait(self: ShardCache, wanted: frozenset[str]) -> Any:
        if wanted & ahead:
            waiting.set()
        return wait(self, wanted)

    ahead = {step.key: step.shards for step in need.steps}[UNIT, failing + 2]
    ahead -= {step.key: step.shards for step in need.steps}[UNIT, failing + 1]
    monkeypatch.setattr(calibrated._Layerwise, "quantize", fail)
    monkeypatch.setattr(ShardCache, "_wait", watched_wait)
    with pytest.raises(CalibrationError, match="this layer fails"):
        run_plan(plan, tmp_path / "out", cache_disk=need.least)
    assert (tmp_path / "out" / ".m3quant" / "source").exists()  # for the run that continues


@pytest.mark.parametrize("at", [1, 3])
def test_a_disk_that_fills_up_while_it_fetches_stops_a_run_that_continues(
    folder: Path, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_plan(make_plan_of(folder, "int4"), tmp_path / "whole")
    fetched = serve(folder, tmp_path / "hf", monkeypatch)
    plan, download = make_plan_of(REPO, "int4"), huggingface_hub.hf_hub_download  # type: ignore[arg-type]

    def fills(repo: str, name: str, *, local_dir: Path | None = None, **given: Any) -> str:
        if local_dir is not None and len(fetched) >= at:
            (local_dir / name).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return download(repo, name, local_dir=local_dir, **given)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fills)
    out = tmp_path / "out"
    with pytest.raises(StoppedError, match=r"No space left on device\. Free space and run the same command again"):
        run_plan(plan, out)
    assert b"half" not in {path.read_bytes() for path in (out / ".m3quant" / "source").glob("*.safetensors")}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    run_plan(make_plan_of(REPO, "int4"), out)  # type: ignore[arg-type]
    a, b = made(out), made(tmp_path / "whole")
    assert [name for name in a.keys() | b.keys() if a.get(name) != b.get(name) and not name.endswith(".json")] == []


def test_a_bad_weight_while_workers_wait_for_room_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data-free conversion reads ahead over the end of a layer, too."""
    source = make_source(tmp_path / "m2", "m2", num_hidden_layers=3)
    tensors = stored(source)
    bad = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    tensors[bad][0, 0] = torch.nan
    folder = reshard(rewrite(tmp_path / "bad", tensors, config_of(source)), tmp_path / "source", 9)
    serve(folder, tmp_path / "hf", monkeypatch)
    plan = make_plan_of(REPO, "int4")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=bad):
        run_plan(plan, tmp_path / "out", cache_disk=conversion_shards(plan, None).least)
