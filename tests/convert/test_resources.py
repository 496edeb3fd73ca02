"""What a conversion is said to need, held against the peaks that were measured (tests/benchmarks/figures)."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from benchmarks.wide import wide_config

from m3quant.checkpoint import Checkpoint
from m3quant.convert.batches import MAX_WORKERS, pinned_bytes
from m3quant.families import family_of
from m3quant.plan import Plan, make_plan
from m3quant.recipe import build_recipe, named_recipe
from m3quant.resources import resources

FIGURES = Path(__file__).parents[1] / "benchmarks" / "figures"


def hollow_plan(folder: Path, config: dict[str, Any], recipe: str) -> Plan:
    """The plan of a checkpoint of real shapes whose weights are a hole in its file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, fact in family_of(config).expected_tensors(config).items():
        start, end = end, end + math.prod(fact.shape) * (4 if fact.float32 else 2)
        code = "F32" if fact.float32 else "BF16"
        header[name] = {"dtype": code, "shape": list(fact.shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return make_plan(Checkpoint.open(folder), build_recipe(named_recipe(recipe)))


@pytest.mark.parametrize("name", ["h200_convert_m2.json", "cpu_convert_fp8.json"])
def test_the_predicted_peak_of_a_data_free_run_is_above_the_measured_one_by_at_most_a_quarter(
    tmp_path: Path, name: str
) -> None:
    for number, case in enumerate(json.loads((FIGURES / name).read_text())):
        config = wide_config(case["shape"], case["layers"], case["experts"], case["narrower"])
        machine = case["machine"]
        on_gpu = machine["device"] != "cpu"
        workers = min(MAX_WORKERS, machine["cores"])
        need = resources(hollow_plan(tmp_path / str(number), config, case["recipe"]), on_gpu, workers)
        peak = max(run["peak_rss"] for run in case["ours"])
        assert peak <= need.host <= 1.25 * peak
        assert max(run["peak_device"] for run in case["ours"]) <= need.device


@pytest.mark.parametrize(("run", "family"), [("convert_m2", "m2"), ("convert_m2x4", "m2"), ("convert_m3", "m3")])
def test_the_predicted_peak_of_a_calibrated_gpu_run_is_above_the_measured_one(
    tmp_path: Path, run: str, family: str
) -> None:
    measured = json.loads((FIGURES / "h200_awq.json").read_text())[run]
    need = resources(hollow_plan(tmp_path / "src", wide_config(family, measured["layers"]), "awq"), True)
    assert measured["peak_rss"] <= need.host <= 1.25 * measured["peak_rss"]
    assert measured["peak_device"] <= need.device


def test_a_pinned_buffer_is_a_power_of_two() -> None:
    assert [pinned_bytes(size) for size in (0, 1, 2, 3, 2**25, 2**25 + 1)] == [0, 1, 2, 4, 2**25, 2**26]
