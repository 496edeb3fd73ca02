"""The table of roundings: names of other programs' weights, what they read and write, and what a row says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from m3quant.evaluate.models import open_model
from m3quant.families import family_of
from m3quant.recipe.recipe import Recipe
from tests.benchmarks import quality
from tests.benchmarks.quality_cases import FIXTURES, Case, Overlaid, cases, source_names
from tests.benchmarks.quality_gptqmodel import dequantized
from tests.benchmarks.quality_job import read_job
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def tiny() -> dict[str, Case]:
    return {name: case for name, case in cases(Path()).items() if name.startswith("tiny")}


@pytest.mark.parametrize("name", ["tiny-m2", "tiny-m3"])
def test_transformers_names_of_a_layer_become_the_sources(name: str) -> None:
    reader = open_model(FIXTURES / name).reader
    family = family_of(reader.config)
    prefix = "model.language_model.layers.2." if name == "tiny-m3" else "model.layers.2."
    given = {
        f"{prefix}mlp.experts.3.{part}.weight": torch.full((1,), float(value))
        for value, part in enumerate(("gate_proj", "up_proj", "down_proj"))
    }
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_proj.weight")
    given |= {prefix + rest: torch.full((1,), 5.0) for rest in (*norms, "mlp.gate.weight")}
    found = source_names(family, given)
    assert set(found) <= set(reader.tensors)
    own, moe = family.layer_prefix(2), family.layer(2).moe
    assert moe is not None
    values = [found[own + moe.expert_name(3, which)].item() for which in ("w1", "w3", "w2")]
    assert values == [0.0, 1.0, 2.0]
    assert found[own + moe.router_name].item() == 5.0


def test_the_halves_of_a_shared_experts_joined_projection_are_gate_and_up() -> None:
    reader = open_model(FIXTURES / "tiny-m3").reader
    name = "model.language_model.layers.1.mlp.shared_experts.gate_up_proj.weight"
    found = source_names(family_of(reader.config), {name: torch.arange(4.0).view(4, 1)})
    assert set(found) <= set(reader.tensors)
    values = {key.split(".")[-2]: tensor.flatten().tolist() for key, tensor in found.items()}
    assert values == {"gate_proj": [0.0, 1.0], "up_proj": [2.0, 3.0]}


def test_a_tensor_outside_the_layers_is_refused() -> None:
    family = family_of(open_model(FIXTURES / "tiny-m2").reader.config)
    with pytest.raises(ValueError, match="lm_head"):
        source_names(family, {"lm_head.weight": torch.ones(1)})


def test_replaced_tensors_take_the_dtype_and_must_have_the_shape_of_the_sources() -> None:
    reader = open_model(FIXTURES / "tiny-m2").reader
    name, other = "model.layers.0.block_sparse_moe.experts.0.w1.weight", "model.layers.0.input_layernorm.weight"
    own = torch.randn(256, 256)
    found = Overlaid(reader, {name: own}).read_many([name, other])
    assert torch.equal(found[name], own.bfloat16())
    assert torch.equal(found[other], reader.read_many([other])[other])
    with pytest.raises(ValueError, match="shape"):
        Overlaid(reader, {name: own[:1]}).read_many([name])
    with pytest.raises(ValueError, match="no tensor"):
        Overlaid(reader, {"another": own})


def test_our_methods_differ_by_their_rounding_alone(tiny: dict[str, Case]) -> None:
    for case in tiny.values():
        found = {method: Recipe.model_validate(quality.recipe_of(case, method)) for method in quality.OURS}
        assert [recipe.rounding for recipe in found.values()] == list(quality.OURS)
        assert len({str(recipe.schemes) for recipe in found.values()}) == 1
        default = Recipe.model_validate(quality.recipe_of(case, quality.DEFAULT))
        assert default.schemes["routed_experts"] == case.scheme.name
        assert default.schemes["attention"].startswith("int8")


def test_every_program_gets_as_many_tokens_as_our_recipe_reads(tiny: dict[str, Case]) -> None:
    for case in tiny.values():
        assert case.calibration_windows.ids.shape == (case.windows, case.length)
        data = quality.recipe_of(case, "feedback")["data"]
        assert (data["windows"], data["window_length"], data["heldout_windows"]) == (case.windows, case.length, 0)


@pytest.mark.parametrize("zero_offset", [0, 1])
def test_gptq_files_are_read_as_they_are_packed(zero_offset: int) -> None:
    rows, columns, group, bits = 16, 32, 8, 4
    codes = torch.randint(0, 16, (rows, columns))
    zeros = torch.randint(zero_offset, 16, (columns // group, rows))
    scales = torch.rand(columns // group, rows).half()
    g_idx = torch.arange(columns) // group

    def packed(values: torch.Tensor, dim: int) -> torch.Tensor:
        parts = values.long().unflatten(dim, (-1, 32 // bits))
        words = sum(parts.select(dim + 1, place) << (bits * place) for place in range(32 // bits))
        assert isinstance(words, torch.Tensor)
        return torch.where(words >= 2**31, words - 2**32, words).int()

    parts = {"qweight": packed(codes.T, 0), "qzeros": packed(zeros - zero_offset, 1), "scales": scales, "g_idx": g_idx}
    expected = (codes - zeros.T[:, g_idx]).float() * scales.float().T[:, g_idx]
    torch.testing.assert_close(dequantized(parts, bits, zero_offset), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("device", "visible"), [("cpu", ""), ("cuda", "0,1")])
def test_a_program_that_quantizes_on_the_cpu_sees_no_gpu(
    device: str, visible: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"device": device}))
    monkeypatch.setattr("sys.argv", ["module", str(path)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert read_job() == {"device": device}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_a_row_of_the_table_says_kl_error_and_perplexity_or_that_it_does_not_run() -> None:
    row = {"kl": 0.03162, "kl_error": 0.00059, "perplexity": 11.784, "source_perplexity": 11.516}
    best = {"kl": 0.01602, "kl_error": 0.00039, "perplexity": 11.594, "source_perplexity": 11.516}
    other = {"kl": 0.09, "kl_error": 0.001, "perplexity": 12.0, "source_perplexity": 11.516}
    rows = {
        "tiny-m2": {"nearest": row, "feedback": best, "gptqmodel": {"failed": "no"}},
        "tiny-m3": {"nearest": {**row, "kl": 0.2}, "gptqmodel": other},
    }
    lines = quality.table(rows).splitlines()
    assert lines[0] == "| | tiny-m3 | tiny-m2 |".replace("| |", "|  |")
    assert lines[2:] == [
        "| source | 0, 11.516 | 0, 11.516 |",
        "| rounded to nearest | 0.200 ± 0.001, 11.784 | 0.0316 ± 0.0006, 11.784 |",
        "| `rounding: feedback` |  | **0.0160** ± 0.0004, 11.594 |",
        "| GPTQModel | **0.0900** ± 0.0010, 12.000 | does not run |",
    ]


def test_the_tables_of_the_documentation_are_the_commands() -> None:
    assert quality.tables() in (ROOT / "docs" / "rounding.md").read_text()
