"""Integers of 2 to 7 bits: which engines serve them, what they weigh on a rank, and how groups divide over ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3quant.engines import DEFAULT as VLLM
from m3quant.engines import Installed, engine_named
from m3quant.engines.integers import is_narrow
from m3quant.engines.rules import check_schemes
from m3quant.engines.stated import config_schemes
from m3quant.errors import EngineMissing, PlanError
from m3quant.families import family_of
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.engine_notes import weight_notes
from m3quant.runtime.fit import Ask, assess
from m3quant.runtime.hardware import parse_node
from m3quant.runtime.model import ServedModel, open_subject
from m3quant.runtime.serve import prepare
from m3quant.runtime.serve_recipe import ServeRecipe
from m3quant.runtime.weights import Split, rank_weights, split_problem, stored_bytes
from m3quant.schemes import INT_BITS, Scheme, parse_scheme
from tests.support.convert.common import make_plan_of, make_source, run_plan
from tests.support.paths import DATA

M3 = DATA / "minimax-m3" / "config.json"
M2 = DATA / "minimax-m2.7" / "config.json"
NEW = Installed("vllm", "python", "0.33.0", frozenset(), True)


def full_m3(*settings: str) -> ServedModel:
    return open_subject(str(M3)).converted(build_recipe(named_recipe("int4"), settings=settings))


@pytest.mark.parametrize("bits", INT_BITS)
@pytest.mark.parametrize(("version", "old"), [("0.28.1", True), ("0.26.0", True), ("0.29.0", False), ("0.33.0", False)])
def test_vllm_before_029_reads_four_and_eight_bits_only(bits: int, version: str, old: bool) -> None:
    schemes, installed = [Scheme("int", bits, 128), Scheme("fp8", 8)], replace(NEW, version=version)
    if old and bits not in (4, 8):
        with pytest.raises(
            EngineMissing, match=rf"vLLM {version} does not read integers of {bits} bits.*install 0\.29\.0"
        ):
            check_schemes(VLLM, installed, schemes)
    else:
        check_schemes(VLLM, installed, schemes)
    m2 = family_of(json.loads(M2.read_text()), "config.json")  # of which every release known has the architecture
    assert VLLM.first_release(m2, schemes) == ("" if bits in (4, 8) else "0.29.0")


def test_sglang_is_refused_by_name_installed_or_not() -> None:
    sglang = engine_named("sglang")
    for installed in (None, replace(NEW, name="sglang", version="0.5.23")):
        with pytest.raises(EngineMissing, match=r"SGLang does not read integers of 2 and 3 bits.*vLLM 0\.29\.0"):
            check_schemes(sglang, installed, [parse_scheme("int3-g128"), parse_scheme("int2-g64-asym")])
        check_schemes(sglang, installed, [parse_scheme("int4-g128"), parse_scheme("fp8-channel")])


def test_serve_refuses_an_engine_that_cannot_read_the_output(tmp_path: Path) -> None:
    source = make_source(tmp_path / "src", "m2")
    run_plan(make_plan_of(source, "int4", ["routed_experts=int3-g32-asym"]), tmp_path / "out")
    recipe, said = ServeRecipe(engine="sglang", node="1xH200"), list[str]()
    with pytest.raises(EngineMissing, match="SGLang does not read integers of 3 bits"):
        prepare(str(tmp_path / "out"), recipe, None, None, None, dry=True, pinning=False, say=said.append)
    prepare(
        str(tmp_path / "out"), ServeRecipe(node="1xH200"), None, None, None, dry=True, pinning=False, say=said.append
    )
    assert any("int3-g32-asym: vLLM 0.29.0 or newer" in line for line in said)


def test_notes_of_a_plan_for_a_node() -> None:
    def notes(*settings: str) -> list[str]:
        return weight_notes(assess(full_m3(*settings), parse_node("1xH200"), Ask()))

    assert any("prefer int2-g128-asym" in note for note in notes("routed_experts=int2-g128"))
    assert [
        note.split(":")[0] for note in notes("routed_experts=int2-g128-asym", "routed_experts@3=int3-g64-asym")
    ] == ["int2-g128-asym, int3-g64-asym"]
    assert notes() == []
    # Zero points of experts at a width that every engine reads; of attention alone they are nothing new.
    for experts, said in (("int4-g128-asym", True), ("int8-g128-asym", True), ("int4-g128", False)):
        found = notes(f"routed_experts={experts}", "attention=int8-g128-asym", "indexer=int8-g128-asym")
        assert any("routed experts with zero points: vLLM without pull request 44025" in note for note in found) == said


@pytest.mark.parametrize(
    ("scheme", "bits"), [("int2-g128-asym", 2 + 18 / 128), ("int3-g64", 3.25), ("int5-g128-asym", 5 + 21 / 128)]
)
def test_a_rank_holds_its_share(scheme: str, bits: float) -> None:
    model = full_m3(f"routed_experts={scheme}")
    expected = 57 * 128 * (3 * 3072 * 6144 * bits / 8)
    shapes = 57 * 128 * 3 * 16
    for tp in (1, 2, 4, 8):
        weights = rank_weights(model.groups, Split(tp), 4, 60)[0]["routed_experts"]
        assert weights == expected / tp + shapes, f"TP {tp}"
    assert stored_bytes(model.groups) == model.stored_bytes


def test_groups_divide_per_rank() -> None:
    """w2 has 3,072 columns: at TP 16 a rank has 192, which groups of 128 do not divide and groups of 64 do."""
    text = json.loads(M3.read_text())["text_config"]
    selection = {**text["sparse_attention_config"], "sparse_num_index_heads": 16}
    sixteen = {"num_key_value_heads": 16, "sparse_attention_config": selection}
    config = json.loads(M3.read_text()) | {"text_config": {**text, **sixteen}}
    family = family_of(config, "config.json")
    for size, fits in ((128, False), (64, True)):
        model = full_m3(f"routed_experts=int3-g{size}-asym", "attention=keep", "shared_experts=keep", "dense_mlp=keep")
        problem = split_problem(model.groups, Split(16), family)
        assert (problem == "") == fits, problem
        assert fits or "routed_experts w2: its 24 scale blocks or groups do not divide by TP 16" in problem
        assert not split_problem(model.groups, Split(16, expert_parallel=True), family)


def test_a_scheme_that_no_kernel_runs_is_refused_before_its_memory_is_judged() -> None:
    with pytest.raises(PlanError, match="routed_experts cannot be int2-channel"):
        full_m3("routed_experts=int2-channel")


def test_schemes_of_a_config() -> None:
    group = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128}
    config: dict[str, Any] = {
        "quantization_config": {"config_groups": {"a": {"weights": group}, "b": {"weights": None}}}
    }
    assert config_schemes(config) == {parse_scheme("int3-g128-asym")}
    assert config_schemes({"text_config": config}) == {parse_scheme("int3-g128-asym")}
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    assert {s.bits for s in config_schemes({"quantization_config": awq})} == {4}
    fp4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 16}
    assert config_schemes({"quantization_config": {"config_groups": {"a": {"weights": fp4}}}}) == frozenset()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["int", "float", "group", "channel"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["num_bits", "type", "symmetric", "strategy", "group_size", "x"]), inner, max_size=5),
)  # fmt: skip


@given(JSON)
def test_a_config_of_any_form_gives_schemes_and_no_error(weights: Any) -> None:
    for config in (
        {"config_groups": {"g": {"weights": weights}}},
        {"config_groups": weights},
        {"quant_method": "awq", "bits": weights},
        weights,
    ):
        assert all(isinstance(is_narrow(s), bool) for s in config_schemes({"quantization_config": config}))
