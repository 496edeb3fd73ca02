"""What is copied is never claimed by the output's quantization_config, under any name that an engine or transformers gives it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from m3quant.checkpoint import Checkpoint, patterns
from m3quant.errors import CheckpointError
from m3quant.families import Role
from m3quant.planning.engine_kept import IgnoreList, kept_linears, kept_problems
from m3quant.planning.plan import Plan
from tests.support.convert.common import config_of, make_plan_of, make_source, rewrite, run_plan, stored
from tests.support.convert.sources import quantized_source

OUTPUTS = [("int4", None), ("awq-attn-bf16", None), ("fp8", None), ("awq-all-int4", "autoawq"), ("fp8-block", "fp8")]
PREFIX = {"m2": "model.layers", "m3": "language_model.model.layers"}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources with what engines may build outside the decoder: numbered MTP layers, `mtp.` ones and unknown modules."""
    folder, made = tmp_path_factory.mktemp("kept"), {}
    for family, prefix in PREFIX.items():
        source = make_source(folder / f"{family}-plain", family)
        tensors = stored(source)
        for number in (2, 3):
            tensors |= {
                k.replace(f"{prefix}.1.", f"{prefix}.{number}."): v.clone()
                for k, v in tensors.items()
                if k.startswith(f"{prefix}.1.")
            }
            tensors[f"{prefix}.{number}.eh_proj.weight"] = torch.ones(8, 16).bfloat16()
        root = prefix.removesuffix("layers")
        for name in (
            "mtp.layers.0.eh_proj",
            "mtp.layers.0.transformer_layer.self_attn.q_proj",
            "mtp.layers.0.transformer_layer.mlp.experts.0.w1",
        ):
            tensors[f"{root}{name}.weight"] = torch.ones(8, 16).bfloat16()
        tensors[f"{prefix}.0.mlp.experts.0.extra.gate_proj.weight"] = torch.ones(8, 16).bfloat16()
        tensors["adapter.experts.0.w1.weight"] = torch.ones(8, 16).bfloat16()  # a name that a target would match
        made[family] = rewrite(folder / family, tensors, config_of(source))
    return made


def claimed(plan: Plan, qconfig: dict[str, Any]) -> list[str]:
    """Stored 2-D weights without a scheme that the config does not leave alone. Written out on its own, for compressed-tensors."""
    plain = [
        t.module
        for t in plan.tensors
        if not t.scheme.quantizes and t.name.endswith(".weight") and len(t.source.info.shape) == 2
    ]
    names = [n for module in plain for n in {module, *plan.family.recipe_aliases(module)}]
    return [
        n for n in names if not any(re.match(p[3:], n) if p.startswith("re:") else p == n for p in qconfig["ignore"])
    ]


@pytest.mark.parametrize(("to", "fmt"), OUTPUTS)
@pytest.mark.parametrize("family", ["m2", "m3"])
def test_every_copied_linear_is_ignored(extended: dict[str, Path], family: str, to: str, fmt: str | None) -> None:
    if family == "m3" and fmt == "fp8":
        fmt = "compressed-tensors"
    plan = make_plan_of(extended[family], to, (), fmt)
    qconfig = plan.quantization
    assert qconfig is not None
    tensors = [o for t in plan.tensors for o in t.outputs]
    kept = kept_linears(plan.family, tensors, plan.recipe.format)  # type: ignore[arg-type]  # name and shape are enough
    modules = {module for module, _ in kept}
    assert f"{PREFIX[family]}.2.eh_proj" in modules and "adapter.experts.0.w1" in modules
    assert any("block_sparse_moe.gate" in module for module in modules) and any(
        "lm_head" in module for module in modules
    )
    assert list(kept_problems(qconfig, plan.family, kept)) == []
    ignored = IgnoreList(qconfig)
    for part in ("self_attn.q_proj", "self_attn.qkv_proj", "mlp.experts.0.w1", "block_sparse_moe.experts.0.w1"):
        if plan.recipe.format != "fp8":  # its entries are exact names: fused ones follow from their parts
            assert f"{PREFIX[family]}.3.{part}" in ignored, part
        assert f"{PREFIX[family]}.1.{part}" not in ignored or "self_attn" in part
    if plan.recipe.format == "compressed-tensors":
        assert claimed(plan, qconfig) == []
    # each entry counts: without the one of the numbered layers, or of an unknown module, there is something to say
    key = "ignore" if plan.recipe.format == "compressed-tensors" else "modules_to_not_convert"
    for part in ("eh_proj" if plan.recipe.format == "fp8" else "2", "adapter"):
        damaged = copy.deepcopy(qconfig)
        damaged[key] = [entry for entry in damaged[key] if part not in entry]
        assert len(damaged[key]) < len(qconfig[key]) and list(kept_problems(damaged, plan.family, kept)), part


def test_releases_get_no_more_than_they_need(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "m2", "m2"), "int4")
    assert plan.quantization is not None and plan.quantization["ignore"][:3] == list(plan.family.always_ignored)
    m3 = make_plan_of(make_source(tmp_path / "m3", "m3"), "int4")
    assert m3.quantization is not None and len([p for p in m3.quantization["ignore"] if "gate" in p]) == 2


def test_fp8_extras_are_claimed_only_where_their_scales_are_read(tmp_path: Path) -> None:
    source, _ = quantized_source(make_source(tmp_path / "plain", "m2"), tmp_path, "fp8")
    extras = {
        "model.layers.2.self_attn.q_proj.weight": torch.full((256, 128), 2.0).to(torch.float8_e4m3fn),
        "model.layers.2.self_attn.q_proj.weight_scale_inv": torch.full((2, 1), 0.5),
    }
    both = rewrite(tmp_path / "src", {**stored(source), **extras}, config_of(source))
    packed, block = make_plan_of(both, "int4"), make_plan_of(both, "fp8-block")
    assert packed.quantization and "model.layers.2.self_attn.q_proj" in IgnoreList(packed.quantization)
    assert any("copied with their scales" in note for note in packed.notes)
    assert block.quantization and "model.layers.2.self_attn.q_proj" not in IgnoreList(block.quantization)
    assert not any("copied with their scales" in note for note in block.notes)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "compressed-tensors", "ignore": [*(f"re:.*x{n}" for n in range(5000)), "re:adapter"]},
        {"quant_method": "awq", "modules_to_not_convert": [*(f"x{n}" for n in range(20_000)), "adapter"]},
    ],
    ids=["regexes", "pieces"],
)
def test_a_list_of_any_length_has_one_limit_on_time(
    config: dict[str, Any], extended: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan_of(extended["m2"], "int4")
    kept = [(f"adapter.{n}", Role("unknown")) for n in range(10_000)]
    monkeypatch.setattr(patterns, "LIST_SECONDS", 0.05)
    with pytest.raises(
        CheckpointError, match=r"^quantization_config\.\w+: to compare its lists .* takes more than 0\.05 s"
    ):
        list(kept_problems(config, plan.family, kept))


def test_verify_names_a_copied_module_that_the_config_claims(extended: dict[str, Path], tmp_path: Path) -> None:
    from m3quant.artifact.output import read_manifest
    from m3quant.verify.structure import structure_problems

    plan = make_plan_of(extended["m2"], "int4")
    run_plan(plan, tmp_path / "out")
    output = Checkpoint.open(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert list(structure_problems(output, plan, manifest, None)) == []
    output.config["quantization_config"]["ignore"] = [
        p for p in output.config["quantization_config"]["ignore"] if "layers" not in p
    ]
    said = list(structure_problems(output, plan, manifest, None))
    assert any("model.layers.2.eh_proj is stored unquantized" in sentence for sentence in said), said
