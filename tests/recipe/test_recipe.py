"""Recipes: what ships, precedence, and errors that name the nearest right word."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from m3quant.errors import RecipeError
from m3quant.recipe.recipe import Recipe, build_recipe, named_recipe, read_recipe_file, recipe_folder, recipe_names
from m3quant.schemes import KEEP, parse_scheme

SHIPPED = {"awq", "awq-all-int4", "awq-attn-bf16", "awq-g32", "fp8", "fp8-block", "int4"}


def test_the_shipped_recipes() -> None:
    assert set(recipe_names()) >= SHIPPED
    for name in recipe_names():
        recipe = build_recipe(named_recipe(name))
        assert recipe.name == name
        assert recipe.scheme("routed_experts").quantizes
        # engines fuse the two, so that no shipped recipe may part them
        assert recipe.scheme("indexer") == recipe.scheme("attention")
        assert recipe.calibration == ("text" if name.startswith("awq") else "none")
        first = (recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# "), f"{name}.yaml does not say what it is for"


def test_awq_is_what_the_issue_says() -> None:
    recipe = build_recipe(named_recipe("awq"))
    assert recipe.scheme("routed_experts") == parse_scheme("int4-g128") and recipe.scheme("routed_experts").symmetric
    assert {recipe.scheme(r).name for r in ("attention", "indexer", "shared_experts", "dense_mlp")} == {"int8-g128"}
    assert build_recipe(named_recipe("awq-fp8")).scheme("attention").name == "fp8-channel"
    assert build_recipe(named_recipe("awq-attn-bf16")).scheme("attention") == KEEP


def test_options_beat_the_file_and_the_file_beats_defaults() -> None:
    document = {"schemes": {"attention": "int8-channel"}, "format": "compressed-tensors", "awq": {"n_grid": 7}}
    recipe = build_recipe(document, settings=["attention=fp8-block", "routed_experts = int4-g32"], format="fp8")
    assert recipe.scheme("attention").name == "fp8-block" and recipe.scheme("routed_experts").name == "int4-g32"
    assert (recipe.format, recipe.awq.n_grid, recipe.awq.smooth) == ("fp8", 7, True)
    assert document == {"schemes": {"attention": "int8-channel"}, "format": "compressed-tensors", "awq": {"n_grid": 7}}
    assert (
        build_recipe(document, settings=["attention=keep", "attention=int4-g64"]).scheme("attention").name == "int4-g64"
    )


def test_the_indexer_follows_attention_unless_it_is_named() -> None:
    assert build_recipe({"schemes": {"attention": "int4-g64"}}).scheme("indexer").name == "int4-g64"
    both = named_recipe("awq")
    assert build_recipe(both, settings=["attention=keep"]).scheme("indexer") == KEEP
    assert (
        build_recipe(both, settings=["attention=keep", "indexer=fp8-channel"]).scheme("indexer").name == "fp8-channel"
    )


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_dumped_recipe_is_the_recipe(name: str) -> None:
    recipe = build_recipe(named_recipe(name), settings=["routed_experts=int4-g64-asym"])
    again = build_recipe(yaml.safe_load(recipe.dump()))
    assert again == recipe and again.dump() == recipe.dump()


@pytest.mark.parametrize(("text", "name"), [
    (" INT4-g128 ", "int4-g128"), ("keep", "keep"), ("bf16", "keep"), ("none", "keep"), ("int8-channel-asym", "int8-channel-asym"),
    ("int4-g16", "int4-g16"), ("int8-g256", "int8-g256"), ("fp8-block", "fp8-block"), ("int2-g64-asym", "int2-g64-asym"),
    ("int3-g128", "int3-g128"), ("int5-channel", "int5-channel"), ("Int6-g32", "int6-g32"), ("int7-g256-asym", "int7-g256-asym"),
])  # fmt: skip
def test_scheme_names_round_trip(text: str, name: str) -> None:
    assert parse_scheme(text).name == name and parse_scheme(parse_scheme(text).name) == parse_scheme(text)


@pytest.mark.parametrize(("text", "near"), [
    ("int4-g100", "int4-g128'"), ("int1-g128", "int2-g128'"), ("int9-channel-asym", "int8-channel-asym'"), ("fp8", "fp8-"),
    ("int4", "int4-"), ("fp8-blok", "fp8-block'"), ("", ""), ("int4-g128-sym", "int4-g128"), ("int3-g40-asym", "int3-g32-asym'"),
    ("int3-g", "int3-g"), ("int04-g128", "int4-g128'"), ("int\u0664-g128", "int.-g128'"),
])  # fmt: skip
def test_an_unknown_scheme_names_the_nearest(text: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown scheme '{text}': did you mean '{near}"):
        parse_scheme(text)


@pytest.mark.parametrize(("role", "near"), [
    ("routed_expert", "routed_experts"), ("experts", "routed_experts"), ("attn", "attention"), ("mlp", "dense_mlp"),
    ("shared", "shared_experts"), ("index", "indexer"),
])  # fmt: skip
def test_an_unknown_role_names_the_nearest(role: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown role '{role}': did you mean '{near}'"):
        build_recipe({"schemes": {role: "int4-g128"}})


@pytest.mark.parametrize(
    "role", ["router", "router_bias", "norm", "embedding", "lm_head", "vision", "projector", "mtp"]
)
def test_a_kept_role_says_why(role: str) -> None:
    with pytest.raises(RecipeError, match=f"role '{role}' cannot be given a scheme: .{{20,}}Leave it out"):
        build_recipe({"schemes": {role: "int4-g128"}})


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        read_recipe_file(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="is not a regular file"):
        read_recipe_file(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match="is not UTF-8"):
        read_recipe_file(tmp_path / "binary")
    (tmp_path / "code.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(RecipeError, match="is not YAML"):
        read_recipe_file(tmp_path / "code.yaml")


def test_unset_roles_are_kept() -> None:
    assert Recipe().scheme("routed_experts") == KEEP
