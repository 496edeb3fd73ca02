"""What an engine makes of the output is checked before a weight is read: fused modules, looked-up names, formats."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3quant.engines.rules import lookup_problems
from m3quant.engines.vllm.lookup import Lookup
from m3quant.errors import CheckpointError, PlanError
from m3quant.planning.plan import Plan
from m3quant.recipe.recipe import recipe_names
from m3quant.schemes import KEEP, parse_scheme
from tests.support.convert.common import config_of, make_plan_of, make_source, rewrite, served_format, stored


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engine-rules")
    return {family: make_source(folder / family, family) for family in ("m2", "m3")}


def problems(plan: Plan, qconfig: dict[str, Any]) -> list[str]:
    return lookup_problems(plan.family, qconfig, plan.modules)


def test_the_deepseek_fp8_format_is_refused_for_m3(sources: dict[str, Path]) -> None:
    with pytest.raises(
        PlanError, match=r"format 'fp8' cannot be served for minimax_m3_vl.*--format compressed-tensors"
    ):
        make_plan_of(sources["m3"], "fp8-block")
    make_plan_of(sources["m2"], "fp8-block")


@pytest.mark.parametrize("attention", ["fp8-channel", "int4-g128"])
def test_the_indexer_cannot_stay_behind_attention(sources: dict[str, Path], attention: str) -> None:
    with pytest.raises(PlanError, match=r"layers\.1\.self_attn\.qkv_proj \(q, k, v, index_q, index_k\) is one module.*"
                       r"\.q_proj.*\.index_q_proj.*one scheme"):  # fmt: skip
        make_plan_of(sources["m3"], "int4", [f"attention={attention}", "indexer=keep"])


def test_the_indexer_cannot_go_before_attention(sources: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match=r"qkv_proj \(q, k, v, index_q, index_k\).*fp8-channel .*keep "):
        make_plan_of(sources["m3"], "int4", ["attention=keep", "indexer=fp8-channel"])


def test_the_indexer_follows_attention_when_it_is_not_named(sources: dict[str, Path]) -> None:
    plan = make_plan_of(sources["m3"], "int4", ["attention=int8-channel"])
    assert plan.modules["language_model.model.layers.1.self_attn.index_k_proj"] == parse_scheme("int8-channel")
    assert not any("index" in module for module in make_plan_of(sources["m2"], "int4").modules)


@pytest.mark.parametrize("family", ["m2", "m3"])
def test_one_scheme_for_every_member_of_a_fused_module(sources: dict[str, Path], family: str) -> None:
    """Schemes that no recipe can give, as a family with a wrong role would: each is named with its fused module."""
    plan = make_plan_of(sources[family], "int4")
    assert plan.quantization is not None
    for module in plan.family.engine_modules():
        if len(module.members) > 1:
            odd = {**plan.modules, module.members[-1]: KEEP}
            found = lookup_problems(plan.family, plan.quantization, odd)
            assert len(found) == 1 and module.fused_name in found[0] and module.members[-1] in found[0]
    fused = [m.fused_name for m in plan.family.engine_modules() if len(m.members) > 1]
    assert any("gate_up_proj" in name for name in fused) == (family == "m3")


VARIANTS = [
    *((name, (), None) for name in recipe_names()),
    ("int4", ("attention=keep",), None),
    ("int4", ("routed_experts=keep",), None),
    ("int4", ("shared_experts=keep", "dense_mlp=keep"), None),
    ("fp8-block", ("attention=keep",), None),
    ("fp8-block", ("routed_experts=keep",), None),
    ("fp8-block", ("shared_experts=keep", "dense_mlp=keep"), None),
    ("awq-all-int4", (), "autoawq"),
    ("awq-attn-bf16", (), "autoawq"),
]


@pytest.mark.parametrize("family", ["m2", "m3"])
@pytest.mark.parametrize(("to", "settings", "fmt"), VARIANTS, ids=lambda v: "+".join(v) if isinstance(v, tuple) else v)
def test_every_name_the_engine_looks_up_resolves_to_what_is_stored(
    sources: dict[str, Path], family: str, to: str, settings: tuple[str, ...], fmt: str | None
) -> None:
    plan = make_plan_of(sources[family], to, settings, served_format(family, to, fmt))
    assert plan.quantization is not None and problems(plan, plan.quantization) == []
    probes, lookup = 0, Lookup(plan.quantization)
    for module in plan.family.engine_modules():
        stored_as = plan.modules[module.members[0]]
        for probe in module.probes:
            probes += 1
            seen = lookup.scheme(probe, expert=".experts.0." in probe)
            if plan.recipe.format == "autoawq":  # has no word for symmetric
                assert (seen.kind, seen.group_size) == (stored_as.kind, stored_as.group_size), probe
            else:
                assert seen == stored_as, probe
    assert probes >= 14
    for name in ("lm_head", "model.layers.0.block_sparse_moe.gate", "language_model.lm_head", "language_model.model.layers.1.block_sparse_moe.gate"):  # fmt: skip
        if plan.recipe.format == "compressed-tensors":
            assert lookup.scheme(name) == KEEP


def retarget(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(qconfig: dict[str, Any]) -> None:
        hits = 0
        for group in qconfig["config_groups"].values():
            hits += sum(old in target for target in group["targets"])
            group["targets"] = [target.replace(old, new) for target in group["targets"]]
        assert hits

    return change


def ignore(pattern: str) -> Callable[[dict[str, Any]], None]:
    return lambda qconfig: qconfig["ignore"].append(pattern)


def drop_first_group(qconfig: dict[str, Any]) -> None:
    del qconfig["config_groups"]["group_0"]


def other_bits(qconfig: dict[str, Any]) -> None:
    qconfig["config_groups"]["group_0"]["weights"]["num_bits"] = 8


def other_group(qconfig: dict[str, Any]) -> None:
    qconfig["config_groups"]["group_0"]["weights"]["group_size"] = 32


@pytest.mark.parametrize(("family", "change", "named"), [
    ("m2", retarget(r".*\.experts\.", r".*block_sparse_moe\.experts\."), r"layers\.0\.mlp\.experts\.0\.w1"),
    ("m3", retarget("w[123]|gate_proj|up_proj|down_proj", "w[123]"), r"experts\.0\.gate_proj"),
    ("m3", retarget("qkv_proj|", ""), r"self_attn\.qkv_proj"),
    ("m3", ignore("re:.*gate.*"), r"gate"),
    ("m3", ignore(r"re:.*layers\.1\.self_attn.*"), r"layers\.1\.self_attn"),
    ("m2", ignore("re:.*self_attn.*"), r"self_attn"),
    ("m2", drop_first_group, "experts"),
    ("m3", other_bits, "int8-g128"),
    ("m2", other_group, "int4-g32"),
])  # fmt: skip
def test_wrong_targets_are_caught(
    sources: dict[str, Path], family: str, change: Callable[[dict[str, Any]], None], named: str
) -> None:
    """The silent traps of facts 4: a pattern that misses the name under which vLLM asks."""
    plan = make_plan_of(sources[family], "int4")
    qconfig = copy.deepcopy(plan.quantization)
    assert qconfig is not None
    change(qconfig)
    found = problems(plan, qconfig)
    assert found
    import re

    assert any(re.search(named, sentence) for sentence in found), found


def test_fp8_that_forgets_a_kept_projection_is_caught(sources: dict[str, Path]) -> None:
    plan = make_plan_of(sources["m2"], "fp8-block", ["attention=keep"])
    qconfig = copy.deepcopy(plan.quantization)
    assert qconfig is not None
    qconfig["modules_to_not_convert"].remove("model.layers.1.self_attn.k_proj")
    assert any("layers.1.self_attn" in sentence for sentence in problems(plan, qconfig))


@pytest.mark.parametrize(("quantization", "words"), [
    ({"quant_method": "awq", "bits": 4}, "awq"), ({"quant_method": "gptq"}, "gptq"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"), ({"bits": 4}, "None"),
])  # fmt: skip
def test_a_source_that_is_quantized_already_is_refused(
    sources: dict[str, Path], tmp_path: Path, quantization: dict[str, Any], words: str
) -> None:
    config = {**config_of(sources["m2"]), "quantization_config": quantization}
    source = rewrite(tmp_path / "src", stored(sources["m2"]), config)
    with pytest.raises(
        CheckpointError,
        match=f"says quant_method '?{words}'?, .*: this checkpoint is quantized already.*Start from the BF16",
    ):
        make_plan_of(source, "int4")


@pytest.mark.parametrize(("leaf", "words"), [
    ("weight_packed", r"is BF16 but config\.json has no quantization_config: restore the release's config\.json"),
    ("qweight", r"is of .*AWQ or GPTQ.*Start from the BF16"),
    ("g_idx", r"is of .*GPTQ.*Start from the BF16"),
    ("weight_scale", r"has no quantized weight 'model\.layers\.0\.self_attn\.q_proj\.weight': the download is incomplete"),
])  # fmt: skip
def test_tensors_of_a_quantized_checkpoint_are_refused_whatever_config_says(
    sources: dict[str, Path], tmp_path: Path, leaf: str, words: str
) -> None:
    tensors = stored(sources["m2"])
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.{leaf}"] = tensors.pop(f"{name}.weight")
    with pytest.raises(CheckpointError, match=rf"{name}\.{leaf}' {words}"):
        make_plan_of(rewrite(tmp_path / "src", tensors, config_of(sources["m2"])), "int4")


def test_an_own_output_cannot_be_a_source(sources: dict[str, Path], tmp_path: Path) -> None:
    from tests.support.convert.common import run_convert

    run_convert(sources["m2"], tmp_path / "out", "int4")
    with pytest.raises(PlanError, match=r"quantized already, to 4-bit integers.*--requantize"):
        make_plan_of(tmp_path / "out", "fp8")


def test_an_unknown_architecture_is_told_which_file_to_write(sources: dict[str, Path], tmp_path: Path) -> None:
    config = {**config_of(sources["m2"]), "model_type": "minimax_m4", "architectures": ["MiniMaxM4ForCausalLM"]}
    source = rewrite(tmp_path / "src", stored(sources["m2"]), config)
    with pytest.raises(CheckpointError, match=r"'minimax_m4'.*write a file in m3quant/families.*families/__init__\.py"):
        make_plan_of(source, "int4")


def test_windows_that_never_exercise_block_selection_are_noted(tmp_path: Path) -> None:
    source = make_source(tmp_path / "m3", "m3")
    plan = make_plan_of(source)
    covered = plan.family.selected_tokens
    assert covered > 0
    for length, noted in ((covered, True), (covered + 1, False)):
        notes = make_plan_of(source, data={"window_length": length}).notes
        assert any("never exercise block selection" in note for note in notes) == noted
