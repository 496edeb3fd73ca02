"""`eval` as an engine computes: rounded activations by default, an FP8 cache when asked for, both recorded; the source exact."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from m3quant.artifact.eval_record import Computed
from m3quant.calibration.stream import nll
from m3quant.cli import cli
from m3quant.errors import EvaluationError
from m3quant.evaluate.models import open_model
from tests.support.convert.common import add_tokenizer, make_plan_of, make_source, random_windows, run_convert, run_plan
from tests.support.convert.sources import quantized_source
from tests.support.evaluate.measuring import Plain, run, sequence

ALL_INT8 = [f"{role}=int8-g128" for role in ("routed_experts", "shared_experts", "dense_mlp", "attention", "indexer")]


@pytest.fixture(scope="module")
def m2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("m2") / "source", "m2")


@pytest.fixture(scope="module")
def fp8(m2: Path) -> Path:
    run_convert(m2, m2.parent / "fp8", "fp8")
    return m2.parent / "fp8"


def losses(checkpoint: Path, source: Path | None = None, **settings: Any) -> tuple[np.ndarray, np.ndarray, Computed]:
    """(checkpoint's, source's or nothing, what eval.json says of the arithmetic)."""
    task = Plain([sequence(200)])
    record = run(checkpoint, source, [task], **settings)
    assert record.computed is not None and record.computed.sentence in record.notes
    return task.checkpoint[0].nll, task.source[0].nll if task.source else np.empty(0), record.computed


def streamed(folder: Path, rounded: bool) -> np.ndarray:
    model = open_model(folder)
    ids = torch.from_numpy(sequence(200).ids)[None]
    return nll(model.reader, ids, schemes=model.schemes if rounded else None)[0].numpy()


def test_activations_are_rounded_unless_weights_alone_are_asked_for(m2: Path, fp8: Path) -> None:
    engine, source, computed = losses(fp8, m2)
    exact, again, only_weights = losses(fp8, m2, activations="exact")
    np.testing.assert_allclose(exact, streamed(fp8, rounded=False), atol=1e-4)
    assert np.median(np.abs(engine - streamed(fp8, rounded=True))) < 0.1 * np.median(np.abs(engine - exact))
    assert np.array_equal(source, again)  # the source never rounds
    assert (computed.activations, computed.rounding) == ("engine", "E4M3 per token")
    assert (only_weights.activations, only_weights.rounding) == ("exact", "not rounded")
    assert computed.kv_dtype is computed.index_dtype is computed.kv_scales is None


def test_integers_cost_nothing(m2: Path) -> None:
    run_convert(m2, m2.parent / "int8", "int4", settings=ALL_INT8)
    engine, _, computed = losses(m2.parent / "int8")
    assert np.array_equal(engine, losses(m2.parent / "int8", activations="exact")[0])
    assert (computed.activations, computed.rounding) == ("engine", "not rounded")


def test_an_fp8_release_is_computed_as_it_is_served_and_exact_as_a_source(m2: Path, tmp_path: Path) -> None:
    stored, dense = quantized_source(m2, tmp_path, "fp8")
    engine, source, computed = losses(stored, stored)
    assert computed.rounding == "E4M3 per token and 128 channels"
    assert np.array_equal(source, losses(dense)[0])
    assert not np.array_equal(engine, source)
    assert np.array_equal(losses(stored, activations="exact")[0], source)


def with_scales(source: Path, folder: Path, scale: float) -> Path:
    """A copy whose first layer has scales for an FP8 cache."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            if any(".layers.0.self_attn.k_proj" in name for name in tensors):
                for which in "kv":
                    tensors[f"model.layers.0.self_attn.{which}_proj.{which}_scale"] = torch.tensor([scale])
            save_file(tensors, folder / path.name, {"format": "pt"})
        elif path.name != "model.safetensors.index.json":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_an_fp8_cache_is_recorded_with_its_scales(m2: Path, tmp_path: Path) -> None:
    plain = losses(m2)[0]
    rounded, _, computed = losses(m2, kv_dtype="fp8")
    assert 0 < np.abs(rounded - plain).mean() < 0.2
    assert (computed.kv_dtype, computed.kv_scales) == ("fp8", "1.0")
    scaled = with_scales(m2, tmp_path / "scaled", 0.013)
    other, _, stored = losses(scaled, kv_dtype="fp8")
    assert stored.kv_scales == "stored" and not np.array_equal(other, rounded)
    assert np.array_equal(losses(scaled)[0], plain)  # the scales alone change nothing
    assert np.array_equal(losses(m2, m2, kv_dtype="fp8")[1], plain)  # the source's cache is exact


def test_auto_is_what_config_json_states(m2: Path, tmp_path: Path) -> None:
    stated, _ = quantized_source(m2, tmp_path, "fp8")
    config = json.loads((stated / "config.json").read_text())
    quantization = config["quantization_config"]

    def state(scheme: dict[str, Any]) -> None:
        (stated / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}))

    state({**quantization, "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}})
    assert losses(stated)[2].kv_dtype == "fp8" and losses(stated, kv_dtype="bf16")[2].kv_dtype is None
    state({**quantization, "kv_cache_quant_algo": "NVFP4"})
    with pytest.raises(EvaluationError, match="states a KV cache in nvfp4, which m3quant does not compute"):
        losses(stated)
    assert losses(stated, kv_dtype="fp8")[2].kv_dtype == "fp8"


def test_index_keys_need_an_indexer(m2: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="has no index keys"):
        losses(m2, index_dtype="fp8")
    m3 = make_source(tmp_path / "m3", "m3")
    assert losses(m3, index_dtype="fp8")[2].index_dtype == "fp8"


def test_the_conversion_measures_the_stream_that_eval_computes(m2: Path, tmp_path: Path) -> None:
    """Held-out perplexity of a calibrated run with FP8 around the experts is that of the output, activations rounded."""
    plan = make_plan_of(m2, "awq-fp8")
    heldout = run_plan(plan, tmp_path / "out")["heldout"]
    assert heldout["activations"] == "E4M3 per token"
    model, ids = open_model(tmp_path / "out"), torch.from_numpy(random_windows(plan).ids)
    perplexity = {
        rounded: float(
            nll(model.reader, ids, micro_batch=len(ids), schemes=model.schemes if rounded else None)[-1].mean().exp()
        )
        for rounded in (True, False)
    }
    recorded = heldout["perplexity_quantized"]
    assert abs(recorded - perplexity[True]) < 0.1 * abs(recorded - perplexity[False])


def test_the_command_line_passes_it_on_and_a_server_decides_itself(m2: Path, tmp_path: Path) -> None:
    folder = with_scales(m2, tmp_path / "source", 1.0)
    add_tokenizer(folder)
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: small\ntasks:\n  - {task: perplexity-gptq, window: 32, max_windows: 1}\n", encoding="utf-8")
    text = tmp_path / "text.txt"
    text.write_text("rounded as an engine rounds them, or exact. " * 4, encoding="utf-8")
    command = [
        "eval",
        str(folder),
        f"--suite={suite}",
        f"--data={text}",
        "--device=cpu",
        f"--report={tmp_path / 'report'}",
    ]
    result = CliRunner().invoke(cli, [*command, "--activations=exact", "--kv-dtype=fp8"])
    assert result.exit_code == 0, result.output
    computed = json.loads((tmp_path / "report" / "eval.json").read_text())["computed"]
    assert computed["activations"] == "exact" and (computed["kv_dtype"], computed["kv_scales"]) == ("fp8", "stored")
    assert "KV cache E4M3 with its stored scales" in result.output
    page = (tmp_path / "report").glob("*.html")
    assert any("KV cache E4M3 with its stored scales" in path.read_text() for path in page)
    refused = CliRunner().invoke(cli, ["eval", str(folder), "--endpoint=http://localhost:1", "--kv-dtype=fp8"])
    assert refused.exit_code != 0 and "a server rounds as it was started" in str(refused.exception)
