"""Every recipe's output loaded by transformers and compressed-tensors computes what is stored, past the reach of block selection."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m3quant.recipe.recipe import recipe_names
from m3quant.verify.transformers_reader import limits, transformers_check
from m3quant.verify.verification import Check, verify
from tests.support.convert.common import make_source, run_convert

# fp8-block and awq-attn-bf16 are among what transformers does not read of M3 (`limits`).
RECIPES = [name for name in recipe_names() if name not in ("fp8-block", "awq-attn-bf16")]


def converted(folder: Path, family: str, to: str, **options: object) -> Path:
    out = folder / "out"
    rounding = {"rounding": "nearest"} if to.startswith("awq") else {}
    run_convert(make_source(folder / "src", family), out, to, **{**rounding, **options})  # type: ignore[arg-type]
    return out


def checked(out: Path) -> Check:
    result, plan = verify(out, None, lambda _: None)
    assert result.holds, [check.problems for check in result.checks]
    return transformers_check(out, plan, lambda _: None)[0]


@pytest.mark.parametrize("to", RECIPES)
def test_m3s_outputs(tmp_path: Path, to: str) -> None:
    out = converted(tmp_path, "m3", to)
    check = checked(out)
    assert not check.problems and "log-probs of 1022 tokens" in check.looked_at, check


@pytest.mark.parametrize("to", ["awq", "awq-attn-bf16", "fp8"])
def test_m2s_outputs(tmp_path: Path, to: str) -> None:
    assert not checked(converted(tmp_path, "m2", to)).problems


def test_a_reader_that_leaves_index_projections_out_is_caught(tmp_path: Path) -> None:
    """As outputs were before transformers' name of the indexer was a target: it loads, and computes something else."""
    out = converted(tmp_path, "m3", "fp8")
    result, plan = verify(out, None, lambda _: None)
    assert result.holds
    config = json.loads((out / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["targets"] = [target.replace(r"|indexer\.(q|k)_proj", "") for target in group["targets"]]
    (out / "config.json").write_text(json.dumps(config))
    check, facts = transformers_check(out, plan, lambda _: None)
    assert any("does not know 2 weights" in problem for problem in check.problems), check
    assert facts["mean"] > 1e-2 and any("differ from the stored weights" in problem for problem in check.problems)


def test_what_transformers_does_not_read_is_said_before_it_is_tried(tmp_path: Path) -> None:
    from tests.support.convert.common import make_plan_of

    source = make_source(tmp_path / "m3", "m3")
    for settings, words in (
        (["dense_mlp=keep"], "dense_mlp unquantized with integer experts"),
        (["routed_experts=int4-g64-asym"], "drops their zero points"),
        (["routed_experts=fp8-channel", "dense_mlp=keep"], ""),
        (["dense_mlp=int8-g64-asym"], "dense_mlp in int8-g64-asym: transformers joins gate and up"),
    ):
        found = limits(make_plan_of(source, "int4", settings))
        assert (not found and not words) or any(words in sentence for sentence in found), found
    block = make_plan_of(make_source(tmp_path / "m2", "m2"), "fp8-block", format="compressed-tensors")
    assert "one scale a row" in limits(block)[0]
    assert "use --engine" in limits(make_plan_of(tmp_path / "m2", "fp8-block", format="fp8"))[0]
