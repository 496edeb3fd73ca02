"""One layer of each kind is worked out, and answers for the others as they would for themselves."""

import json
from pathlib import Path

import pytest

from m3quant.checkpoint import Checkpoint
from m3quant.errors import PlanError
from m3quant.planning.headers import from_config
from m3quant.planning.plan import Plan, make_plan, role_table
from m3quant.planning.source_units import Deferred, source_units
from m3quant.planning.unit import Unit, nbytes
from m3quant.recipe.recipe import build_recipe, named_recipe
from tests.support.paths import FIXTURES

DATA = Path(__file__).parent.parent / "data"


def whole(plan: Plan) -> list[Unit]:
    """The plan's units, each with a list of its own."""
    return [Unit(unit.index, unit.layer, unit.shard, tuple(unit.tensors)) for unit in plan.units]


@pytest.mark.parametrize("source", ["minimax-m3.1-flash", "tiny-m3"])
def test_a_kind_answers_for_each_of_its_layers(source: str) -> None:
    folder = DATA / source
    checkpoint = from_config(folder / "config.json") if folder.is_dir() else Checkpoint.open(FIXTURES / source)
    last = source_units(checkpoint).family.num_layers - 1
    recipe = build_recipe(named_recipe("awq"), settings=[f"routed_experts@{last}=int8-g32"])
    plan = make_plan(checkpoint, recipe)
    units = whole(plan)
    assert sum(count for _, count in plan.kinds) == len(units)
    assert len(plan.kinds) == len({id(unit.like or unit) for unit in plan.units}) < last or source == "tiny-m3"
    for own, unit in zip(units, plan.units, strict=True):
        assert (own.bytes_in, own.bytes_out, own.tensor_bytes) == (unit.bytes_in, unit.bytes_out, unit.tensor_bytes)
        assert own.index_bytes == unit.index_bytes
    assert plan.index_size == len(plan.index_bytes)
    assert plan.output_bytes > sum(own.bytes_out for own in units)
    weights = [t for own in units for t in own.tensors if t.scheme.quantizes]
    assert {t.module: t.scheme for t in weights} == {m: s for m, s in plan.modules.items() if s.quantizes}
    table = role_table(plan)
    assert sum(row["bytes_out"] for row in table) == sum(
        nbytes(o) for own in units for t in own.tensors for o in t.outputs
    )
    assert sum(row["tensors"] for row in table) == sum(len(own.tensors) for own in units)


def test_a_release_is_the_same_whether_its_tensors_are_listed_or_not() -> None:
    read = from_config(DATA / "minimax-m3" / "config.json")
    recipe, family = build_recipe(named_recipe("fit-m3-1xh200")), source_units(read).family
    lazily, listed = make_plan(read, recipe), make_plan(read, recipe, source_units(read.some(family.layers)))
    assert lazily.output_bytes == listed.output_bytes and lazily.quantization == listed.quantization
    assert [t.outputs for t in lazily.units[-1].tensors] == [t.outputs for t in listed.units[-1].tensors]


def test_tensors_of_a_further_layer_are_made_when_they_are_read() -> None:
    asked = list[int]()
    later = Deferred(2, lambda: asked.append(1) or [3, 4])  # type: ignore[func-returns-value]
    assert len(later) == 2 and not asked
    assert list(later) == [3, 4] and later[1] == 4 and asked == [1]


def test_a_refusal_names_the_layer_that_the_recipe_is_about(tmp_path: Path) -> None:
    config = json.loads((DATA / "minimax-m3" / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 3040  # 32 divides it, 128 does not
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = build_recipe(named_recipe("int4"), settings=["routed_experts=int4-g32", "routed_experts@41=int4-g128"])
    with pytest.raises(PlanError, match=r"layers\.41\..*do not divide the 3040"):
        make_plan(from_config(tmp_path / "config.json"), recipe)
