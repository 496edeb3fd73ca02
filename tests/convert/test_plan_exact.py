"""What the plan says from headers alone is what the conversion writes, to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from m3quant.checkpoint import Checkpoint
from m3quant.errors import CheckpointError, PlanError
from m3quant.planning.plan import Plan, passed_through
from m3quant.quant.formats import TORCH_DTYPES
from m3quant.recipe.recipe import recipe_names
from tests.support.calibration.tiny import m2_config, m2_tensors
from tests.support.convert.common import (
    bits,
    config_of,
    files,
    make_plan_of,
    make_source,
    rewrite,
    run_plan,
    served_format,
    stored,
)
from tests.support.convert.sources import quantized_source

KEPT_BUT_EXPERTS = ("attention=keep", "shared_experts=keep", "dense_mlp=keep")
EXPERTS_ONLY = ("routed_experts=int4-g128", *KEPT_BUT_EXPERTS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    made = {}
    for family in ("m2", "m3"):
        made[family] = make_source(folder / family, family)
        (made[family] / "tokenizer.json").write_text('{"a": "ü"}', encoding="utf-8")
        (made[family] / "code").mkdir()
        (made[family] / "code" / "modeling.py").write_bytes(b"x = 1\n")
    return made


def check_exact(plan: Plan, output: Path) -> None:
    """Every file and tensor of `output` has the size, dtype and shape that `plan` gave it, and there is no other."""
    run_plan(plan, output)
    written = files(output, but=("m3quant.json", "eval.json", "m3quant-report/"))
    assert sum(map(len, written.values())) == plan.output_bytes
    assert {u.shard: len(written[u.shard]) for u in plan.units} == {u.shard: u.bytes_out for u in plan.units}
    expected = {u.shard for u in plan.units} | set(plan.copied_files)
    assert written.keys() == expected | {"config.json", "recipe.yaml", "model.safetensors.index.json"}
    for name in plan.copied_files:
        assert written[name] == plan.checkpoint.file_bytes(name)

    planned = {o.name: (o.dtype, o.shape, u.shard) for u in plan.units for t in u.tensors for o in t.outputs}
    opened = Checkpoint.open(output)
    assert {n: (i.dtype, i.shape, i.shard) for n, i in opened.tensors.items()} == planned
    for unit in plan.units:  # and the safetensors library reads the same
        with safe_open(output / unit.shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert tuple(file.get_tensor(name).shape) == planned[name][1]
    index = json.loads(written["model.safetensors.index.json"])
    assert index["weight_map"] == {name: shard for name, (_, _, shard) in planned.items()}
    assert index["metadata"]["total_size"] == sum(i.nbytes for i in opened.tensors.values())

    theirs, ours = config_of(Path(plan.checkpoint.root)), config_of(output)
    assert list(ours)[-1] == "quantization_config" and ours.pop("quantization_config") == plan.quantization
    theirs.pop("quantization_config", None)
    assert list(ours.items()) == list(theirs.items())


def check_accounted(plan: Plan) -> None:
    """Every stored tensor of the source belongs to exactly one planned tensor, and every output name is used once."""
    used = [n for t in plan.tensors for n in t.source.names]
    assert sorted(used) == sorted(plan.checkpoint.tensors)
    outputs = [o.name for t in plan.tensors for o in t.outputs]
    assert len(outputs) == len(set(outputs))


VARIANTS = [
    *((name, (), None) for name in recipe_names()),
    ("int4", ("routed_experts=int4-g64",), None),
    ("int4", ("routed_experts=int4-g32-asym", "attention=int4-g64-asym"), None),
    ("int4", ("routed_experts=int8-g128", "attention=int8-channel-asym"), None),
    ("int4", ("routed_experts=int8-channel", "attention=keep", "shared_experts=int4-channel"), None),
    ("int4", ("routed_experts=int4-channel-asym", "attention=fp8-block"), None),
    ("int4", EXPERTS_ONLY, "autoawq"),
    ("int4", ("routed_experts=int4-g32-asym", *KEPT_BUT_EXPERTS), "autoawq"),
    ("awq-all-int4", (), "autoawq"),
    ("fp8-block", (), "compressed-tensors"),
    ("fp8-block", ("attention=keep",), "fp8"),
]


@pytest.mark.parametrize("family", ["m2", "m3"])
@pytest.mark.parametrize(("to", "settings", "fmt"), VARIANTS, ids=lambda v: "+".join(v) if isinstance(v, tuple) else v)
def test_data_free_output_is_the_planned_one_to_the_byte(
    sources: dict[str, Path], tmp_path: Path, family: str, to: str, settings: tuple[str, ...], fmt: str | None
) -> None:
    plan = make_plan_of(sources[family], to, settings, served_format(family, to, fmt), calibration="none")
    check_accounted(plan)
    check_exact(plan, tmp_path / "out")


@pytest.mark.parametrize("family", ["m2", "m3"])
def test_calibrated_output_is_the_planned_one_to_the_byte(
    sources: dict[str, Path], tmp_path: Path, family: str
) -> None:
    check_exact(make_plan_of(sources[family], "awq"), tmp_path / "out")
    plain = make_plan_of(sources[family], "awq", calibration="none")
    calibrated = make_plan_of(sources[family], "awq")
    assert [u.bytes_out for u in plain.units] == [u.bytes_out for u in calibrated.units]


EXTRAS = {
    "model.mtp.0.proj.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "mtp.norm.weight": torch.tensor([float("nan"), 1.0, float("inf")]),
    "some.step": torch.tensor(2**53 + 1),
    "some.mask": torch.tensor([True, False, True]),
    "some.bytes": torch.arange(7, dtype=torch.uint8),
    "some.wide": torch.tensor([0.1], dtype=torch.float64),
    "some.nothing": torch.empty(0, 4, dtype=torch.float16),
}


@pytest.mark.parametrize("to", ["int4", "awq"])
@pytest.mark.parametrize("family", ["m2", "m3"])
def test_mtp_and_unknown_tensors_are_copied_byte_for_byte_and_listed(
    sources: dict[str, Path], tmp_path: Path, family: str, to: str
) -> None:
    prefix = {"m2": "model.layers", "m3": "language_model.model.layers"}[family]
    extras = {
        **EXTRAS,
        f"{prefix}.1.self_attn.odd": torch.tensor([1, -2, 3], dtype=torch.int16),
        # what vLLM takes for the layers of MTP: beyond num_hidden_layers
        f"{prefix}.2.self_attn.q_proj.weight": torch.ones(128, 128, dtype=torch.bfloat16),
        f"{prefix}.2.block_sparse_moe.experts.0.w1.weight": torch.ones(8, 24, dtype=torch.bfloat16),
    }
    source = rewrite(tmp_path / "src", {**stored(sources[family]), **extras}, config_of(sources[family]))
    plan = make_plan_of(source, to)
    check_accounted(plan)
    assert sorted(passed_through(plan)) == sorted(extras)
    check_exact(plan, tmp_path / "out")
    out = stored(tmp_path / "out")
    for name, tensor in extras.items():
        assert out[name].dtype == tensor.dtype and bits(out[name]) == bits(tensor), name


@pytest.mark.parametrize("family", ["m2", "m3"])
def test_kept_tensors_are_the_sources_own_bytes(sources: dict[str, Path], tmp_path: Path, family: str) -> None:
    plan = make_plan_of(sources[family], "int4")
    run_plan(plan, tmp_path / "out")
    before, after = stored(sources[family]), stored(tmp_path / "out")
    kept = [t.name for t in plan.tensors if t.action == "copy"]
    assert any("e_score_correction_bias" in n for n in kept) and any("embed_tokens" in n for n in kept)
    for name in kept:
        assert bits(before[name]) == bits(after[name]), name


@pytest.mark.parametrize("index", [True, False], ids=["index", "no-index"])
@pytest.mark.parametrize("apart", [True, False], ids=["scales-apart", "scales-beside"])
@pytest.mark.parametrize(("family", "kind"), [("m2", "fp8"), ("m3", "mxfp8"), ("m3", "fp8")])
def test_a_quantized_source_converts_as_its_dequantized_copy(
    sources: dict[str, Path], tmp_path: Path, family: str, kind: str, apart: bool, index: bool
) -> None:
    quantized, dense = quantized_source(sources[family], tmp_path, kind, scales_apart=apart, index=index)
    for to in ("int4", "awq-attn-bf16"):  # the second keeps attention, which is then stored dequantized
        plan = make_plan_of(quantized, to, calibration="none")
        check_accounted(plan)
        check_exact(plan, tmp_path / f"{to}-a")
        run_plan(make_plan_of(dense, to, calibration="none"), tmp_path / f"{to}-b")
        for shard in (tmp_path / f"{to}-b").glob("*.safetensors"):
            assert (tmp_path / f"{to}-a" / shard.name).read_bytes() == shard.read_bytes(), shard.name


def test_a_calibrated_fp8_source_converts_as_its_dequantized_copy(sources: dict[str, Path], tmp_path: Path) -> None:
    quantized, dense = quantized_source(sources["m2"], tmp_path, "fp8", scales_apart=True)
    run_plan(make_plan_of(quantized, "awq"), tmp_path / "a")
    run_plan(make_plan_of(dense, "awq"), tmp_path / "b")
    for shard in (tmp_path / "b").glob("*.safetensors"):
        assert (tmp_path / "a" / shard.name).read_bytes() == shard.read_bytes(), shard.name


def test_fp8_block_to_fp8_block_copies_every_tensor(sources: dict[str, Path], tmp_path: Path) -> None:
    quantized, _ = quantized_source(sources["m2"], tmp_path, "fp8", scales_apart=True)
    plan = make_plan_of(quantized, "fp8-block")
    assert {t.action for t in plan.tensors} == {"copy"}
    check_exact(plan, tmp_path / "out")
    before, after = stored(quantized), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(bits(before[name]) == bits(after[name]) for name in before)


def test_fp8_mtp_weights_are_copied_with_their_scales(sources: dict[str, Path], tmp_path: Path) -> None:
    quantized, _ = quantized_source(sources["m2"], tmp_path, "fp8")
    extras = {
        "model.mtp.0.proj.weight": torch.full((256, 128), 2.0).to(torch.float8_e4m3fn),
        "model.mtp.0.proj.weight_scale_inv": torch.full((2, 1), 0.5),
    }
    source = rewrite(tmp_path / "src", {**stored(quantized), **extras}, config_of(quantized))
    plan = make_plan_of(source, "int4")
    assert passed_through(plan) == ["model.mtp.0.proj.weight"]
    check_exact(plan, tmp_path / "out")
    out = stored(tmp_path / "out")
    assert all(bits(out[name]) == bits(tensor) for name, tensor in extras.items())


def shaped(tmp_path: Path, **config: Any) -> Path:
    """A tiny M2 of other sizes."""
    full = m2_config(**{"num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2, **config})
    return rewrite(tmp_path / "odd", m2_tensors(full, 3), full)


REFUSED = [
    ({"intermediate_size": 96}, "int4", (), r"experts\.0\.w2\.weight.*int4-g128.*96.*group size 32.*routed_experts"),
    ({"hidden_size": 260}, "int4", (), r"q_proj|experts.*int4-g128.*260.*channel"),
    ({"intermediate_size": 100}, "int4", ("routed_experts=int4-channel",), r"w2\.weight.*input columns.*8 at a time.*100"),
    ({"intermediate_size": 100}, "int4", ("routed_experts=int4-g32-asym",), r"w1\.weight.*zero points.*100"),
    ({"num_key_value_heads": 1}, "fp8-block", (), r"k_proj has 64 rows, not a multiple of 128.*qkv_proj.*fp8-channel"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "to", "settings", "sentence"), REFUSED, ids=lambda v: str(v)[:40])
def test_a_size_that_does_not_divide_is_refused_with_the_tensor(
    tmp_path: Path, config: dict[str, Any], to: str, settings: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(PlanError, match=sentence):
        make_plan_of(shaped(tmp_path, **config), to, settings)


@pytest.mark.parametrize(("to", "settings"), [
    ("fp8", ()), ("int4", ("routed_experts=int4-channel",)), ("int4", ("routed_experts=int8-g32",)),
    ("fp8-block", ("attention=keep",)),
])  # fmt: skip
def test_odd_sizes_that_a_scheme_allows_are_written_right(tmp_path: Path, to: str, settings: tuple[str, ...]) -> None:
    """w1 and w3 have 224 rows, w2 224 columns: a ragged last block, one and three quarters of 128."""
    source = shaped(tmp_path, intermediate_size=224, vocab_size=501)
    plan = make_plan_of(source, to, settings)
    check_exact(plan, tmp_path / "out")
    from m3quant.quant.reading import ConvertedReader

    dense = ConvertedReader(Checkpoint.open(tmp_path / "out"), {t.name: t for t in plan.tensors}, plan.recipe.format)
    before = stored(source)
    for planned in plan.tensors:
        weight, back = before[planned.name].double(), dense.read_many([planned.name])[planned.name].double()
        error = float((weight - back).norm() / weight.norm())
        bound = 0.2 if "int4" in planned.scheme.name else 0.04 if planned.scheme.quantizes else 0.0
        assert error <= bound, (planned.name, error)


def test_every_planned_dtype_has_a_torch_dtype(sources: dict[str, Path]) -> None:
    codes = {o.dtype for to in recipe_names() for t in make_plan_of(sources["m2"], to).tensors for o in t.outputs}
    assert codes <= TORCH_DTYPES.keys()


def _missing_scale(parts: dict[str, torch.Tensor]) -> None:
    del parts[next(n for n in parts if n.endswith("w1.weight_scale_inv"))]


def _lone_scale(parts: dict[str, torch.Tensor]) -> None:
    del parts["model.layers.0.block_sparse_moe.experts.0.w1.weight"]


def _wrong_scale_shape(parts: dict[str, torch.Tensor]) -> None:
    parts["model.layers.0.self_attn.q_proj.weight_scale_inv"] = torch.ones(3, 3)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_missing_scale, r"w1\.weight' is FP8 without its scale.*incomplete"),
        (_lone_scale, r"scale '.*w1\.weight_scale_inv' has no quantized weight.*incomplete"),
        (_wrong_scale_shape, r"q_proj\.weight'.*its scale '.*' is F32 \[3, 3\].*fp8-block needs F32 or BF16 \[2, 2\]"),
    ],
)
def test_a_broken_fp8_source_is_refused_with_the_tensor(
    sources: dict[str, Path], tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], sentence: str
) -> None:
    quantized, _ = quantized_source(sources["m2"], tmp_path, "fp8")
    parts = stored(quantized)
    damage(parts)
    with pytest.raises(CheckpointError, match=sentence):
        make_plan_of(rewrite(tmp_path / "broken", parts, config_of(quantized)), "int4")
