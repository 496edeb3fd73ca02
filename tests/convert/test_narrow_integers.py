"""Experts of 2 to 7 bits, and layers of their own widths: converted, verified, and read as compressed-tensors reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils.match import match_name

from m3quant.cli import cli
from m3quant.engines.rules import lookup_problems
from m3quant.engines.vllm.lookup import Lookup
from m3quant.errors import PlanError
from m3quant.planning.plan import Plan, role_table
from m3quant.quant.formats import round_trip
from m3quant.schemes import parse_scheme
from tests.support.convert.common import config_of, make_plan_of, make_source, run_plan, stored
from tests.support.paths import DATA, FIXTURES

TINY_M3 = FIXTURES / "tiny-m3"
MIXED = {
    "1": {"routed_experts": "int3-g64-asym", "attention": "int8-channel"},
    "2": {"routed_experts": "int2-g32-asym"},
}


def convert_tiny_m3(output: Path, settings: list[str], **document: Any) -> Plan:
    plan = make_plan_of(TINY_M3, "int4", settings, **document)
    run_plan(plan, output)
    return plan


def as_compressed_tensors_reads(output: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight by module: the config group that the library's own matching finds, through its compressor."""
    quantization, tensors = config_of(output)["quantization_config"], stored(output)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    read = {}
    for module, parts in modules.items():
        if "weight_scale" not in parts or any(match_name(module, entry) for entry in quantization["ignore"]):
            continue
        found = [
            group
            for group in quantization["config_groups"].values()
            if any(match_name(module, target) for target in group["targets"])
        ]
        assert len(found) == 1, f"{module} is in {len(found)} groups"
        scheme = QuantizationScheme.model_validate(found[0])
        widened = {**parts, "weight_scale": parts["weight_scale"].float()}
        compressor = BaseCompressor.get_value_from_registry(found[0]["format"])
        read[module] = compressor.decompress(widened, scheme)["weight"]
    return read


def assert_read_as_rounded(output: Path, plan: Plan) -> None:
    source, read = stored(TINY_M3), as_compressed_tensors_reads(output)
    quantized = {t.module: t for t in plan.tensors if t.scheme.quantizes}
    assert read.keys() == quantized.keys()
    for module, weight in read.items():
        rounded = round_trip(source[f"{module}.weight"], quantized[module].scheme)
        assert torch.equal(weight.float(), rounded), module


@pytest.mark.parametrize("scheme", ["int2-g128", "int3-g128-asym", "int5-g64", "int6-g32-asym", "int7-g128"])
def test_experts_of_any_width_are_read_as_rounded(tmp_path: Path, scheme: str) -> None:
    plan = convert_tiny_m3(tmp_path / "out", [f"routed_experts={scheme}"])
    assert_read_as_rounded(tmp_path / "out", plan)
    assert sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) == sum(
        u.bytes_out for u in plan.units
    )


def test_layers_of_their_own_schemes_are_converted_and_verified(tmp_path: Path) -> None:
    plan = convert_tiny_m3(tmp_path / "out", [], layers=MIXED)
    assert_read_as_rounded(tmp_path / "out", plan)
    result = CliRunner().invoke(cli, ["verify", str(tmp_path / "out"), "--source", str(TINY_M3)])
    assert result.exit_code == 0, result.output
    for scheme in ("int3-g64-asym", "int2-g32-asym", "int8-channel", "fp8-channel"):
        assert f"{scheme}: " in result.output
    rows = {(r["role"], r["scheme"]): r.get("layers") for r in role_table(plan) if r["action"] == "quantize"}
    assert rows[("routed_experts", "int3-g64-asym")] == "1" and rows[("routed_experts", "int2-g32-asym")] == "2"
    assert rows[("attention", "int8-channel")] == rows[("indexer", "int8-channel")] == "1"
    assert rows[("attention", "fp8-channel")] == "0,2"
    again = make_plan_of(TINY_M3, "int4", layers=MIXED)
    assert again.fingerprint() == plan.fingerprint()


def test_a_changed_code_or_zero_point_is_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    convert_tiny_m3(tmp_path / "out", ["routed_experts=int3-g128-asym"])
    shard = tmp_path / "out" / "model-00003-of-00004.safetensors"
    tensors = load_file(shard)
    names = [f"language_model.model.layers.1.block_sparse_moe.experts.{e}.w2" for e in (5, 6)]
    tensors[f"{names[0]}.weight_packed"][1, 1] ^= 0b111 << 15
    tensors[f"{names[1]}.weight_zero_point"][1, 1] ^= 0b111 << 15
    save_file(tensors, shard, metadata={"format": "pt"})
    result = CliRunner().invoke(cli, ["verify", str(tmp_path / "out"), "--source", str(TINY_M3)])
    refusal = f"{result.output}{result.exception}"
    assert result.exit_code != 0 and all(f"{name}.weight" in refusal for name in names), refusal


@pytest.mark.parametrize("family", ["m2", "m3"])
def test_every_name_the_engine_looks_up_resolves_in_every_layer(tmp_path: Path, family: str) -> None:
    source = make_source(tmp_path / "src", family, num_hidden_layers=3)
    layers = {
        "1": {"routed_experts": "int3-g32-asym", "attention": "keep"},
        "2": {"routed_experts": "keep", "attention": "int8-channel"},
    }
    plan = make_plan_of(source, "int4", ["dense_mlp=int2-g32-asym"] if family == "m3" else [], layers=layers)
    assert plan.quantization is not None
    lookup = Lookup(plan.quantization)
    for module in plan.family.engine_modules():
        stored_as = plan.modules[module.members[0]]
        for probe in module.probes:
            assert lookup.scheme(probe, expert=".experts.0." in probe) == stored_as, probe
    for number, group in enumerate(plan.quantization["config_groups"].values()):
        assert group["targets"], number
    schemes = [tuple(sorted(g["weights"].items(), key=str)) for g in plan.quantization["config_groups"].values()]
    assert len(set(schemes)) == len(schemes), "layers of one scheme share a group"
    # A target that names another layer is caught.
    for group in plan.quantization["config_groups"].values():
        group["targets"] = [re.sub(r"layers\\\.\(1\)", r"layers\\.(2)", target) for target in group["targets"]]
    assert lookup_problems(plan.family, plan.quantization, plan.modules)


def test_a_recipe_without_layers_names_none(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m3"), "int4")
    assert plan.quantization is not None and "layers" not in plan.recipe.model_dump()
    assert not any("(?=" in target for g in plan.quantization["config_groups"].values() for target in g["targets"])
    assert not any("layers" in row for row in role_table(plan))
    same = {"0-1": {"attention": "fp8-channel"}}  # what the role has anyway
    again = make_plan_of(tmp_path / "src", "int4", layers=same)
    assert again.quantization == plan.quantization


@pytest.mark.parametrize(
    ("settings", "layers", "sentence"),
    [
        (
            ["routed_experts=int3-channel-asym"],
            {},
            r"routed_experts cannot be int3-channel-asym.*groups.*=int3-g128-asym",
        ),
        ([], {"1": {"routed_experts": "int2-channel"}}, r"routed_experts cannot be int2-channel"),
        ([], {"7": {"routed_experts": "int2-g128"}}, r"layer 7 .* layers 0 to 2"),
        (
            [],
            {"0-2": {"routed_experts": "int2-g128"}},
            r"routed_experts of layer 0 .* only layers 1-2 have routed_experts",
        ),
        ([], {"1": {"dense_mlp": "keep"}}, r"dense_mlp of layer 1 .* only layers 0 have"),
        (
            [],
            {"1": {"attention": "fp8-channel", "indexer": "keep"}},
            r"layers\.1\.self_attn\.qkv_proj .* is one module",
        ),
        (["routed_experts=int3-g256"], {}, None),
    ],
)
def test_what_no_engine_runs_is_refused(settings: list[str], layers: dict[str, Any], sentence: str | None) -> None:
    if sentence is None:
        assert make_plan_of(TINY_M3, "int4", settings, layers=layers).quantization
        return
    with pytest.raises(PlanError, match=sentence):
        make_plan_of(TINY_M3, "int4", settings, layers=layers)


def test_autoawq_names_every_role_that_it_does_not_hold_and_only_those_of_the_model() -> None:
    said = r"but shared_experts is fp8-channel and dense_mlp is fp8-channel and attention is fp8-channel: .*--set dense_mlp=keep"
    with pytest.raises(PlanError, match=said):
        make_plan_of(TINY_M3, "awq-fp8", ["indexer=keep"], "autoawq")
    with pytest.raises(
        PlanError, match="but attention is fp8-channel: "
    ):  # M2 has neither shared experts nor dense MLPs
        make_plan_of(TINY_M3.with_name("tiny-m2"), "awq-fp8", [], "autoawq")


def test_autoawq_has_no_layers_and_no_other_width() -> None:
    with pytest.raises(PlanError, match=r"'autoawq' holds int4 only, but routed_experts is int3-g128"):
        make_plan_of(TINY_M3, "awq-attn-bf16", ["routed_experts=int3-g128"], "autoawq")
    with pytest.raises(PlanError, match=r"'autoawq' has one scheme for the whole model.*'layers'"):
        make_plan_of(TINY_M3, "awq-attn-bf16", [], "autoawq", layers={"1": {"routed_experts": "int4-g64"}})


@pytest.mark.parametrize(("shape", "scheme", "sentence"), [
    ({"intermediate_size": 96}, "int3-g64", r"w2\.weight.*groups 64 input columns.*96"),
    ({"intermediate_size": 80}, "int3-g16-asym", r"w1\.weight.*zero points of output rows.*32 at a time.*80"),
    ({"intermediate_size": 48}, "int5-g16", r"w2\.weight.*input columns.*32 at a time.*48"),
])  # fmt: skip
def test_sizes_that_do_not_fill_words_are_refused(
    tmp_path: Path, shape: dict[str, int], scheme: str, sentence: str
) -> None:
    source = make_source(tmp_path / "src", "m2", **shape)
    with pytest.raises(PlanError, match=sentence):
        make_plan_of(source, "int4", [f"routed_experts={scheme}"])


@pytest.mark.parametrize(("scheme", "phrases"), [
    ("int4-g128", []), ("int8-g128-asym", [r"zero points: vLLM without pull request 44025.*SGLang"]), ("int4-g32-asym", [r"44025"]), ("int3-g128-asym", [r"vLLM 0\.29\.0 or newer"]),
    ("int2-g64", [r"vLLM 0\.29\.0 or newer.*SGLang.*AutoAWQ", r"int2-g64: Humming 0\.1\.19.*prefer int2-g64-asym"]),
    ("int4-channel", [r"--moe-backend marlin"]),
])  # fmt: skip
def test_the_plan_says_which_engines_read_it(scheme: str, phrases: list[str]) -> None:
    notes = make_plan_of(TINY_M3, "int4", [f"routed_experts={scheme}"]).notes
    assert len(notes) == len(phrases)
    for note, phrase in zip(notes, phrases, strict=True):
        assert re.search(phrase, note), note


def test_the_plan_of_m3_at_two_bits_is_the_arithmetic_of_its_shapes() -> None:
    """57 layers of 128 experts of three 3072 x 6144 matrices at 2 bits, a 16-bit scale and a 2-bit zero point for every 128."""
    from m3quant.recipe.recipe import build_recipe, named_recipe
    from m3quant.runtime.model import open_subject

    config = DATA / "minimax-m3" / "config.json"
    subject = open_subject(str(config))
    recipe = build_recipe(
        named_recipe("int4"), settings=["routed_experts=int2-g128-asym", "routed_experts@3-6=int3-g128-asym"]
    )
    groups = subject.converted(recipe).groups
    weights, each = 57 * 128 * 3 * 3072 * 6144, 128 * 3 * 3072 * 6144
    shapes = 57 * 128 * 3 * 16
    experts = sum(g.engine_bytes for g in groups if g.role == "routed_experts")
    three_bits_more = 4 * each * (1 + 1 / 128) / 8
    assert experts == weights * (2 + 16 / 128 + 2 / 128) / 8 + three_bits_more + shapes
    assert subject.converted(recipe).schemes == {
        parse_scheme(s) for s in ("int2-g128-asym", "int3-g128-asym", "fp8-channel")
    }
