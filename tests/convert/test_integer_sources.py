"""INT2 to INT8 of compressed-tensors and AutoAWQ as sources: evaluated always, converted when asked, as the BF16 one they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from m3quant.checkpoint import Checkpoint
from m3quant.cli import cli
from m3quant.convert.device_layers import DeviceLoader
from m3quant.errors import CheckpointError, OptionError, PlanError
from m3quant.evaluate.models import open_model
from m3quant.planning.headers import from_config
from m3quant.planning.plan import make_plan
from m3quant.quant.reading import SourceReader
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.model import open_subject
from m3quant.verify.verification import verify
from tests.support.convert.common import bits, config_of, make_plan_of, make_source, rewrite, run_convert, stored
from tests.support.convert.fp4_sources import fp8_rows
from tests.support.convert.integer_sources import awq, awq_section, packed, packed_section
from tests.support.convert.sources import both_forms, is_linear

Maker = Callable[[str, torch.Tensor], Any]
INT4 = build_recipe(named_recipe("int4"))
ASKED = build_recipe({**named_recipe("int4"), "requantize": True})
F16 = torch.float16
EXPERTS_4_REST_8 = packed_section((4, 128, True), (8, 64, False))

LAYOUTS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "int4-g128": (lambda m, w: packed(m, w, 4, 128), packed_section((4, 128, True))),
    "int4-g32-asym": (lambda m, w: packed(m, w, 4, 32, False, F16), packed_section((4, 32, False))),
    "int8-channel": (lambda m, w: packed(m, w, 8, None, True, torch.float32), packed_section((8, None, True))),
    "int3-g64-asym": (lambda m, w: packed(m, w, 3, 64, False), packed_section((3, 64, False))),
    "int2-g16": (lambda m, w: packed(m, w, 2, 16), packed_section((2, 16, True))),
    # int4-g128 and int8-g64 have codes and scales of the same shapes but for K
    "mixed": (lambda m, w: packed(m, w, 4, 128) if ".experts." in m else packed(m, w, 8, 64, False), EXPERTS_4_REST_8),
    "awq-int4-g64": (lambda m, w: awq(m, w, 64), awq_section(64)),
    "awq-int4-channel": (lambda m, w: awq(m, w, None), awq_section(None)),
}


def written(source: Path, folder: Path, layout: str) -> tuple[Path, Path]:
    """The checkpoint in that layout, and the BF16 one that it stands for."""
    return both_forms(source, folder, *LAYOUTS[layout])


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_read_as_they_are_meant_on_every_way(tmp_path: Path, layout: str) -> None:
    """By the reader, by the loader of layers, by `convert` and from the manifest's record alone."""
    source, dense = written(make_source(tmp_path / "m2", "m2"), tmp_path, layout)
    expected = stored(dense)
    reader = open_model(source).reader
    assert isinstance(reader, SourceReader)
    found = reader.read_many(expected)
    assert all(bits(found[name]) == bits(expected[name]) for name in expected)
    spec = open_model(source).family.layers[1]
    with DeviceLoader(reader, torch.device("cpu")) as loader:
        layer = loader.load(spec)
    assert all(torch.equal(layer[name], expected[f"model.layers.1.{name}"]) for name in layer)
    run_convert(source, tmp_path / "a", "int4", requantize=True)
    run_convert(dense, tmp_path / "b", "int4")
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    for given in (source, None):
        result, _ = verify(tmp_path / "a", given, lambda _: None)
        assert result.holds, [check.problems for check in result.checks]
    plan = make_plan_of(source, "int4", requantize=True)
    held = sum(info.nbytes for info in Checkpoint.open(source).tensors.values())
    assert sum(tensor.source.stored_bytes for tensor in plan.tensors) == held
    assert open_subject(str(source)).converted(ASKED).stored_bytes == plan.tensor_bytes


def test_float32_holds_what_bf16_rounds() -> None:
    """The product is formed in float32, whatever the scale's dtype, and rounded once."""
    from m3quant.quant.integer_source import dequantize_integers

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    for size in (5, 6, 7):
        parts, dense = packed("m", weight, size, 32, False, F16)
        p = {name.partition(".")[2]: part for name, part in parts.items()}
        args = (p["weight_packed"], p["weight_scale"], p["weight_zero_point"], f"int{size}-g32-asym", (64, 96))
        wide = dequantize_integers(*args, torch.float32)
        assert torch.equal(wide.bfloat16(), dense) and not torch.equal(wide, dense.float())
        assert torch.equal(dequantize_integers(*args, out=torch.empty(64, 96, dtype=torch.bfloat16)), dense)


def test_calibration_and_kept_parts(tmp_path: Path) -> None:
    source, dense = written(make_source(tmp_path / "m3", "m3"), tmp_path, "mixed")
    for folder, given, asked in (("a", source, {"requantize": True}), ("b", dense, {})):
        run_convert(given, tmp_path / folder, "awq", settings=("dense_mlp=keep",), rounding="awq", **asked)
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    result, _ = verify(tmp_path / "a", str(source), lambda _: None)
    assert result.holds, [check.problems for check in result.checks]


def test_a_conversion_has_to_be_asked_for_and_says_so(tmp_path: Path) -> None:
    source, dense = written(make_source(tmp_path / "m2", "m2"), tmp_path, "int4-g128")
    words = (
        r"quantized already, to 4-bit integers with groups of 128 columns \(compressed-tensors\).*--requantize converts"
    )
    with pytest.raises(PlanError, match=words):
        make_plan_of(source, "int4")
    subject = open_subject(str(source))
    assert not subject.convertible and [m.label for m in subject.precisions()[0]] == ["int4-g128"]
    with pytest.raises(PlanError, match=words):
        subject.converted(INT4)
    assert len(subject.precisions(requantize=True)[0]) > 4
    shell = CliRunner()
    for given in (["plan", str(source)], ["plan", str(source), "--to", "int4"], ["plan", str(source), "--to", "int4", "--on", "1xH200"],
                  ["convert", str(source), str(tmp_path / "out"), "--to", "int4", "--device", "cpu"]):  # fmt: skip
        refused = shell.invoke(cli, given)
        assert isinstance(refused.exception, PlanError) and "--requantize" in str(refused.exception), given
        asked = shell.invoke(cli, [*given, "--requantize"])
        assert asked.exit_code == 0, asked.output
    assert asked.output.count("WARNING: the source is itself quantized") == 1
    manifest = json.loads((tmp_path / "out" / "m3quant.json").read_text())
    assert manifest["recipe"]["requantize"] is True and any("itself quantized" in note for note in manifest["notes"])
    assert manifest["source"]["quantization"] == packed_section((4, 128, True))
    card = shell.invoke(cli, ["card", str(tmp_path / "out")])
    text = card.output + "".join(path.read_text() for path in (tmp_path / "out").glob("*.md"))
    assert "source is itself quantized" in text
    # an unquantized source has no use for it, and the output is the same
    run_convert(dense, tmp_path / "plain", "int4", requantize=True)
    assert "requantize" not in (tmp_path / "plain" / "recipe.yaml").read_text()
    for given in (["plan", str(dense)], ["plan", str(dense), "--to", "int4"], ["plan", str(dense), "--to", "int4", "--on", "1xH200"],
                  ["convert", str(dense), str(tmp_path / "none"), "--to", "int4", "--device", "cpu"]):  # fmt: skip
        refused = shell.invoke(cli, [*given, "--requantize"])
        assert isinstance(refused.exception, OptionError), given
        assert "weights are integers already, and those of" in str(refused.exception), given
    assert not (tmp_path / "none").exists()


def test_a_config_alone_plans_the_stored_sizes(tmp_path: Path) -> None:
    source, _ = written(make_source(tmp_path / "m2", "m2"), tmp_path, "awq-int4-g64")
    alone = tmp_path / "config.json"
    alone.write_text(json.dumps(config_of(source)))
    held = {name: (info.dtype, info.shape) for name, info in Checkpoint.open(source).tensors.items()}
    assert {n: (i.dtype, i.shape) for n, i in from_config(alone).tensors.items()} == held
    assert make_plan(from_config(alone), ASKED).output_bytes > 0


def spoiled(source: Path, change: Callable[[dict[str, torch.Tensor]], object], **section: Any) -> Path:
    tensors, config = stored(source), config_of(source)
    change(tensors)
    config["quantization_config"] = {**config["quantization_config"], **section}
    return rewrite(source.with_name("spoiled"), tensors, config)


Q = "model.layers.1.self_attn.q_proj."


@pytest.mark.parametrize(("layout", "change", "section", "words"), [
    ("int4-g128", lambda t: t.pop(f"{Q}weight_scale"), {}, r"q_proj.weight_packed' is I32.*it lacks 'weight_scale' \(the download is incomplete"),
    ("int4-g128", lambda t: t.pop(f"{Q}weight_packed"), {}, "scale '.*q_proj.weight_s.*' has no quantized weight"),
    ("int4-g128", lambda t: t.update({f"{Q}weight_scale": t[f"{Q}weight_scale"].T.contiguous()}), {}, r"'weight_scale' is BF16 \[2, 256\], not BF16 \[256, 2\]"),
    ("int4-g128", lambda t: t.update({f"{Q}weight_zero_point": torch.zeros(32, 2, dtype=torch.int32)}), {}, "'weight_zero_point' is too many"),
    ("int4-g32-asym", lambda t: t.pop(f"{Q}weight_zero_point"), {}, "with groups of 32 columns and zero points .* lacks 'weight_zero_point'"),
    ("int4-g128", lambda t: t.update({f"{Q}weight_g_idx": torch.zeros(256, dtype=torch.int32)}), {}, "integers in activation order"),
    ("int4-g128", lambda t: None, packed_section((8, 128, True)), r"8-bit integers with groups of 128 columns .*'weight_packed' is I32 \[128, 32\], not I32 \[128, 64\]"),
    ("int4-g128", lambda t: None, {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}}}}, "holds integers|is of compressed-tensors integers"),
    ("int3-g64-asym", lambda t: t.update({f"{Q}weight_packed": torch.zeros(256, 26, dtype=torch.int32)}), {}, "filled one by one, as compressed-tensors before 0.20 does for 3 bits"),
    ("awq-int4-g64", lambda t: t.pop(f"{Q}qzeros"), {}, "q_proj.qweight' .* lacks 'qzeros'"),
    ("awq-int4-g64", lambda t: None, {"bits": 3}, "AWQ integers of 3 bits, not 4"),
    ("awq-int4-g64", lambda t: None, {"version": "gemv"}, "packed as version 'gemv', not gemm"),
    ("awq-int4-g64", lambda t: None, {"group_size": 48}, "in groups of 48"),
    ("awq-int4-g64", lambda t: None, {"quant_method": "gptq"}, "GPTQ integers"),
    ("int4-g128", lambda t: None, {"format": "int-quantized"}, "is of compressed-tensors integers"),
])  # fmt: skip
def test_what_matches_no_formula_is_refused_with_the_tensor(
    tmp_path: Path,
    layout: str,
    change: Callable[[dict[str, torch.Tensor]], object],
    section: dict[str, Any],
    words: str,
) -> None:
    source, _ = written(make_source(tmp_path / "m2", "m2"), tmp_path, layout)
    folder = spoiled(source, change, **section)
    with pytest.raises(CheckpointError, match=words):
        make_plan_of(folder, "int4", requantize=True)
    with pytest.raises(PlanError, match=words):
        open_subject(str(folder)).converted(ASKED)
    with pytest.raises(CheckpointError, match=words):
        open_model(folder)


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t[f"{Q}weight_scale"].fill_(float("nan")), "NaN/Inf in the scale of model.layers.1.self_attn.q_proj.weight_packed"),
    (lambda t: t[f"{Q}weight_shape"].fill_(128), r"'weight_shape' of .* says \[128, 128\], its codes and config.json say \[256, 256\]"),
    (lambda t: t[f"{Q}weight_scale"].fill_(3e38), "times its scale exceeds"),
])  # fmt: skip
def test_values_that_no_weight_has_stop_the_conversion(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    source, _ = written(make_source(tmp_path / "m2", "m2"), tmp_path, "int4-g128")
    with pytest.raises(CheckpointError, match=words):
        run_convert(spoiled(source, change), tmp_path / "out", "int4", requantize=True)


def test_fp8_rows_of_a_source_are_read_with_rounded_activations(tmp_path: Path) -> None:
    made = make_source(tmp_path / "m2", "m2")
    tensors = {}
    for name, tensor in stored(made).items():
        tensors |= fp8_rows(name.removesuffix(".weight"), tensor)[0] if is_linear(name) else {name: tensor}
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    section = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": weights}},
    }
    folder = rewrite(tmp_path / "rows", tensors, {**config_of(made), "quantization_config": section})
    schemes = open_model(folder).schemes(1)
    assert {scheme.name for scheme in schemes.values()} == {"fp8-channel"} and "self_attn.q_proj.weight" in schemes
