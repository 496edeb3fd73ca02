"""Measured speeds: the file says what it measured, its bounds are computed again, and a plan takes only what is near."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from m3quant.cli import cli
from m3quant.errors import NodeError
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.cost import decode_bound, decode_speed
from m3quant.runtime.fit import Ask, Fit, assess
from m3quant.runtime.hardware import parse_node
from m3quant.runtime.measured import MeasuredSet, measured_sets, near, read_measured
from m3quant.runtime.model import Subject, open_subject
from tests.support.paths import TESTS

CONFIGS = {
    "minimax_m2": TESTS / "data" / "minimax-m2.7" / "config.json",
    "minimax_m3_vl": TESTS / "data" / "minimax-m3" / "config.json",
}


@pytest.fixture(scope="module")
def subjects() -> dict[str, Subject]:
    return {model_type: open_subject(str(path)) for model_type, path in CONFIGS.items()}


def fit_of(subjects: dict[str, Subject], model_type: str, recipe: str, node: str = "1xH200") -> Fit:
    model = subjects[model_type].converted(build_recipe(named_recipe(recipe)))
    return assess(model, parse_node(node), Ask(kv_dtype="fp8"))


@pytest.mark.parametrize("known", measured_sets(), ids=lambda known: known.recipe)
def test_every_bound_is_the_one_computed(known: MeasuredSet, subjects: dict[str, Subject]) -> None:
    fit = fit_of(subjects, known.model_type, known.recipe, f"{known.gpus}x{known.gpu}")
    assert fit.model.stored_bytes == known.stored_bytes and "vLLM" in known.source and "2026" in known.source
    for requests, context, speed, bound in known.figures:
        assert decode_bound(fit, context, requests) == pytest.approx(bound, abs=0.05)
        assert 0.1 < speed / bound < 1  # a figure above what the bandwidth allows would be of something else
        found = near(fit, context, requests)
        assert found is not None and found.low <= speed / bound <= found.high


def test_a_range_holds_the_figures_near_it_alone(subjects: dict[str, Subject]) -> None:
    fit = fit_of(subjects, "minimax_m2", "awq")
    one = near(fit, 1000, 1)
    assert (
        one is not None and one.count == 6 and len(one.sources) == 3
    )  # 128, 880, 8,048 and 8,192 tokens of awq and of the recipe of equal size
    assert one.low == pytest.approx(132.9 / 624.5) and one.high == pytest.approx(138 / 541.8)
    many = near(fit, 1000, 32)
    assert many is not None and one.high < many.low
    speed = decode_speed(fit, 1000, 1)
    assert speed.low == one.low * speed.bound < speed.high < speed.bound


def test_what_was_not_measured_has_no_range(subjects: dict[str, Subject]) -> None:
    fit = fit_of(subjects, "minimax_m2", "awq")
    assert near(fit, 1000, 200) is None and near(fit, 10**6, 1) is None and near(fit, 1000, 0) is None
    for other in (
        fit_of(subjects, "minimax_m2", "awq", "2xH200"),
        fit_of(subjects, "minimax_m2", "awq", "1xH100"),
        fit_of(subjects, "minimax_m2", "fp8"),
        fit_of(subjects, "minimax_m3_vl", "awq"),
        replace(fit, model=replace(fit.model, schemes=frozenset())),
    ):
        assert near(other, 1000, 1) is None
        assert decode_speed(other, 1000, 1).low == 0.0


GOOD = {
    "model_type": "minimax_m2", "recipe": "awq", "weights": "int", "stored_bytes": 1, "gpu": "H200", "gpus": 1, "source": "vLLM", "figures": [[1, 1, 1.0, 2.0]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("document", "key"),
    [
        ({"sets": [GOOD], "version": 2}, "version"),
        ({"sets": [{**GOOD, "version": "0.34"}]}, "sets.0.version"),
        ({"sets": [{**GOOD, "figures": [[0, 1, 1.0, 2.0]]}]}, "sets.0.figures.0.0"),
        ({"sets": [{**GOOD, "figures": [[1, 1, 1.0]]}]}, "sets.0.figures.0.3"),
        ({"sets": [{**GOOD, "figures": []}]}, "sets.0.figures"),
        ({"sets": [{**GOOD, "stored_bytes": 0}]}, "sets.0.stored_bytes"),
        ({}, "sets"),
        ([], "the whole"),
    ],
)
def test_a_file_that_is_wrong_is_told_by_its_key(document: Any, key: str, tmp_path: Path) -> None:
    path = tmp_path / "measured.yaml"
    path.write_text(json.dumps({"sets": [GOOD]}))
    assert len(read_measured(path)) == 1
    path.write_text(json.dumps(document))
    with pytest.raises(NodeError, match=f"measured speeds .*, key '{re.escape(key)}': .*bench_gpu_table --yaml"):
        read_measured(path)


def test_plan_says_what_was_measured_and_what_was_not() -> None:
    def plan(*options: str) -> str:
        done = CliRunner().invoke(
            cli, ["plan", str(CONFIGS["minimax_m2"]), "--to", "awq", "--kv-dtype", "fp8", *options]
        )
        assert done.exit_code == 0, done.output
        return done.stdout

    text = plan("--on", "1xH200", "--context", "60000")
    assert "tokens/s decoding" in text and "measured: awq on 1xH200: vLLM 0.33.0" in text and "to" in text
    text = plan("--on", "2xH100")
    assert "nothing near this was measured" in text and "at least" in text
    price = json.loads(plan("--on", "1xH200", "--context", "60000", "--json"))["price"]
    low, high = price["measured"]["per_million_output"]["low"], price["measured"]["per_million_output"]["high"]
    assert price["per_million_output_floor"] < low <= high and price["measured"]["figures"] >= 1
    assert json.loads(plan("--on", "2xH100", "--json"))["price"]["measured"] is None
