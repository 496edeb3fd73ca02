"""The real vLLM, on the CPU, loads M2 and M3 in every format and computes what transformers computes.

Both sides run in float32 on the same dequantized numbers, so agreement is a matter of rounding: seen differences are near 1e-6, while one
wrong scale, a swapped nibble or an unloaded index projection changes log-probs by tenths. The longest prompt has 7 blocks of 128 tokens
and M3's sparse layers attend to 4, so the index branch decides what is read.

    tests/support/engine/make_env.sh FOLDER && M3QUANT_ENGINE_PYTHON=FOLDER/bin/python pytest -m engine -n 2
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from tests.support.engine import stored_formats
from tests.support.engine.reference import reference_logprobs
from tests.support.engine.running import MEAN, MEDIAN, NEEDS_ENGINE, engine, make_prompts
from tests.support.engine.stored_formats import Stored
from tests.support.engine.tiny_models import tiny_m2, tiny_m3

pytestmark = NEEDS_ENGINE
MODELS = {"m2": tiny_m2, "m3": tiny_m3}
BLOCK = 128
SPARSE_FROM = 4 * BLOCK  # tokens after which M3's tiny configuration leaves blocks out


def stored(model: str, layout: str) -> Stored:
    return stored_formats.store(*MODELS[model](), layout)


# M3 in DeepSeek style is missing here because vLLM cannot load it: test_m3_with_weight_scale_inv_is_caught.
READ = [(model, layout) for layout in stored_formats.LAYOUTS for model in MODELS if (model, layout) != ("m3", "fp8")]


@pytest.mark.parametrize(("model", "layout"), READ)
def test_loads_whole_and_computes_the_same(model: str, layout: str, tmp_path: Path) -> None:
    checkpoint = stored(model, layout)
    report = engine(checkpoint.write(tmp_path / "quantized"))
    assert report.problems() == []
    assert report.skipped == ({"vision": 27} if model == "m3" else {})
    logprobs, top1 = reference_logprobs(checkpoint.write_dequantized(tmp_path / "reference"), make_prompts())
    found = report.compare(logprobs, top1)
    print(f"{model} {layout}: {found}, load {report.seconds['load']} s, score {report.seconds['score']} s")
    assert found.median < MEDIAN and found.mean < MEAN, found


def test_index_projections_left_out_of_a_quantized_fusion_are_caught(tmp_path: Path) -> None:
    """q, k, v quantized and index_q, index_k not: vLLM drops the two, and only tokens past topk_blocks x 128 show it."""
    whole = stored("m3", "int4-g32-all")
    report = engine(stored_formats.without_index_projections(whole).write(tmp_path / "trap"))
    assert set(report.unexpected) == {
        f"language_model.model.layers.{layer}.self_attn.index_{part}_proj.weight" for layer in (1, 2) for part in "qk"
    }
    fused = "language_model.model.layers.{}.self_attn.qkv_proj.{}"
    assert set(report.partial) >= {fused.format(layer, "weight_packed") for layer in (1, 2)}
    written, elements = report.partial[fused.format(1, "weight_packed")]
    assert (written, elements) == (1024 * 256 // 8, 1408 * 256 // 8)  # q, k, v of q, k, v, index_q, index_k
    problems = " ".join(report.problems())
    assert "index_q_proj.weight" in problems and "silently skipped" in problems and "only in part" in problems

    logprobs, _ = reference_logprobs(whole.write_dequantized(tmp_path / "reference"), make_prompts())
    errors = [abs(a - b) for a, b in zip(report.logprobs[0], logprobs[0], strict=True)]
    assert median(errors[: SPARSE_FROM - 1]) < MEDIAN  # a short prompt would have seen nothing
    assert median(errors[SPARSE_FROM + BLOCK :]) > 10 * MEDIAN


@pytest.mark.parametrize("model", MODELS)
def test_renamed_experts_are_caught(model: str, tmp_path: Path) -> None:
    """Experts saved as gate_proj, up_proj, down_proj: every expert tensor is skipped and every expert uninitialised."""
    checkpoint = stored_formats.with_renamed_experts(stored(model, "int4-g128"))
    report = engine(checkpoint.write(tmp_path / "trap"))
    experts = {name for name in checkpoint.tensors if ".block_sparse_moe.experts." in name}
    assert experts <= set(report.unexpected)
    for part in ("w13_weight_packed", "w2_weight_packed", "w13_weight_scale", "w2_weight_scale"):
        assert any(name.endswith(part) for name in report.missing), part
    assert any("experts.0.gate_proj.weight_packed" in problem for problem in report.problems())


def test_m3_with_weight_scale_inv_is_caught(tmp_path: Path) -> None:
    """vLLM's M3 loader renames weight_scale_inv to weight_scale, so quant_method fp8 leaves every scale at its initial value."""
    report = engine(stored("m3", "fp8").write(tmp_path / "trap"))
    assert report.unexpected and all(name.endswith(".weight_scale_inv") for name in report.unexpected)
    assert report.missing and all(name.endswith("weight_scale_inv") for name in report.missing)


def test_a_tensor_missing_from_the_file_is_named(tmp_path: Path) -> None:
    """One expert's one projection: the fused parameter of all experts is loaded, except for that share."""
    checkpoint = stored("m2", "int4-g128")
    del checkpoint.tensors["model.layers.1.block_sparse_moe.experts.5.w3.weight_packed"]
    report = engine(checkpoint.write(tmp_path / "trap"))
    (name,) = report.partial
    assert name.startswith("model.layers.1.") and name.endswith("w13_weight_packed")
    written, elements = report.partial[name]
    assert elements - written == 256 * 256 // 8
    assert not report.unexpected and not report.complete
