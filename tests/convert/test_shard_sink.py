"""What a conversion asks of a sink for its shards: when each is handed over, which ones it still needs, and going on without the others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from m3quant.api.calibration_text import TextChoice
from m3quant.api.conversion import How, prepare
from m3quant.artifact.uploads import UploadedShard, Uploads, read_uploads, refuse_dropped, write_uploads
from m3quant.errors import CheckpointError, OutputError, StoppedError
from m3quant.planning.plan import Plan
from m3quant.planning.resources import resources
from m3quant.planning.streaming import Progressed
from m3quant.publish.gates import Asked
from m3quant.publish.streaming.shard_uploads import HELD
from m3quant.publish.streaming.wanted import Wanted
from m3quant.recipe.choice import RecipeChoice
from m3quant.running.stopping import InterruptedRun, StopFlag
from m3quant.verify.one_shard import shard_problems
from tests.support.convert.common import make_plan_of, make_source, run_plan, stored


class Taking:
    """A sink that keeps the bytes of every shard in memory and removes each file that a run which goes on does not read.

    after: shards after which it fails, as an upload would on its own thread.
    """

    held = 2
    checks = ("none",)

    def __init__(self, after: int = 99) -> None:
        self.after = after
        self.kept: dict[str, bytes] = {}
        self.needed: list[tuple[int, int]] = []
        self.calls: list[str] = []

    def begin(self, plan: Plan, output: Path, stop: StopFlag) -> Mapping[str, str]:
        self.plan, self.output, self.stop = plan, output, stop
        self.calls.append("begin")
        self.uploads = Uploads(repo="org/name")
        return {name: "" for name in self.kept if not (output / name).exists()}

    def finished(self, record: Mapping[str, Any], needed_from: int) -> None:
        self.needed.append((record["unit"], needed_from))
        path = self.output / record["shard"]
        if path.exists():
            self.kept[record["shard"]] = path.read_bytes()
        for unit in self.plan.units:
            if unit.shard in self.kept and (unit.layer is None or unit.index < needed_from):
                size, digest = unit.bytes_out, hashlib.sha256(self.kept[unit.shard]).hexdigest()
                self.uploads.shards[unit.shard] = UploadedShard(size=size, sha256=digest, dropped=True)
                write_uploads(self.output, self.uploads)
                (self.output / unit.shard).unlink(missing_ok=True)
        if len(self.kept) == self.after:
            self.stop.fail(StoppedError("the Hub is gone"))
        self.stop.check()

    def wait(self) -> None:
        self.calls.append("wait")

    def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize(("to", "boundary_every"), [("int4", None), ("awq", 2)])
def test_a_run_that_stopped_goes_on_without_the_shards_that_left(
    tmp_path: Path, to: str, boundary_every: int | None
) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m2", num_hidden_layers=4), to)
    run_plan(plan, tmp_path / "whole")
    sink = Taking(after=4)
    how = {"sink": sink, "boundary_every": boundary_every}
    with pytest.raises(StoppedError, match="the Hub is gone"):
        run_plan(plan, tmp_path / "out", **how)
    here = [p.name for p in sorted((tmp_path / "out").glob("*.safetensors"))]
    if to == "awq":
        # Hidden states were saved after layer 1 alone, through which layer 2 is passed again.
        assert sink.needed == [(0, 1), (1, 1), (2, 3), (3, 3)] and here == [plan.units[3].shard]
    else:
        assert {needed for _, needed in sink.needed} == {len(plan.units)} and here == []
    sink.after = 99
    manifest = run_plan(plan, tmp_path / "out", **how)
    assert sink.calls == ["begin", "close", "begin", "wait", "close"] and manifest["shard_checks"] == ["none"]
    assert sink.kept == {p.name: p.read_bytes() for p in (tmp_path / "whole").glob("*.safetensors")}


def test_a_lost_shard_of_a_calibrated_run_is_refused_by_name(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m2"), "awq")
    sink = Taking(after=2)
    with pytest.raises(StoppedError):
        run_plan(plan, tmp_path / "out", sink=sink)
    sink.begin = lambda plan, output, stop: {plan.units[1].shard: "was dropped and is lost"}  # type: ignore[method-assign]
    with pytest.raises(
        OutputError, match=r"model-00002-of-00003\.safetensors was finished but was dropped and is lost"
    ):
        run_plan(plan, tmp_path / "out", sink=sink)


def test_the_first_failure_beside_the_main_thread_ends_the_run() -> None:
    stop = StopFlag()
    stop.check()
    stop.fail(StoppedError("first"))
    stop.fail(StoppedError("second"))
    with pytest.raises(StoppedError, match="first"):
        stop.check()
    stop = StopFlag()
    stop.number = 15
    with pytest.raises(InterruptedRun):
        stop.check()


def test_the_disk_holds_the_largest_shards_that_may_wait(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m2", num_hidden_layers=6), "int4")
    sizes = sorted((unit.bytes_out for unit in plan.units), reverse=True)
    all_of_it = resources(plan, on_gpu=False).disk
    assert all_of_it - resources(plan, on_gpu=False, held=2).disk == sum(sizes[3:])
    assert resources(plan, on_gpu=False, held=99).disk == all_of_it


def test_the_disk_holds_what_a_run_with_another_interval_left(tmp_path: Path) -> None:
    """What it left after the last saved hidden states stays until they are saved next."""
    plan = make_plan_of(make_source(tmp_path / "src", "m2", num_hidden_layers=6), "awq")
    size = plan.units[1].bytes_out
    fresh = resources(plan, on_gpu=False, held=1).disk
    for boundary, todo, more in ((1, 1, 0), (3, 3, 0), (3, 4, 1), (1, 4, 3)):
        so_far = Progressed(range(todo), boundary)
        assert resources(plan, on_gpu=False, held=1, so_far=so_far).disk == fresh + more * size


def test_a_dry_run_asks_for_no_more_room_than_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_source(tmp_path / "src", "m2", num_hidden_layers=8), tmp_path / "out"
    wanted = Wanted("org/name", Asked(base_repo="MiniMaxAI/MiniMax-M2", base_revision="0" * 40), drop=True)
    dry = prepare(source, out, RecipeChoice("int4"), TextChoice(), How("cpu"), publish=wanted, dry_run=True)
    free = resources(dry.plan, on_gpu=False, held=HELD).disk
    monkeypatch.setattr("m3quant.planning.resources.shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    assert dry.look().found.startswith("new")
    with pytest.raises(StoppedError, match="or choose another folder"):
        replace(dry, publish=None).look()


def test_no_repo_is_made_for_what_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_source(tmp_path / "src", "m2"), tmp_path / "out"
    wanted = Wanted("org/name", Asked(base_repo="MiniMaxAI/MiniMax-M2", base_revision="0" * 40), drop=True)
    ready = prepare(source, out, RecipeChoice("int4"), TextChoice(), How("cpu"), publish=wanted)
    monkeypatch.setattr("m3quant.publish.streaming.rehearsal.check_beforehand", lambda *_: pytest.fail("asked the Hub"))
    monkeypatch.setattr("m3quant.planning.resources.shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(StoppedError, match=r"free 0\.\d GB or choose another folder\. Nothing was changed"):
        ready.run()
    assert not out.exists()


def test_a_shard_is_checked_by_itself(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m2"), "int4")
    run_plan(plan, tmp_path / "out")
    assert [list(shard_problems(tmp_path / "out", unit)) for unit in plan.units] == [[], [], []]
    path = tmp_path / "out" / plan.units[1].shard
    tensors = {name: t for name, t in stored(tmp_path / "out").items() if name.startswith("model.layers.0.")}
    scale = next(name for name in tensors if name.endswith("weight_scale"))
    whole = path.read_bytes()
    tensors[scale].view(-1)[3] = torch.nan
    order = {name: tensors[name] for name, _, _ in plan.units[1].entries}
    at = 8 + int.from_bytes(whole[:8], "little")
    for name, dtype, shape in plan.units[1].entries:
        del dtype, shape
        raw = order[name].contiguous().view(torch.uint8).numpy().tobytes()
        if name == scale:
            path.write_bytes(whole[:at] + raw + whole[at + len(raw) :])
        at += len(raw)
    assert list(shard_problems(tmp_path / "out", plan.units[1])) == [f"tensor '{scale}' holds NaN or Inf"]
    save_file({"other": torch.zeros(2)}, path)
    assert list(shard_problems(tmp_path / "out", plan.units[1])) == [
        f"{path.name}: its header is not the one that was planned"
    ]


def test_what_was_uploaded_is_read_back_or_refused(tmp_path: Path) -> None:
    assert read_uploads(tmp_path) is None
    refuse_dropped(tmp_path)
    shard = UploadedShard(size=7, sha256="a" * 64)
    uploads = Uploads(repo="org/name", shards={"a.safetensors": shard})
    write_uploads(tmp_path, uploads)
    assert read_uploads(tmp_path) == uploads
    refuse_dropped(tmp_path)
    uploads.shards["a.safetensors"] = shard.model_copy(update={"dropped": True})
    write_uploads(tmp_path, uploads)
    with pytest.raises(CheckpointError, match="one of its shards was uploaded to org/name and dropped here"):
        refuse_dropped(tmp_path)
    path = tmp_path / ".m3quant-hub.json"
    path.write_bytes(path.read_bytes().replace(b"org/name", b"org/nose"))
    with pytest.raises(OutputError, match="is damaged"):
        read_uploads(tmp_path)
