"""Names that people bring from other tools, and what a wrong one is answered with."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from m3quant.cli.options import Length, TokenCount
from m3quant.errors import RecipeError
from m3quant.recipe.nearest import meant
from m3quant.recipe.recipe import build_recipe, every_name, named_recipe, recipe_names, scheme_recipe
from m3quant.schemes import parse_scheme
from tests.support.cli.shell import Shell
from tests.support.paths import DATA, FIXTURES

M2 = FIXTURES / "tiny-m2"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("AWQ", "--to awq?"), ("gptq", "--to awq, which feeds"), ("int3", "routed_experts=int3-g128-asym"), ("W8A16", "int8-g128,"), ("W4A16", "--scheme W4A16"),
        ("fp8_dynamic", "--to fp8?"), ("rtn", "--to int4,"), ("nvfp4", "not written"), ("awq-g64", "--to awq-g32?"), ("zzz", "m3quant recipes lists"),
    ],
)  # fmt: skip
def test_what_a_wrong_recipe_meant(name: str, told: str) -> None:
    assert told in meant(name, every_name())
    with pytest.raises(RecipeError, match="Known: awq, "):
        named_recipe(name)


@pytest.mark.parametrize(("name", "near"), [("int4", "int4-g128"), ("W8A16", "int8-g128"), ("fp8", "fp8-channel")])
def test_what_a_wrong_scheme_meant(name: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"did you mean '{near}'"):
        parse_scheme(name)


@pytest.mark.parametrize(
    ("name", "scheme", "rounding"),
    [
        ("W4A16", "int4-g128", "feedback"),
        ("fp8_block", "fp8-block", "nearest"),
        ("int3-g64-asym", "int3-g64-asym", "feedback"),
    ],
)
def test_one_scheme_for_all_by_either_name(name: str, scheme: str, rounding: str) -> None:
    recipe = build_recipe(scheme_recipe(name))
    assert set(recipe.schemes.values()) == {scheme} and recipe.rounding == rounding


def test_names_of_other_tools_are_ours(shell: Shell) -> None:
    config = DATA / "minimax-m2.7" / "config.json"
    ours = shell("plan", config, "--to", "awq", "--on", "2xH200", "--context", "131072", "--tp", "2", "--json")
    theirs = shell(
        "plan",
        config,
        "--to",
        "awq",
        "--on",
        "2xH200",
        "--max-model-len",
        "128k",
        "--tensor-parallel-size",
        "2",
        "--json",
    )
    assert ours.code == theirs.code == 0 and ours.json == theirs.json


def test_k_is_1024_of_a_length_and_1000_of_text() -> None:
    assert Length().convert("128k", None, None) == Length().convert("131,072", None, None) == 131072
    assert TokenCount().convert("800k", None, None) == 800_000
    assert (Length().convert("1.5k", None, None), TokenCount().convert("1.1M", None, None)) == (1536, 1_100_000)


@pytest.mark.parametrize("text", ["1.1k", "0.5", "1000.4"])
def test_a_part_of_a_token_is_refused_and_not_rounded(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no whole number of tokens"):
        Length().convert(text, None, None)


def test_a_message_names_the_option_as_it_is_written(shell: Shell) -> None:
    assert "--gpu-memory-utilization says" in shell.refuses("plan", M2, "--gpu-memory-utilization", "0.8")
    assert "--recipe and --scheme are both given" in shell.refuses(
        "plan", M2, "--scheme", "W4A16", "--recipe", "x.yaml"
    )


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [("--windows", "0", "x>=1"), ("--window-length", "8", "between 16 and"), ("--max-seq-length", "-5", "128k")],
)
def test_a_number_that_is_wrong_is_told_by_its_option(
    shell: Shell, tmp_path: Path, option: str, value: str, told: str
) -> None:
    line = shell.refuses("convert", M2, tmp_path / "out", option, value)
    assert option in line and told in line


def test_an_old_spelling_works_with_a_warning(shell: Shell, tmp_path: Path) -> None:
    told = shell("convert", M2, tmp_path / "out", "--to", "int4", "--engine", "local", "--dry-run")
    assert told.code == 0 and "warning: --engine local is what happens without it" in told.err


def test_recipes_are_listed(shell: Shell) -> None:
    listed = shell("recipes", "--json").json
    assert [r["name"] for r in listed["recipes"]] == every_name()
    for command in (["recipes"], ["plan", "--list"], ["convert", "--list"]):
        out = shell(*command).out
        assert all(name in out for name in (*recipe_names(), "routed_experts", "W4A16", "fp8-block"))


def test_a_dry_run_looks_at_what_the_run_looks_at(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "out"
    awq = ["convert", M2, out, "--to", "awq", "--device", "cpu", "--dry-run"]
    assert "nowhere.jsonl" in shell.refuses(*awq, "--calibration", "nowhere.jsonl")
    assert "suite" in shell.refuses(*awq, "--eval", "nowhere.yaml")
    assert "no such device" in shell.refuses("convert", M2, out, "--to", "int4", "--dry-run", "--device", "tpu")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "not empty" in shell.refuses("convert", M2, tmp_path / "full", "--to", "int4", "--dry-run")
    done = shell("convert", M2, out, "--to", "awq", "--windows", "4", "--device", "cpu", "--dry-run")
    assert done.code == 0 and f"output folder {out}: new" in done.out and "on a CPU of" in done.out and not out.exists()
    planned = shell("convert", M2, out, "--to", "int4", "--device", "cpu", "--dry-run", "--json").json
    assert planned["dry_run"]["found"].startswith("new") and planned["estimate"]["machine"].startswith("a CPU of")


def test_a_conversion_ends_with_a_summary_and_a_command_to_paste(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "with space"
    told = shell("convert", M2, out, "--to", "int4", "--device", "cpu")
    assert f"next: m3quant verify '{out}' --source {M2}" in told.out
    told = shell("convert", M2, out, "--to", "int4", "--device", "cpu", "--json")
    assert told.json["manifest"] == str(out / "m3quant.json") and len(told.out) < 2000
    assert "complete already" in shell("convert", M2, out, "--to", "int4", "--device", "cpu", "--dry-run").out
    assert "is complete and was made" in shell.refuses(
        "convert", M2, out, "--to", "fp8", "--device", "cpu", "--dry-run"
    )
