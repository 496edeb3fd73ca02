"""Estimated seconds: the slowest stage, by rates that a file may replace."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from click.testing import CliRunner

from m3quant.cli.plan import command
from m3quant.errors import PlanError
from m3quant.planning.timing_model import Rates, estimate, forward_flops, load_rates, search_flops, stream_bytes
from tests.benchmarks.rates import plan_of
from tests.support.convert.common import make_plan_of, make_source
from tests.support.paths import TESTS


def rates(**changes: float) -> Rates:
    facts = {"machine": "a machine", "measured": "2026-01-01", "versions": {}, "source": {}}
    return Rates.model_validate({**facts, "read": 1e6, "write": 1e6, "shared": 0.0, **changes})


def test_a_data_free_conversion_takes_as_long_as_its_slowest_stage(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m2"), "int4")
    bytes_in, bytes_out = (sum(getattr(u, f"bytes_{way}") for u in plan.units) for way in ("in", "out"))
    for changes, seconds, bound in (
        ({}, bytes_in / 1e6, "read"),
        ({"write": 1e4}, bytes_out / 1e4, "write"),
        ({"shared": 1.0}, (bytes_in + bytes_out) / 1e6, "disk"),
        ({"pack": 1e3}, bytes_in / 1e3, "pack"),
        ({"hash": 1e3, "pack": 1e4}, max(bytes_out / 1e3, bytes_in / 1e4), None),
    ):
        found = estimate(plan, rates(**changes))
        assert found is not None and found.seconds == pytest.approx(seconds)
        assert bound is None or found.bound_by == bound


def test_a_calibrated_conversion_needs_its_own_rates_and_grows_with_tokens(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m3"), "awq", rounding="awq")
    assert estimate(plan, rates()) is None
    slow = rates(search=1e6, forward=1e9)
    found = estimate(plan, slow)
    assert found is not None and found.bound_by == "search"
    assert found.stages["search"] == pytest.approx(search_flops(plan) / 1e6 * (len(plan.units) - 1))
    assert found.seconds >= found.stages["search"] + found.stages["forward"]
    data = plan.recipe.data.model_dump()
    double = make_plan_of(tmp_path / "src", "awq", rounding="awq", data={**data, "windows": 4, "heldout_windows": 2})
    assert search_flops(double) == pytest.approx(2 * search_flops(plan))
    assert forward_flops(double) == pytest.approx(2 * forward_flops(plan))
    quick = estimate(plan, rates(search=1e18, forward=1e18))
    assert quick is not None and quick.bound_by == "read"


def test_a_calibrated_conversion_overlaps_all_but_its_first_read_and_last_layer(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m3"), "awq", rounding="awq")
    outside, *layers = plan.units
    computing = rates(search=search_flops(plan), forward=forward_flops(plan), hash=1e3)  # 2 s per layer
    found = estimate(plan, computing)
    hashing = [unit.bytes_out / 1e3 for unit in plan.units]
    assert min(hashing) > 2 and found is not None and found.bound_by == "hash"
    assert found.seconds == pytest.approx(layers[0].bytes_in / 1e6 + 2 + sum(hashing))
    saved = found.stages["write"] - sum(unit.bytes_out for unit in plan.units) / 1e6
    assert saved == pytest.approx(stream_bytes(plan) * len(layers) / 1e6)
    busy = estimate(plan, rates(search=search_flops(plan) / 1e6, forward=1e18))
    tail = (layers[-1].bytes_out + stream_bytes(plan)) / 1e6
    assert busy is not None and busy.bound_by == "search"
    rest = layers[0].bytes_in / 1e6 + tail + max(outside.bytes_in, outside.bytes_out) / 1e6
    assert busy.seconds == pytest.approx(1e6 * len(layers) + rest)


def measured() -> list[dict[str, Any]]:
    figures = TESTS / "benchmarks" / "figures"
    return [result for path in sorted(figures.glob("h200_convert_*.json")) for result in json.loads(path.read_text())]


@pytest.mark.parametrize(
    "result", measured(), ids=lambda r: f"{r['shape']}x{r['layers']}-{r.get('stored', 'plain')}-{r['recipe']}"
)
def test_the_shipped_rates_tell_what_was_measured_to_25_percent(result: dict[str, Any]) -> None:
    found = estimate(plan_of(result), load_rates())
    assert found is not None
    assert found.seconds == pytest.approx(median(run["seconds"] for run in result["ours"]), rel=0.25)


def test_rates_ship_and_may_be_replaced(tmp_path: Path) -> None:
    assert load_rates().read > 0
    source = make_source(tmp_path / "src", "m2")
    own = tmp_path / "own.json"
    own.write_text(rates().model_dump_json())
    done = CliRunner().invoke(
        command, [str(source), "--to", "fp8", "--json", "--rates", str(own)], catch_exceptions=False
    )
    assert json.loads(done.stdout)["estimate"]["machine"] == "a machine"
    table = CliRunner().invoke(command, [str(source), "--rates", str(own)], catch_exceptions=False).stdout
    assert "time: on a machine, by rates of 2026-01-01" in table and "not measured" in table


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "the file is not JSON"), ("{}", "machine"), ('{"read": 0}', "own.json"), (None, "cannot be read")],
)
def test_a_bad_file_of_rates_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "own.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError, match=message):
        load_rates(path)
