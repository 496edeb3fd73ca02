"""kill -9 at any instant: nothing half-written under a final name, and the same command finishes with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from m3quant.artifact.journal import Journal
from m3quant.errors import OutputError
from m3quant.running.progress import Silent
from tests.support.convert.common import files, make_plan_of, make_source, run_plan, same_output
from tests.support.paths import ROOT


def drive(source: Path, folder: Path, recipe: str, stride: int) -> dict[str, Any]:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.convert.kill_driver", str(source), str(folder), recipe, str(stride)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# (family, recipe, every n-th plain write, least number of kill points)
RUNS = [("m2", "int4", 1, 100), ("m3", "awq", 16, 70)]


@pytest.mark.parametrize(("family", "recipe", "stride", "least"), RUNS, ids=["data-free", "calibrated"])
def test_killed_at_a_durable_operation_the_same_command_finishes_with_the_same_bytes(
    tmp_path: Path, family: str, recipe: str, stride: int, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every fsync, rename, removal and reservation, and every `stride`-th of the plain writes, each torn in half."""
    source = make_source(tmp_path / "src", family, num_local_experts=2, num_experts_per_tok=1)
    result = drive(source, tmp_path / "out", recipe, stride)
    with capsys.disabled():
        print(
            f"\n{family} {recipe}: {result['points']} kill points of {result['operations']} durable operations "
            f"({', '.join(result['kinds'])}), then one output killed {result['again']['kills']} times"
        )
    assert result["failures"] == []
    assert result["points"] >= least
    assert result["again"]["differing"] == [] and result["again"]["kills"] >= 3


class SignalAt(Silent):
    """Sends a signal to this process when progress is told the `at`-th time: of a tensor, or of a share of a layer."""

    def __init__(self, number: int, at: int) -> None:
        super().__init__()
        self.number, self.left = number, at

    def advance(self, count: int) -> None:
        super().advance(count)
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("family", "recipe"), [("m2", "int4"), ("m3", "awq")])
def test_a_signal_stops_cleanly_and_the_same_command_continues(
    tmp_path: Path, family: str, recipe: str, number: int, code: int
) -> None:
    from m3quant.running.stopping import InterruptedRun

    plan = make_plan_of(make_source(tmp_path / "src", family), recipe)
    run_plan(plan, tmp_path / "whole")
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(InterruptedRun, match="run the same command to continue") as stopped:
        run_plan(plan, tmp_path / "out", progress=SignalAt(number, len(plan.units[0].tensors) + 2))
    assert stopped.value.exit_code == code
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    left = set(files(tmp_path / "out"))
    assert "model-00001-of-00003.safetensors" in left, "the finished unit was dropped"
    assert not any(name.endswith(".tmp") or name == "config.json" for name in left)
    progress = Silent()
    run_plan(plan, tmp_path / "out", progress=progress)
    assert any(line.startswith("continuing: 1 of 3") for line in progress.lines)
    assert progress.done == progress.total == sum(u.bytes_in for u in plan.units)
    assert same_output(tmp_path / "whole", tmp_path / "out") == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_with_128_plus_the_signal(tmp_path: Path, number: int, code: int) -> None:
    """Through the real program, as soon as it has begun to write; 0 only if it was done before the signal came."""
    source, output = make_source(tmp_path / "src", "m2", num_local_experts=128), tmp_path / "out"
    program = subprocess.Popen(
        [sys.executable, "-m", "m3quant", "convert", str(source), str(output), "--to", "int4"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while program.poll() is None and not (output / ".m3quant" / "units.jsonl").exists():
        time.sleep(0.005)
    program.send_signal(number)
    _, errors = program.communicate(timeout=60)
    assert "Traceback" not in errors, errors
    assert program.returncode in (code, 0), errors
    if program.returncode:
        assert "run the same command to continue" in errors
        assert not (output / "config.json").exists()
        assert not [name for name in files(output) if name.endswith(".tmp")]


def test_a_second_process_on_the_same_output_is_refused(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m2"), "int4")
    (tmp_path / "out").mkdir()
    first = Journal(tmp_path / "out")
    first.folder.mkdir()
    first._take_lock()
    with pytest.raises(OutputError, match="in use by another m3quant process"):
        run_plan(plan, tmp_path / "out")
    assert sorted(files(tmp_path / "out")) == [".m3quant/lock"]
    first.release()
    run_plan(plan, tmp_path / "out")
    assert not (tmp_path / "out" / ".m3quant").exists()


def test_a_finished_output_is_left_as_it_is(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m2"), "int4")
    manifest = run_plan(plan, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    progress = Silent()
    assert run_plan(plan, tmp_path / "out", progress=progress) == json.loads(json.dumps(manifest))
    assert progress.lines == [f"{tmp_path / 'out'} is already complete"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_a_finished_output_that_lost_a_shard_is_not_called_complete(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m2"), "int4")
    run_plan(plan, tmp_path / "out")
    (tmp_path / "out" / plan.units[1].shard).unlink()
    with pytest.raises(OutputError, match=r"model-00002-of-00003\.safetensors is missing.*convert again"):
        run_plan(plan, tmp_path / "out")


def test_a_lost_shard_of_an_unfinished_data_free_run_is_made_again(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m2"), "int4")
    run_plan(plan, tmp_path / "whole")
    with pytest.raises(Exception, match="stopped by SIGTERM"):
        run_plan(plan, tmp_path / "out", progress=SignalAt(signal.SIGTERM, len(plan.units[0].tensors) + 5))
    (tmp_path / "out" / plan.units[0].shard).unlink()
    run_plan(plan, tmp_path / "out")
    assert same_output(tmp_path / "whole", tmp_path / "out") == []
