"""What m3quant writes into config.json, as compressed-tensors' own models read it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest

from m3quant.checkpoint import Checkpoint
from m3quant.errors import PlanError
from m3quant.planning.config_models import check_config_model, library_version, model_problems
from m3quant.planning.plan import make_plan
from m3quant.recipe.recipe import build_recipe, named_recipe
from tests.support.paths import FIXTURES

Section = dict[str, Any]


def section(settings: list[str], to: str = "int4", fmt: str | None = "compressed-tensors") -> Section:
    recipe = build_recipe(named_recipe(to), settings=settings, format=fmt)
    found = make_plan(Checkpoint.open(FIXTURES / "tiny-m3"), recipe).quantization
    assert found is not None
    return found


@pytest.mark.parametrize(
    "scheme", ["int2-g32-asym", "int3-g64-asym", "int8-channel", "int4-g128", "fp8-channel", "fp8-block"]
)
def test_the_library_reads_what_is_written(scheme: str) -> None:
    written = section([f"attention={scheme}", f"indexer={scheme}"])
    assert any("attn" in target for group in written["config_groups"].values() for target in group["targets"])
    assert model_problems(written) == []
    check_config_model(written)


def first_weights(written: Section) -> Section:
    weights: Section = written["config_groups"]["group_0"]["weights"]
    return weights


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda s: first_weights(s).update(num_bitz=3), "config_groups.group_0.weights.num_bitz is not known"),
        (lambda s: first_weights(s).update(strategy="channel"), "config_groups.group_0.weights: "),
        (
            lambda s: first_weights(s).update(num_bits="four"),
            "config_groups.group_0.weights.num_bits must be a whole number",
        ),
        (lambda s: s["config_groups"].update(group_0=5), "config_groups.group_0"),
        (lambda s: s.update(config_groups=None), "config_groups must be a mapping"),
        (lambda s: s.update(ignore=7), "ignore"),
    ],
)
def test_what_it_does_not_read_is_named(change: Callable[[Section], None], place: str) -> None:
    written = copy.deepcopy(section([]))
    change(written)
    problems = model_problems(written)
    assert problems and problems[0].startswith(place), problems
    with pytest.raises(PlanError, match=f"^compressed-tensors {library_version()} does not read"):
        check_config_model(written)


def test_other_formats_and_a_missing_library_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    check_config_model(None)
    check_config_model({"quant_method": "awq", "bits": "four"})
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    assert library_version() is None
    check_config_model({"quant_method": "compressed-tensors", "config_groups": 5})
