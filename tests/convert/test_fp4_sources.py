"""Checkpoints in 4-bit floats, and FP8 with a scale per row or per tensor, converted, verified and evaluated as the BF16 one with the same values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from m3quant.checkpoint import Checkpoint
from m3quant.cli import cli
from m3quant.convert.device_layers import DeviceLoader
from m3quant.errors import CheckpointError
from m3quant.evaluate.models import open_model
from m3quant.families import family_of
from m3quant.planning.headers import from_config
from m3quant.planning.plan import make_plan
from m3quant.planning.source_layouts import MXFP8, NVFP4, NVFP4_PACKED
from m3quant.quant.reading import SourceReader
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.fit import Ask, assess
from m3quant.runtime.hardware import parse_node
from m3quant.runtime.model import open_subject
from m3quant.verify.verification import verify
from tests.support.convert import tiny_m31
from tests.support.convert.common import bits, config_of, make_plan_of, make_source, rewrite, run_convert, stored
from tests.support.convert.fp4_sources import (
    fp8_rows,
    fp8_tensor,
    mxfp4_modelopt,
    mxfp4_packed,
    mxfp8_modelopt,
    nvfp4_modelopt,
    nvfp4_packed,
)
from tests.support.convert.sources import both_forms
from tests.support.paths import DATA, FIXTURES

M31_CONFIG = DATA / "minimax-m3.1-flash" / "config.json"
# M3.1's config asks for an FP8 cache, and an fp8 output for rounded activations.
WEIGHTS_ALONE = ("--device", "cpu", "--activations", "exact", "--kv-dtype", "bf16", "--index-dtype", "bf16")
HELDOUT = FIXTURES / "heldout.txt"
INT4 = build_recipe(named_recipe("int4"))


def ct(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "float", "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


LAYOUTS = {
    "nvfp4-modelopt": (nvfp4_modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "nvfp4-packed": (nvfp4_packed, ct("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16)),
    "mxfp4-packed": (mxfp4_packed, ct("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32)),
    "mxfp4-modelopt": (mxfp4_modelopt, {"quant_method": "modelopt", "quant_algo": "MXFP4"}),
    "mxfp8-modelopt": (mxfp8_modelopt, {"quant_method": "modelopt", "quant_algo": "MXFP8"}),
    "fp8-rows": (fp8_rows, ct("float-quantized", num_bits=8, strategy="channel")),
    "fp8-tensor": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
}


def written(source: Path, folder: Path, layout: str) -> tuple[Path, Path]:
    """The checkpoint in that layout, and the BF16 one that it stands for."""
    return both_forms(source, folder, *LAYOUTS[layout])


def same_shards(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    return names == sorted(path.name for path in other.glob("*.safetensors")) and all(
        (one / n).read_bytes() == (other / n).read_bytes() for n in names
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_source_converts_as_the_bf16_one_that_it_stands_for(tmp_path: Path, layout: str) -> None:
    source, dense = written(make_source(tmp_path / "m2", "m2"), tmp_path, layout)
    for to in ("int4", "fp8-block"):
        run_convert(source, tmp_path / f"{to}-a", to)
        run_convert(dense, tmp_path / f"{to}-b", to)
        assert same_shards(tmp_path / f"{to}-a", tmp_path / f"{to}-b")
        for given in (source, None):  # planned again from the source, and from what the manifest recorded of it
            result, _ = verify(tmp_path / f"{to}-a", given, lambda _: None)
            assert result.holds, [check.problems for check in result.checks]
    plan = make_plan_of(source, "int4")
    assert open_subject(str(source)).converted(INT4).stored_bytes == plan.tensor_bytes
    assert sum(t.source.stored_bytes for t in plan.tensors) == sum(
        i.nbytes for i in Checkpoint.open(source).tensors.values()
    )


def test_kept_weights_come_out_in_bf16_and_companions_nowhere(tmp_path: Path) -> None:
    source, dense = written(make_source(tmp_path / "m2", "m2"), tmp_path, "nvfp4-packed")
    run_convert(source, tmp_path / "out", "int4", settings=("attention=keep",))
    found, expected = stored(tmp_path / "out"), stored(dense)
    name = "model.layers.1.self_attn.v_proj.weight"
    assert found[name].dtype == torch.bfloat16 and bits(found[name]) == bits(expected[name])
    assert not any("global_scale" in n or "input_scale" in n for n in found)


def test_calibration_reads_the_same_weights(tmp_path: Path) -> None:
    source, dense = written(make_source(tmp_path / "m2", "m2"), tmp_path, "nvfp4-modelopt")
    for folder, given in (("a", source), ("b", dense)):
        run_convert(given, tmp_path / folder, "awq", rounding="nearest")
    assert same_shards(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("layout", ["nvfp4-packed", "nvfp4-modelopt", "mxfp4-packed"])
def test_the_device_loader_gives_the_same_layer(tmp_path: Path, layout: str) -> None:
    """On a CPU, where plain torch decodes; the kernels are compared with it in tests/quant."""
    source, dense = written(make_source(tmp_path / "m2", "m2"), tmp_path, layout)
    layers = []
    for folder in (source, dense):
        reader = SourceReader(Checkpoint.open(folder))
        with DeviceLoader(reader, torch.device("cpu")) as loader:
            layers.append(loader.load(family_of(reader.config).layers[1]))
    assert set(layers[0]) == set(layers[1])
    assert all(torch.equal(layers[0][name], layers[1][name]) for name in layers[0])


@pytest.mark.parametrize("layout", ["nvfp4-packed", "nvfp4-modelopt"])
@pytest.mark.parametrize("where", ["one tensor", "everywhere"])
def test_a_global_scale_the_wrong_way_round_is_refused_with_both_readings(
    tmp_path: Path, layout: str, where: str
) -> None:
    source, _ = written(make_source(tmp_path / "m2", "m2"), tmp_path, layout)
    leaf = "weight_global_scale" if layout == "nvfp4-packed" else "weight_scale_2"
    one = f"model.layers.1.block_sparse_moe.experts.2.w3.{leaf}"
    tensors = stored(source)
    for name in [one] if where == "one tensor" else [name for name in tensors if name.endswith(leaf)]:
        tensors[name] = 1 / tensors[name]
    folder = rewrite(tmp_path / "turned", tensors, config_of(source))
    words = r"the global scale of '.*' is .* By its name, .*median magnitude of \d\.?\d*e\+0\d; if it .*they would have 0\.0\d"
    with pytest.raises(CheckpointError, match=words) as found:
        run_convert(folder, tmp_path / "out", "int4")
    assert where == "everywhere" or one.removesuffix(leaf) in str(found.value)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(CheckpointError, match=words):
        open_model(folder)


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan"), -1.0])
def test_a_global_scale_that_is_no_factor_is_refused_before_anything_is_written(tmp_path: Path, bad: float) -> None:
    source, _ = written(make_source(tmp_path / "m2", "m2"), tmp_path, "nvfp4-packed")
    tensors = stored(source)
    tensors["model.layers.0.self_attn.o_proj.weight_global_scale"][0] = bad
    folder = rewrite(tmp_path / "bad", tensors, config_of(source))
    with pytest.raises(
        CheckpointError,
        match=r"global scale of 'model\.layers\.0\.self_attn\.o_proj\.weight_packed' of .* is .*, which no weight",
    ):
        run_convert(folder, tmp_path / "out", "int4")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_m31_is_planned_from_its_config() -> None:
    """Byte sums: facts of the release; KV: 60 layers * 2 * 4 heads * 128 and 60 indexers * 128 in FP8."""
    family = family_of(json.loads(M31_CONFIG.read_text()))
    assert family.kv_geometry.bytes_per_token(1, 1) == 69_120
    assert [spec.moe is None for spec in family.layers[:4]] == [True, True, True, False]
    assert all(spec.sparse is not None for spec in family.layers)
    plan = make_plan(from_config(M31_CONFIG), build_recipe(named_recipe("awq")))
    kinds = {(t.role.kind, t.source.kind) for t in plan.tensors if t.scheme.quantizes}
    assert kinds == {("routed_experts", NVFP4_PACKED)} | {
        (role, MXFP8) for role in ("attention", "indexer", "shared_experts", "dense_mlp")
    }
    assert sum(t.source.stored_bytes for t in plan.tensors) == 250_103_411_200
    assert sum(len(t.source.stored) for t in plan.tensors) == 89_632
    assert sum(t.source.numel for t in plan.tensors) == 427_051_937_408
    subject = open_subject(str(M31_CONFIG))
    assert subject.stored.stored_bytes == 250_103_411_200 and subject.stored.label == "mxfp8+nvfp4"
    assert subject.converted(build_recipe(named_recipe("awq"))).stored_bytes == plan.tensor_bytes
    native = assess(subject.stored, parse_node("4xH200"), Ask())  # there is room, and vLLM up to 0.33 has no loader
    assert (
        not native.fits
        and not native.loads
        and "vLLM up to 0.33.0 does not load MXFP8 with NVFP4 experts" in native.why_not
    )
    assert assess(subject.stored, parse_node("4xH200"), Ask(release="0.34.0")).fits
    assert not assess(subject.stored, parse_node("4xH200"), Ask(release="0.33.0")).fits
    assert assess(subject.stored, parse_node("4xH200"), Ask(engine="sglang")).fits
    shown = CliRunner().invoke(cli, ["plan", str(M31_CONFIG), "--on", "4xH200"])
    assert (
        re.search(r"mxfp8\+nvfp4 .* is not loaded", shown.output)
        and "is not loaded: mxfp8+nvfp4: vLLM up to" in shown.output
    )
    result = CliRunner().invoke(cli, ["plan", str(M31_CONFIG), "--all"])
    assert result.exit_code == 0 and re.search(r"mxfp8\+nvfp4 +250\.10 GB", result.output)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("m31")
    return {layout: tiny_m31.make(folder / layout, layout) for layout in ("native", "modelopt")}


@pytest.mark.parametrize(("layout", "experts"), [("native", NVFP4_PACKED), ("modelopt", NVFP4)])
def test_tiny_m31_is_converted_verified_and_read_as_its_bf16_copy(
    tiny: dict[str, tuple[Path, Path]], tmp_path: Path, layout: str, experts: str
) -> None:
    source, dense = tiny[layout]
    plan = make_plan_of(source, "int4")
    assert {t.source.kind for t in plan.tensors if t.role.kind == "routed_experts"} == {experts}
    assert sum(t.role.kind == "indexer" for t in plan.tensors) == (6 if layout == "native" else 4)
    for to in ("int4", "fp8"):
        run_convert(source, tmp_path / f"{to}-a", to)
        run_convert(dense, tmp_path / f"{to}-b", to)
        assert same_shards(tmp_path / f"{to}-a", tmp_path / f"{to}-b")
        result, _ = verify(tmp_path / f"{to}-a", source, lambda _: None)
        assert result.holds, [check.problems for check in result.checks]
    out = tmp_path / "int4-a"
    for name in ("LICENSE", "dspark/config.json", "dspark/model.safetensors") if layout == "native" else ():
        assert (out / name).read_bytes() == (source / name).read_bytes()
        assert name in json.loads((out / "m3quant.json").read_text())["files"]
        assert not any("dspark" in tensor for tensor in Checkpoint.open(out).tensors)
    assert "hf_quant_config.json" not in {path.name for path in out.iterdir()}


def test_the_tiny_m31_is_the_same_every_time(tiny: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    again, _ = tiny_m31.make(tmp_path / "again", "native")
    for path in (p for p in tiny["native"][0].rglob("*") if p.is_file()):
        assert (again / path.relative_to(tiny["native"][0])).read_bytes() == path.read_bytes(), path


def test_eval_of_an_output_against_the_m31_that_it_was_made_from(
    tiny: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """The source's own figures are its BF16 copy's, and the fp8 output is near them."""
    source, dense = tiny["native"]
    run_convert(source, tmp_path / "fp8", "fp8")
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "name: short\ndescription: For a test.\ntasks:\n"
        "  - {task: perplexity-gptq, window: 768, max_windows: 1}\n  - {task: divergence, window: 768, max_windows: 1}\n"
    )
    record = {}
    for label, arguments in {
        "self": [source, "--source", dense],
        "output": [tmp_path / "fp8", "--source", source],
    }.items():
        given = [
            *map(str, arguments),
            "--suite",
            str(suite),
            "--data",
            str(HELDOUT),
            "--report",
            str(tmp_path / label),
            *WEIGHTS_ALONE,
        ]
        done = CliRunner().invoke(cli, ["eval", *given, "--json"])
        assert done.exit_code == 0, done.output
        record[label] = json.loads((tmp_path / label / "eval.json").read_text())
    own, output = record["self"]["results"], record["output"]["results"]
    assert record["self"]["checkpoint"]["stored"] == "mxfp8+nvfp4"
    assert own[0]["metrics"] == own[0]["source_metrics"] == output[0]["source_metrics"]
    assert own[1]["metrics"]["kl_mean"] == 0 < output[1]["metrics"]["kl_mean"] < 0.02
    assert 3 < own[0]["metrics"]["perplexity"] < 25  # trained: an untrained one has the vocabulary's 2048
    assert abs(output[0]["metrics"]["perplexity"] / own[0]["metrics"]["perplexity"] - 1) < 0.03
