"""What a source is, from config.json, hf_quant_config.json and headers: one answer for plan, plan --on, convert, eval and verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from m3quant.checkpoint import Checkpoint, patterns
from m3quant.errors import CheckpointError, PlanError
from m3quant.families import family_of
from m3quant.planning.headers import from_config
from m3quant.planning.source_format import KeptModules, config_format, file_format, source_format
from m3quant.planning.source_layouts import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_TENSOR,
    MXFP4,
    MXFP8,
    NVFP4,
    NVFP4_PACKED,
    PLAIN,
)
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.fit import Ask, assess
from m3quant.runtime.hardware import parse_node
from m3quant.runtime.model import open_subject
from m3quant.verify.verification import verify
from tests.support.convert.common import config_of, make_plan_of, make_source, rewrite, run_convert, stored
from tests.support.convert.fp4_sources import fp8_rows, fp8_tensor, mxfp4_packed, mxfp8, nvfp4_modelopt, nvfp4_packed
from tests.support.convert.sources import is_linear, quantized_source
from tests.support.paths import DATA

AWQ = build_recipe(named_recipe("awq"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    made = {family: make_source(folder / family, family) for family in ("m2", "m3")}
    return made | {
        "fp8": quantized_source(made["m2"], folder, "fp8")[0],
        "mxfp8": quantized_source(made["m3"], folder, "mxfp8")[0],
    }


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def ct(form: str, **weights: Any) -> dict[str, Any]:
    """compressed-tensors' section of one group."""
    group = {"targets": ["Linear"], "weights": {"type": "float", "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


NV_CT = ct("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16)


@pytest.mark.parametrize(
    ("section", "kind", "label", "words"),
    [
        (BLOCKS, FP8_BLOCK, "fp8-block", ""),
        ({"quant_method": "mxfp8"}, MXFP8, "mxfp8", ""),
        ({"quant_method": "mxfp8", "weight_block_size": [1, 32], "attention_quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, MXFP8, "mxfp8", ""),
        ({**BLOCKS, "weight_block_size": [64, 64]}, "", "fp8", r"blocks of \[64, 64\]"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, FP8_TENSOR, "fp8-tensor", ""),
        ({**BLOCKS, "activation_scheme": "static"}, FP8_BLOCK, "fp8-block", ""),
        ({"quant_method": "fbgemm_fp8"}, FP8_CHANNEL, "fp8-channel", ""),
        ({**BLOCKS, "fmt": "float8_e5m2"}, "", "fp8", "e5m2"),
        ({**BLOCKS, "moe_quant_algo": "W4A8"}, "", "fp8+w4a8", "FP8 mixed with W4A8"),
        ({"quant_method": "mxfp8", "moe_quant_algo": "NVFP4"}, MXFP8, "mxfp8+nvfp4", ""),
        ({"quant_method": "mxfp8", "moe_quant_algo": "NVFP4", "moe_quant_format": "x"}, "", "mxfp8+nvfp4", "moe_quant_format 'x'"),
        ({"quant_method": "mxfp8", "moe_quant_algo": "NVFP4", "group_size": 32}, "", "mxfp8+nvfp4", "in groups of 32"),
        ({"quant_method": "mxfp8", "moe_quant_algo": "W4A8"}, "", "mxfp8+w4a8", r"W4A8 \(moe_quant_algo\)"),
        ({"quant_method": "mxfp8", "weight_block_size": [1, 16], "moe_quant_algo": "NVFP4"}, "", "mxfp8", r"blocks of \[1, 16\]"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, NVFP4, "nvfp4", ""),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "", "nvfp4", "nvfp4 in groups of 32, not 16"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "", "nvfp4_awq", "NVFP4_AWQ"),
        ({"quant_algo": "FP8"}, FP8_TENSOR, "fp8-tensor", ""),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "", "mixed_precision", "without quantized_layers"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.w1": {"quant_algo": "NVFP4", "group_size": 16}, "a.q": {"quant_algo": "MXFP8"}}}, MXFP8, "mxfp8+nvfp4", ""),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.w1": {"quant_algo": "INT3"}}}, "", "mixed_precision", "'a.w1' is quant_algo 'INT3'"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.w1": "NVFP4"}}, "", "mixed_precision", "'a.w1' is quant_algo ''"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, NVFP4_PACKED, "nvfp4", ""),
        (ct("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16), NVFP4_PACKED, "nvfp4", ""),
        (ct("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=32), "", "compressed-tensors", "group_size 32"),
        (ct("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32), MXFP4, "mxfp4", ""),
        (ct("float-quantized", num_bits=8, strategy="channel"), FP8_CHANNEL, "fp8-channel", ""),
        (ct("float-quantized", num_bits=8, strategy="tensor"), FP8_TENSOR, "fp8-tensor", ""),
        (ct("float-quantized", num_bits=8, strategy="block", block_structure=[128, 128]), FP8_BLOCK, "fp8-block", ""),
        (ct("float-quantized", num_bits=8, strategy="block", block_structure=[64, 64]), "", "compressed-tensors", "strategy 'block'"),
        (ct("pack-quantized", num_bits=4, type="int", strategy="group", group_size=128), "int4-g128", "int4-g128", ""),
        (ct("pack-quantized", num_bits=8, type="int", symmetric=False, strategy="channel"), "int8-channel-asym", "int8-channel-asym", ""),
        (ct("pack-quantized", num_bits=4, type="int", strategy="group", group_size=48), "", "compressed-tensors", "strategy 'group' with group_size 48"),
        (ct("pack-quantized", num_bits=4, type="int", strategy="group", group_size=128, actorder="group"), "", "compressed-tensors", "activation order"),
        (ct("int-quantized", num_bits=8, type="int", strategy="channel"), "", "compressed-tensors", "num_bits 8, type 'int'"),
        ({**ct("float-quantized", num_bits=8, strategy="channel"), "transform_config": {"config_groups": {"R1": {}}}}, "", "compressed-tensors", "rotates"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, "awq-int4-g64", "awq-int4-g64", ""),
        ({"quant_method": "awq", "bits": 4}, "", "awq", "AWQ integers in groups of None"),
        ({"quant_method": "gptq", "bits": 4}, "", "gptq", "of integers m3quant reads"),
        ({"quant_method": "something"}, "", "something", "a format that m3quant does not know"),
        (["fp8"], "", "quantized", "is no object"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["top", "text_config", "compression_config", "hf_quant_config"])
def test_what_a_config_says(section: Any, kind: str, label: str, words: str, place: str) -> None:
    hf = None
    if place == "top":
        config: dict[str, Any] = {"quantization_config": section}
    elif place == "hf_quant_config":
        if not isinstance(section, dict) or "quant_algo" not in section:
            return
        config, hf = (
            {},
            {
                "producer": {"name": "modelopt"},
                "quantization": {k: v for k, v in section.items() if k != "quant_method"},
            },
        )
    else:
        config = (
            {"compression_config": section}
            if place == "compression_config"
            else {"text_config": {"quantization_config": section}}
        )
    found = config_format(config, "x/config.json", hf)
    assert (found.kind, found.label) == (kind, label)
    assert bool(found.refused) != bool(kind)
    if words:
        with pytest.raises(CheckpointError, match=words):
            found.required_kind()
        assert found.refused.startswith("x/hf_quant_config.json" if hf else "x/config.json")


def write_config(folder: Path, release: str, **changes: Any) -> Path:
    config = json.loads((DATA / release / "config.json").read_text())
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder / "config.json"


def test_kept_parts_of_an_fp8_release_are_planned_in_bf16(tmp_path: Path) -> None:
    """M2.7's attention has 2,730,491,904 weights: one byte each, and an F32 scale per block, more than in the release."""
    whole = open_subject(str(DATA / "minimax-m2.7")).stored.stored_bytes
    section = {**BLOCKS, "modules_to_not_convert": ["gate", "lm_head", "self_attn"]}
    path = write_config(tmp_path, "minimax-m2.7", quantization_config=section)
    subject = open_subject(str(path))
    attention = 2_730_491_904
    assert subject.stored.stored_bytes == whole + attention - 4 * attention // 128**2
    assert {g.dtype for g in subject.stored.groups if g.role == "attention"} == {"BF16"}
    plan_bytes = sum(t.source.stored_bytes for t in make_plan_of_config(path).tensors)
    assert plan_bytes == subject.stored.stored_bytes
    for entry in ("model.layers.3.self_attn", "model.layers.3.self_attn.*", "layers.3.self_attn.q_proj"):
        path = write_config(tmp_path, "minimax-m2.7", quantization_config={**BLOCKS, "modules_to_not_convert": [entry]})
        kept = {
            (g.layer, g.part)
            for g in open_subject(str(path)).stored.groups
            if g.role == "attention" and g.dtype == "BF16"
        }
        assert kept == {(3, f"{p}_proj") for p in ("q" if "q_proj" in entry else "qkvo")}, entry
    path = write_config(tmp_path, "minimax-m2.7", quantization_config={**BLOCKS, "ignored_layers": ["re:.*(a+)+$"]})
    with pytest.raises(CheckpointError, match="does not evaluate"):
        open_subject(str(path))


def make_plan_of_config(path: Path) -> Any:
    from m3quant.planning.plan import make_plan

    return make_plan(from_config(path), AWQ)


def test_kept_modules_by_the_names_of_other_trees() -> None:
    family = family_of(json.loads((DATA / "minimax-m3" / "config.json").read_text()))
    name = "language_model.model.layers.3.block_sparse_moe.experts.7.w1.weight"
    for entry in (
        "model.language_model.layers.3.mlp.experts",
        "block_sparse_moe.experts",
        "*layers.3.mlp.experts.*",
        "experts.7",
    ):
        assert name in KeptModules([entry], family), entry
    for entry in ("gate", "mlp.gate", "layers.30", "experts.70", "w"):
        assert name not in KeptModules([entry], family), entry


def test_lists_of_kept_modules_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200,000 globs, or slow ones, are refused; as many names are not."""
    for entries, words in (
        ([f"*a{number}*b" for number in range(200_000)], r"200,000 patterns in one list of modules"),
        (["*a" * 600 + "*b"], r"a pattern of 1,202 characters"),
        (["re:" + "(a+)+" * 100], r"by the expression 're:\(a\+\)\+.*\.\.\.,? which m3quant does not evaluate"),
    ):
        section = {**BLOCKS, "modules_to_not_convert": entries}
        path = write_config(tmp_path, "minimax-m2.7", quantization_config=section)
        for opened in (open_subject, from_config):
            with pytest.raises(CheckpointError, match=rf"^[^:]*/config\.json.*{words}") as caught:
                opened(path if opened is from_config else str(path))  # type: ignore[operator]
            assert len(str(caught.value)) < 600
    names = [f"model.layers.{n}.mlp.experts.{e}.{p}" for n in range(62) for e in range(256) for p in ("w1", "w2", "w3")]
    section = {**BLOCKS, "modules_to_not_convert": names}
    path = write_config(tmp_path, "minimax-m2.7", quantization_config=section)
    assert len(from_config(path).layer_kinds()) == 62
    section = {**BLOCKS, "modules_to_not_convert": [f"*a{number}*b" for number in range(10_000)]}
    path = write_config(tmp_path, "minimax-m2.7", quantization_config=section)
    monkeypatch.setattr(patterns, "LIST_SECONDS", 0.1)
    with pytest.raises(
        CheckpointError, match=r"config\.json, modules left unquantized: to compare its lists .* restore the"
    ):
        from_config(path).layer_kinds()


@pytest.mark.parametrize("section", [
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "mxfp8", "moe_quant_algo": "W4A8"},
])  # fmt: skip
def test_a_config_alone_of_what_is_not_read_is_refused_by_both_plans(tmp_path: Path, section: dict[str, Any]) -> None:
    text = json.loads((DATA / "minimax-m3" / "config.json").read_text())["text_config"]
    for changes in ({"quantization_config": section}, {"text_config": {**text, "quantization_config": section}}):
        path = write_config(tmp_path, "minimax-m3", **changes)
        with pytest.raises(CheckpointError, match=r"config\.json says quant_method.*sizes are in its shards"):
            open_subject(str(path))
        with pytest.raises(CheckpointError, match=r"^[^:]*/config\.json says quant_method.*quantized already"):
            from_config(path)


def test_a_config_alone_with_two_kinds_of_targets_asks_for_the_shards(tmp_path: Path) -> None:
    section = ct("mixed-precision", num_bits=8, strategy="channel")
    section["config_groups"]["group_1"] = NV_CT["config_groups"]["group_0"]
    path = write_config(tmp_path, "minimax-m3", quantization_config=section)
    for opened in (open_subject, from_config):
        with pytest.raises(CheckpointError, match=r"FP8 with one scale a row and of NVFP4.*headers say so"):
            opened(path if opened is from_config else str(path))  # type: ignore[operator]


def quantize(source: Path, folder: Path, parts: Any, section: dict[str, Any] | None, only: str = "") -> Path:
    tensors = {}
    for name, tensor in stored(source).items():
        tensors |= (
            parts(name.removesuffix(".weight"), tensor)[0] if is_linear(name) and only in name else {name: tensor}
        )
    return rewrite(folder, tensors, config_of(source) | ({"quantization_config": section} if section else {}))


@pytest.mark.parametrize(("parts", "section", "words"), [
    (nvfp4_modelopt, None, "is U8 but config.json has no quantization_config"),
    (nvfp4_packed, {"quant_method": "mxfp8"}, "is NVFP4 in compressed-tensors' layout .*says MXFP8"),
    (nvfp4_packed, {"quant_method": "mxfp8", "moe_quant_algo": "NVFP4"}, "self_attn.* is NVFP4 in compressed-tensors' layout .*says MXFP8"),
    (nvfp4_packed, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "weight_global_scale divides.*says NVFP4 in ModelOpt's"),
    (nvfp4_modelopt, NV_CT, "weight_scale_2 multiplies.*says NVFP4 in compressed-tensors'"),
    (mxfp4_packed, NV_CT, "is MXFP4 .*says NVFP4"),
    (fp8_rows, BLOCKS, "FP8 with one scale a row by its name.*says FP8 in 128x128 blocks"),
    (fp8_tensor, {"quant_method": "mxfp8"}, "FP8 with one scale a tensor by its name.*says MXFP8"),
    (mxfp8, {"quant_method": "fp8", "activation_scheme": "static"}, "is MXFP8 .*says FP8 with one scale a row or FP8 with one scale a tensor"),
])  # fmt: skip
def test_two_descriptions_that_disagree_are_refused_by_every_command(sources: dict[str, Path], tmp_path: Path, parts: Any, section: Any, words: str) -> None:  # fmt: skip
    folder = quantize(sources["m2"], tmp_path / "src", parts, section)
    with pytest.raises(CheckpointError, match=f"tensor '.*{words}"):
        make_plan_of(folder, "int4")
    subject = open_subject(str(folder))
    assert assess(subject.stored, parse_node("1xH200"), Ask()).longest_context > 0  # as it is, it can be counted
    with pytest.raises(PlanError, match=f"no recipe can be applied: .*{words}"):
        subject.converted(AWQ)
    assert len(subject.precisions()[0]) == 1
    from m3quant.evaluate.models import open_model

    with pytest.raises(CheckpointError, match=words):
        open_model(folder)


def spoil(folder: Path, change: Any) -> Path:
    """Rewrite a checkpoint with its tensors changed in place."""
    tensors, config = stored(folder), config_of(folder)
    change(tensors)
    return rewrite(folder.with_name(f"{folder.name}-spoiled"), tensors, config)


Q = "model.layers.1.self_attn.q_proj."


@pytest.mark.parametrize(("parts", "section", "change", "words"), [
    (nvfp4_packed, NV_CT, lambda t: t.pop(f"{Q}weight_global_scale"), r"q_proj.weight_packed' is NVFP4 without its global scale '.*q_proj\.weight_global_scale'"),
    (nvfp4_packed, NV_CT, lambda t: t.pop(f"{Q}weight_scale"), r"is E2M1 without its scale '.*q_proj\.weight_scale'"),
    (nvfp4_packed, NV_CT, lambda t: t.pop(f"{Q}weight_packed"), r"scale '.*q_proj\.\w*' has no quantized weight"),
    (nvfp4_packed, NV_CT, lambda t: t.update({f"{Q}weight_scale_2": torch.ones(())}), "NVFP4 with weight_scale_2 and weight_global_scale.*it divides.*would multiply"),
    (nvfp4_packed, NV_CT, lambda t: t.update({f"{Q}weight_scale_2": t.pop(f"{Q}weight_global_scale")}), "NVFP4 with weight_scale_2. Under the name weight_packed"),
    (nvfp4_packed, NV_CT, lambda t: t.update({f"{Q}weight_global_scale": torch.ones(2)}), r"global scale '.*' is F32 \[2\], not one F32 number"),
    (nvfp4_packed, NV_CT, lambda t: t.update({f"{Q}weight_global_scale": torch.ones(1).bfloat16()}), r"global scale '.*' is BF16 \[1\], not one F32 number"),
    (nvfp4_packed, NV_CT, lambda t: t.update({f"{Q}weight_scale": t[f"{Q}weight_scale"].mT.contiguous()}), r"its scale '.*' is F8_E4M3 \[16, 256\], but with U8 \[256, 128\] nvfp4-packed needs F8_E4M3 \[256, 16\]"),
    (nvfp4_packed, NV_CT, lambda t: t.update({f"{Q}weight_scale": t[f"{Q}weight_scale"].float()}), r"is F32 \[256, 16\], but with U8 \[256, 128\] nvfp4-packed needs .*nvfp4 needs .*mxfp4 needs U8"),
    (mxfp4_packed, {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}, lambda t: t.update({f"{Q}weight_global_scale": torch.ones(1)}), "is MXFP4 .*which has no '.*weight_global_scale'"),
    (fp8_rows, ct("float-quantized", num_bits=8, strategy="channel"), lambda t: t.update({f"{Q}weight_scale_inv": t[f"{Q}weight_scale"].clone()}), "FP8 with two scales"),
    (fp8_rows, ct("float-quantized", num_bits=8, strategy="channel"), lambda t: t.update({f"{Q}weight_scale": t[f"{Q}weight_scale"][:100]}), r"is BF16 \[100, 1\], but with F8_E4M3 \[256, 256\] fp8-block needs .*fp8-channel needs F32 or BF16 \[256, 1\]"),
])  # fmt: skip
def test_a_layout_that_matches_no_formula_is_refused_with_the_tensor(sources: dict[str, Path], tmp_path: Path, parts: Any, section: Any, change: Any, words: str) -> None:  # fmt: skip
    folder = spoil(quantize(sources["m2"], tmp_path / "src", parts, section), change)
    with pytest.raises(CheckpointError, match=words):
        make_plan_of(folder, "int4")
    with pytest.raises(PlanError, match=words):
        open_subject(str(folder)).converted(AWQ)


def listed_modules(folder: Path) -> dict[str, Any]:
    names = [name.removesuffix(".weight") for name in stored(folder) if is_linear(name)]
    return {name: {"quant_algo": "NVFP4" if ".experts." in name else "MXFP8"} for name in names}


def test_modelopts_list_of_modules_is_the_word_on_each(sources: dict[str, Path], tmp_path: Path) -> None:
    listed = listed_modules(sources["m2"])

    def mixed(module: str, weight: torch.Tensor) -> Any:
        return (nvfp4_modelopt if ".experts." in module else mxfp8)(module, weight)

    def made(label: str, **changes: Any) -> Path:
        section = {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {**listed, **changes},
        }
        return quantize(sources["m2"], tmp_path / label, mixed, section)

    first, other = Q.removesuffix("."), "model.layers.0.block_sparse_moe.experts.1.w2"
    kinds = {t.source.kind for t in make_plan_of(made("good"), "int4").tensors if t.scheme.quantizes}
    assert kinds == {MXFP8, NVFP4}
    for label, changes, words in (
        ("absent", {"model.layers.9.self_attn.q_proj": {"quant_algo": "MXFP8"}}, "says that 'model.layers.9.self_attn.q_proj' is MXFP8.*holds no weight"),
        ("other", {first: {"quant_algo": "NVFP4"}}, "q_proj.weight' is MXFP8 .*says NVFP4 in ModelOpt's"),
        ("gate", {"model.layers.0.block_sparse_moe.gate": {"quant_algo": "MXFP8"}}, "gate.weight' is unquantized .*says MXFP8"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            make_plan_of(made(label, **changes), "int4")
    del listed[other]
    with pytest.raises(CheckpointError, match=r"experts\.1\.w2\.weight' is NVFP4 .*says unquantized"):
        make_plan_of(made("left-out"), "int4")


def test_a_module_that_the_config_keeps_and_the_headers_do_not_is_refused(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    section = {**NV_CT, "ignore": ["lm_head", "model.layers.1.self_attn.q_proj"]}
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_packed' is NVFP4 .*says unquantized"):
        make_plan_of(quantize(sources["m2"], tmp_path / "src", nvfp4_packed, section), "int4")


def test_hf_quant_config_alone_names_weights_and_cache(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = quantize(sources["m2"], tmp_path / "src", nvfp4_modelopt, None, ".experts.")
    said = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": said}))
    subject = open_subject(str(folder))
    fit = assess(subject.stored, parse_node("1xH200"), Ask())
    assert (subject.stored.label, fit.setup.kv_dtype) == ("nvfp4", "fp8")
    with pytest.raises(CheckpointError, match=r"NVFP4 in ModelOpt's layout .*hf_quant_config\.json says MXFP8"):
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "MXFP8"}}))
        make_plan_of(folder, "int4")
    (folder / "hf_quant_config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json"):
        open_subject(str(folder))
    # a cache alone is no quantized weight, and the output does not carry the file
    plain = rewrite(tmp_path / "plain", stored(sources["m2"]), config_of(sources["m2"]))
    (plain / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}})
    )
    assert (
        source_format(Checkpoint.open(plain)).kind == PLAIN == file_format(plain / "config.json", config_of(plain)).kind
    )
    assert assess(open_subject(str(plain)).stored, parse_node("1xH200"), Ask()).setup.kv_dtype == "fp8"
    assert "hf_quant_config.json" not in make_plan_of(plain, "int4").copied_files


def test_config_and_hf_quant_config_have_to_agree(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = quantize(
        sources["m2"], tmp_path / "src", nvfp4_modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    )
    beside = folder / "hf_quant_config.json"
    beside.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}))
    assert {t.source.kind for t in make_plan_of(folder, "int4").tensors if t.scheme.quantizes} == {NVFP4}
    beside.write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    words = r"config\.json says nvfp4 \(NVFP4 in ModelOpt.*hf_quant_config\.json says fp8-tensor \(FP8 with one scale a tensor"
    with pytest.raises(CheckpointError, match=words):
        make_plan_of(folder, "int4")
    with pytest.raises(PlanError, match=words):
        open_subject(str(folder)).converted(AWQ)


def test_readable_sources_have_one_answer_everywhere(sources: dict[str, Path]) -> None:
    for name, kind, label in (
        ("m2", PLAIN, "bf16"),
        ("m3", PLAIN, "bf16"),
        ("fp8", FP8_BLOCK, "fp8-block"),
        ("mxfp8", MXFP8, "mxfp8"),
    ):
        subject = open_subject(str(sources[name]))
        assert (source_format(Checkpoint.open(sources[name])).kind, subject.stored.label, subject.refused) == (
            kind,
            label,
            "",
        )
        planned = make_plan_of(sources[name], "int4")
        assert subject.converted(build_recipe(named_recipe("int4"))).stored_bytes == planned.tensor_bytes


def stacked(tensors: dict[str, torch.Tensor], root: str, layer: int) -> dict[str, torch.Tensor]:
    """A layer's experts as transformers 5 holds them in memory."""
    prefix = f"{root}layers.{layer}.block_sparse_moe.experts."
    count = len({n[len(prefix) :].partition(".")[0] for n in tensors if n.startswith(prefix)})
    one = [torch.cat([tensors[f"{prefix}{e}.{w}.weight"] for w in ("w1", "w3")]) for e in range(count)]
    return {
        "gate_up_proj": torch.stack(one),
        "down_proj": torch.stack([tensors[f"{prefix}{e}.w2.weight"] for e in range(count)]),
    }


def in_tree(folder: Path, source: Path, family: str, tree: str) -> Path:
    """A copy of the checkpoint under the names of another tree, in a folder of its own."""
    tensors = stored(source)
    root = "model." if family == "m2" else "language_model.model."

    def renamed(name: str) -> str:
        if tree == "text-only":
            return f"text.{name}" if family == "m2" else name.removeprefix("language_model.")
        name = name.replace("language_model.model.", "model.language_model.").replace("block_sparse_moe", "mlp")
        if tree == "modules":
            name = name.replace("language_model.lm_head", "lm_head").replace(".index_", ".indexer.")
            for disk, module in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
                name = name.replace(f".{disk}.", f".{module}.")
        return name

    new = {renamed(n): t for n, t in tensors.items() if tree != "stacked" or ".experts." not in n}
    for layer in ((0, 1) if family == "m2" else (1,)) if tree == "stacked" else ():
        for part, t in stacked(tensors, root, layer).items():
            new[renamed(f"{root}layers.{layer}.block_sparse_moe.experts.{part}")] = t
    return rewrite(folder, new, config_of(source))


@pytest.mark.parametrize(("family", "tree"), [("m2", "modules"), ("m3", "modules"), ("m3", "text-only")])
def test_a_tree_of_the_same_tensors_is_read_as_the_release(
    sources: dict[str, Path], tmp_path: Path, family: str, tree: str
) -> None:
    folder = in_tree(tmp_path / "src", sources[family], family, tree)
    run_convert(folder, tmp_path / "out", "int4")
    run_convert(sources[family], tmp_path / "same", "int4")
    for shard in sorted((tmp_path / "same").glob("*.safetensors")):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes(), shard.name
    found, _ = verify(tmp_path / "out", str(folder), print)
    assert found.holds
    notes = make_plan_of(folder, "int4").notes
    assert any("names of another tree" in note and "outputs have these" in note for note in notes)
    subject = open_subject(str(folder))
    answer = assess(subject.stored, parse_node("1xH200"), Ask())
    assert subject.convertible and not answer.fits and "no engine finds weights under these names" in answer.why_not
    assert assess(subject.converted(AWQ), parse_node("1xH200"), Ask()).fits


def test_two_tensors_that_stand_for_one_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    tensors = stored(in_tree(tmp_path / "tree", sources["m2"], "m2", "modules"))
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    tensors["model.layers.0.mlp.experts.0.w1.weight"] = tensors[name].clone()
    folder = rewrite(tmp_path / "src", tensors, config_of(sources["m2"]))
    with pytest.raises(CheckpointError, match="name of another tree"):
        make_plan_of(folder, "int4")


@pytest.mark.parametrize(("family", "tree"), [("m2", "stacked"), ("m3", "stacked"), ("m2", "text-only")])
def test_another_tree_is_named_in_every_command(
    sources: dict[str, Path], tmp_path: Path, family: str, tree: str
) -> None:
    folder = in_tree(tmp_path / "src", sources[family], family, tree)
    with pytest.raises(CheckpointError, match=r"name of another tree.*save_pretrained") as convert:
        make_plan_of(folder, "int4")
    with pytest.raises(CheckpointError, match="name of another tree") as serve:
        open_subject(str(folder))
    assert str(convert.value) == str(serve.value) and ("in one tensor" in str(serve.value)) == (tree == "stacked")
    from m3quant.evaluate.models import open_model

    with pytest.raises(CheckpointError, match="name of another tree"):
        open_model(folder)
