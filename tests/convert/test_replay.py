"""Runs that save hidden states rarely: what lies since the last saving is passed again, to the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3quant.errors import StoppedError
from m3quant.planning.plan import Plan
from m3quant.planning.resources import BOUNDARY_SHARE, boundary_interval, hidden_state_bytes
from m3quant.running.progress import Silent
from tests.support.convert.common import make_plan_of, make_source, run_plan, same_output
from tests.support.convert.tampering import StopsAfter


def plan_of(folder: Path, family: str, rounding: str) -> Plan:
    source = make_source(folder / "src", family, num_hidden_layers=4)
    calibration = {"awq": "awq", "feedback": "text"}[rounding]
    return make_plan_of(source, "awq", rounding=rounding, calibration=calibration)


@pytest.mark.parametrize(("family", "rounding"), [("m2", "awq"), ("m3", "awq"), ("m3", "feedback")])
def test_layers_since_the_last_saving_are_passed_again(tmp_path: Path, family: str, rounding: str) -> None:
    plan = plan_of(tmp_path, family, rounding)
    run_plan(plan, tmp_path / "whole")
    with pytest.raises(StoppedError):
        run_plan(plan, tmp_path / "out", progress=StopsAfter(2), boundary_every=2)
    saved = sorted(p.name for p in (tmp_path / "out" / ".m3quant").glob("boundary-*"))
    assert saved == ["boundary-00003-quantized.states", "boundary-00003-source.states"], "those entering layer 2"
    progress = Silent()
    run_plan(plan, tmp_path / "out", progress=progress, boundary_every=2)
    again = [line for line in progress.lines if "hidden states are computed again" in line]
    assert again == ["layer 2: hidden states are computed again"]
    assert same_output(tmp_path / "whole", tmp_path / "out") == []


def test_a_run_that_never_saved_begins_at_the_embeddings(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "m2", "awq")
    run_plan(plan, tmp_path / "whole")
    with pytest.raises(StoppedError):
        run_plan(plan, tmp_path / "out", progress=StopsAfter(3), boundary_every=100)
    progress = Silent()
    run_plan(plan, tmp_path / "out", progress=progress, boundary_every=100)
    assert sum("hidden states are computed again" in line for line in progress.lines) == 4
    assert same_output(tmp_path / "whole", tmp_path / "out") == []


def test_the_interval_keeps_savings_below_their_share(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "m2", "awq")
    layers = [unit for unit in plan.units if unit.layer is not None]
    moved = sum(unit.bytes_in + unit.bytes_out for unit in layers) / len(layers)
    every = boundary_interval(plan, on_gpu=True)
    assert 2 * hidden_state_bytes(plan, 2) <= every * BOUNDARY_SHARE * moved
    assert every == 1 or 2 * hidden_state_bytes(plan, 2) > (every - 1) * BOUNDARY_SHARE * moved
    assert boundary_interval(plan, on_gpu=False) == 1


def test_shards_that_leave_the_disk_take_no_more_of_it_than_what_is_saved(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "m2", "awq")
    layers = [unit for unit in plan.units if unit.layer is not None]
    for windows in (1, 20, 100, 3000):
        plan.recipe.data.windows = windows
        saved = 2 * hidden_state_bytes(plan, 2)
        every = boundary_interval(plan, on_gpu=True, leaving=True)
        assert 1 <= every <= boundary_interval(plan, on_gpu=True)
        mean = sum(unit.bytes_out for unit in layers) / len(layers)
        assert every == 1 or every * mean <= saved
        assert every == boundary_interval(plan, on_gpu=True) or (every + 1) * mean > saved
