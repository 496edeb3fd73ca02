"""SGLang by its source: which outputs it is given, with what flags, and which it would load to answer wrongly."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from m3quant.checkpoint import Checkpoint
from m3quant.engines import engine_named
from m3quant.planning.plan import make_plan
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.fit import Ask, Fit, assess
from m3quant.runtime.hardware import parse_node
from m3quant.runtime.model import open_subject
from tests.support.paths import FIXTURES, TESTS

SGLANG = engine_named("sglang")
MIXED = {"attention": "int8-g128", "shared_experts": "int8-g128", "dense_mlp": "int8-g128"}
FIGURES = TESTS / "benchmarks" / "figures" / "sglang_schemes.json"


def fit_of(model: str, recipe: str | dict[str, str]) -> Fit:
    """The output with its config.json as a conversion writes it."""
    schemes = {"attention": "int8-g128"} if model == "tiny-m2" else MIXED
    document = named_recipe(recipe) if isinstance(recipe, str) else {"rounding": "nearest", "schemes": schemes | recipe}
    made = build_recipe(document)
    plan = make_plan(Checkpoint.open(FIXTURES / model), made)
    subject = open_subject(str(FIXTURES / model))
    output = replace(subject.converted(made), config={**subject.config, "quantization_config": plan.quantization})
    return assess(output, parse_node("1xH200"), Ask(engine="sglang"))


@pytest.mark.parametrize(
    ("model", "recipe", "flags"),
    [
        ("tiny-m2", "awq", []),
        ("tiny-m2", "fp8", []),
        ("tiny-m3", "awq", ["--disable-shared-experts-fusion", "--moe-runner-backend", "triton"]),
        ("tiny-m3", "awq-g32", ["--disable-shared-experts-fusion", "--moe-runner-backend", "triton"]),
        ("tiny-m3", "fp8", ["--disable-shared-experts-fusion"]),
    ],
)
def test_m3s_experts_need_flags(model: str, recipe: str, flags: list[str]) -> None:
    fit = fit_of(model, recipe)
    assert fit.fits, fit.why_not
    command = fit.command()
    assert [
        word for word in command if word in ("--disable-shared-experts-fusion", "--moe-runner-backend", "triton")
    ] == flags
    vllm = assess(fit.model, fit.node, Ask()).command()
    assert not set(flags) & set(vllm)


@pytest.mark.parametrize(
    ("model", "experts", "refused"),
    [("tiny-m3", "int8-g128", True), ("tiny-m3", "int4-g64", True), ("tiny-m3", "int4-g128-asym", True), ("tiny-m2", "int8-g128", False), ("tiny-m2", "int4-g64", False)],
)  # fmt: skip
def test_experts_that_would_lose_m3s_activation_are_refused(model: str, experts: str, refused: bool) -> None:
    fit = fit_of(model, {"routed_experts": experts})
    assert (not fit.fits and not fit.loads) == refused, fit.why_not
    assert not refused or f"runs experts of M3's activation in {experts} without its alpha and limit" in fit.why_not


def test_another_top_format_is_refused_with_the_key_to_set() -> None:
    config = fit_of("tiny-m2", "awq").model.config
    section = {**config["quantization_config"], "format": "mixed-precision"}
    said = SGLANG.checkpoint_refusal({**config, "quantization_config": section}, None)
    assert "states the format 'pack-quantized' for all (here 'mixed-precision')" in said


@pytest.mark.parametrize(
    "groups", [None, [], {"a": 3}, {"a": {"weights": {}}}, {"a": {"weights": {"num_bits": 4}, "targets": 5}}]
)
def test_a_config_that_states_nothing_is_nobodys_refusal(groups: Any) -> None:
    config = {
        "hidden_act": "swigluoai",
        "quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups},
    }
    assert SGLANG.checkpoint_refusal(config, None) == ""


@pytest.mark.parametrize("release", ["0.5.17", "0.5.23"])
def test_the_sources_say_what_is_refused(release: str) -> None:
    """Figures of tests/benchmarks/sglang_schemes.py: what its own code finds, output by output."""
    found = json.loads(FIGURES.read_text(encoding="utf-8"))[release]
    for output in found["outputs"]:
        rows = output.get("found", {})
        errors = [row["error"] for row in rows.values() if "error" in row]
        if output["recipe"] == "2 bits":
            assert any("only pack-quantized is supported for the following bits: [4, 8]" in error for error in errors)
        elif output["model"] == "tiny-m2":
            assert not errors, output
        for scheme, hands in output.get("hands_over_alpha", {}).items():
            assert hands == (scheme == "CompressedTensorsWNA16TritonMoE")
