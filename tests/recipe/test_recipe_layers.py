"""Recipes by layer: ranges, precedence, one canonical form, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from m3quant.errors import RecipeError
from m3quant.recipe.layer_ranges import MOST_LAYERS, parse_layers, show_layers
from m3quant.recipe.recipe import Recipe, build_recipe, join_layers, named_recipe, split_layers
from m3quant.schemes import parse_scheme

INT2, INT3 = "int2-g128-asym", "int3-g128-asym"


@given(st.sets(st.integers(0, MOST_LAYERS - 1), min_size=1, max_size=80))
def test_ranges_round_trip(layers: set[int]) -> None:
    assert parse_layers(show_layers(layers), "x") == sorted(layers)


def test_ranges_are_read_as_people_write_them() -> None:
    assert parse_layers(" 7 , 0 - 3,3,2", "x") == [0, 1, 2, 3, 7] and show_layers([3, 1, 2, 9, 9]) == "1-3,9"


@pytest.mark.parametrize(
    "text",
    ["", "a", "1-", "-1", "3-1", "1,,2", "0x3", "1.5", "\u0663", "0-99999", "1-2-3", "9" * 50, "1," * 30_000 + "1"],
)
def test_other_ranges_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^--set x: .*(no layer and no range|no range of layers)") as error:
        parse_layers(text, "--set x")
    assert len(str(error.value)) < 250


def test_a_layer_beats_its_role_and_the_indexer_follows_attention() -> None:
    recipe = build_recipe({"schemes": {"routed_experts": INT2, "attention": "fp8-channel", "indexer": "fp8-channel"},
                           "layers": {"0-1,7": {"routed_experts": INT3}, 4: {"attention": "int8-g128"}, "5": {"attention": "keep", "indexer": "int8-g64"}}})  # fmt: skip
    assert [recipe.scheme("routed_experts", n).bits for n in (0, 1, 2, 7, 8)] == [3, 3, 2, 3, 2]
    assert recipe.scheme("routed_experts") == parse_scheme(INT2)
    assert recipe.scheme("indexer", 4).name == recipe.scheme("attention", 4).name == "int8-g128"
    assert recipe.scheme("indexer", 5).name == "int8-g64" and recipe.scheme("indexer", 6).name == "fp8-channel"
    assert recipe.schemes_of("routed_experts") == {parse_scheme(INT2), parse_scheme(INT3)}


def test_one_form_whatever_was_written() -> None:
    a = build_recipe({"layers": {"3": {"routed_experts": INT3}, "1-2": {"routed_experts": INT3.upper()}, "9": {}}})
    b = build_recipe({"layers": {"1-3": {"routed_experts": INT3}}})
    assert a == b and a.dump() == b.dump() and a.layers == {"1-3": {"routed_experts": INT3}}
    assert build_recipe(yaml.safe_load(a.dump())) == a and Recipe.model_validate_json(a.model_dump_json()) == a
    assert "layers" not in Recipe().dump() and "layers" not in Recipe().model_dump()


@given(
    st.dictionaries(
        st.integers(0, 70),
        st.dictionaries(
            st.sampled_from(["routed_experts", "attention", "dense_mlp"]), st.sampled_from([INT2, INT3, "keep"])
        ),
    )
)
def test_joining_loses_nothing(layers: dict[int, dict[str, str]]) -> None:
    assert split_layers(join_layers(layers)) == {layer: roles for layer, roles in layers.items() if roles}


def test_settings_beat_the_file() -> None:
    document: dict[str, Any] = {
        **named_recipe("int4"),
        "layers": {"0-3": {"routed_experts": INT3, "attention": "keep"}},
    }
    recipe = build_recipe(document, settings=[f"routed_experts@2-5={INT2}", "attention @ 1 = int8-g128"])
    assert [recipe.scheme("routed_experts", n).bits for n in range(7)] == [3, 3, 2, 2, 2, 2, 4]
    assert [recipe.scheme("attention", n).name for n in (0, 1)] == ["keep", "int8-g128"]
    assert recipe.scheme("indexer", 1).name == "int8-g128"
    plain = build_recipe(document, settings=[f"routed_experts={INT2}"])  # all layers, those of the file too
    assert {plain.scheme("routed_experts", n).bits for n in range(7)} == {2} and plain.scheme(
        "attention", 0
    ).name == "keep"
    assert document["layers"] == {"0-3": {"routed_experts": INT3, "attention": "keep"}}
    ordered = build_recipe(document, settings=[f"routed_experts={INT2}", f"routed_experts@1={INT3}"])
    assert [ordered.scheme("routed_experts", n).bits for n in (0, 1)] == [2, 3]


@pytest.mark.parametrize(("layers", "sentence"), [
    ([1, 2], r"'layers' must map layers to roles"),
    ({"0": "int4-g128"}, r"'layers\.'0'' must map layers|layers.* must map"),
    ({"0": {"routed_expert": INT3}}, "did you mean 'routed_experts'"),
    ({"0": {"router": INT3}}, "role 'router' cannot be given a scheme"),
    ({"0": {"routed_experts": "int9-g128"}}, "did you mean 'int8-g128'"),
    ({"0-4": {"routed_experts": INT3}, "4": {"routed_experts": INT2}}, "layer 4 two schemes for routed_experts"),
    ({"all": {"routed_experts": INT3}}, "'all' is no layer"),
    ({"0": {"routed_experts.w2": INT3}}, "w1, w2 and w3 of all experts of a layer have one scheme"),
    ({"0": {"w2": INT3}}, "w1, w2 and w3 of all experts of a layer have one scheme"),
])  # fmt: skip
def test_layers_that_are_refused(layers: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        build_recipe({"layers": layers})


@pytest.mark.parametrize(
    "setting", ["routed_experts@=int3-g128", "routed_experts@1", "@1=int3-g128", "routed_experts@x=int3-g128"]
)
def test_settings_that_are_refused(setting: str) -> None:
    with pytest.raises(RecipeError, match=r"--set|role ''"):
        build_recipe({}, settings=[setting])
