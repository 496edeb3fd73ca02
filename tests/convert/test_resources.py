"""What a conversion is said to need, held against the peaks that were measured (tests/benchmarks/figures)."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from m3quant.checkpoint import Checkpoint
from m3quant.planning.batches import MAX_WORKERS, pinned_bytes
from m3quant.planning.plan import Plan, make_plan
from m3quant.planning.resources import resources
from m3quant.recipe.recipe import build_recipe, named_recipe
from tests.benchmarks.wide import CODES, stored_tensors, wide_config
from tests.support.paths import TESTS

FIGURES = TESTS / "benchmarks" / "figures"


def hollow_plan(folder: Path, config: dict[str, Any], recipe: str) -> Plan:
    """The plan of a checkpoint of real shapes whose weights are a hole in its file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for entry in stored_tensors(config):
        start, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return make_plan(Checkpoint.open(folder), build_recipe(named_recipe(recipe)))


def measured() -> list[dict[str, Any]]:
    return [
        case
        for pattern in ("h200_convert_*.json", "cpu_convert_fp8.json")
        for path in sorted(FIGURES.glob(pattern))
        for case in json.loads(path.read_text())
    ]


@pytest.mark.parametrize(
    "case",
    measured(),
    ids=lambda c: f"{c['machine']['device']}-{c['shape']}x{c['layers']}-{c.get('stored', 'plain')}-{c['recipe']}",
)
def test_the_predicted_peak_is_above_the_measured_one_by_less_than_a_third(
    tmp_path: Path, case: dict[str, Any]
) -> None:
    config = wide_config(case["shape"], case["layers"], case["experts"], case["narrower"], case.get("stored", "plain"))
    machine = case["machine"]
    workers = min(MAX_WORKERS, machine["cores"])
    plan = hollow_plan(tmp_path / "src", config, case["recipe"])
    need = resources(plan, machine["device"] != "cpu", workers)
    peak = max(run["peak_rss"] for run in case["ours"])
    assert peak <= need.host < 1.33 * peak
    assert max(run["peak_device"] for run in case["ours"]) <= need.device


def test_a_pinned_buffer_is_a_power_of_two() -> None:
    assert [pinned_bytes(size) for size in (0, 1, 2, 3, 2**25, 2**25 + 1)] == [0, 1, 2, 4, 2**25, 2**26]
