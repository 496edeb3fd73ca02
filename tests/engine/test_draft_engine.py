"""A trained EAGLE3 draft before tiny-m2, with the real vLLM on the CPU: the same greedy answers, and how many of its guesses are accepted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from m3quant.cli import cli
from m3quant.engines.installed import ENGINE_PYTHON, SAFE_PATH
from tests.support.draft_prompts import prompts, write_prompts
from tests.support.engine.guarded_server import free_port
from tests.support.engine.running import ENV, NEEDS_ENGINE
from tests.support.paths import FIXTURES, ROOT
from tests.training import draft_model, export
from tests.training import tokenizer as tok
from tests.training.model import SPECS, TinyModel

pytestmark = NEEDS_ENGINE

M2, DRAFT = FIXTURES / "tiny-m2", FIXTURES / "tiny-m2-eagle3"
OUTPUT, GUESSES, REQUESTS = 48, 3, 8
ENGINE = {**os.environ, **ENV, **SAFE_PATH, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
DRAFTED, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("draft") / "tiny-m2-int4"
    done = CliRunner().invoke(cli, ["convert", str(M2), str(out), "--to=int4", "--device=cpu"])
    assert done.exit_code == 0, (done.output, done.exception)
    return out


def test_greedy_answers_are_the_same_and_the_counters_are_right(int4: Path, tmp_path: Path) -> None:
    """The reference is plain PyTorch: what the draft guesses along the source's answers, in float32 as the engine here."""
    bpe = tok.load(M2 / "tokenizer.json")
    asked = [list(bpe.encode(text, add_special_tokens=False).ids) for text in prompts(REQUESTS)]
    request = {
        "draft": str(DRAFT),
        "guesses": GUESSES,
        "output": OUTPUT,
        "prompts": asked,
        "checkpoints": [str(M2), str(int4)],
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    script = ROOT / "tests" / "support" / "engine" / "with_draft.py"
    done = subprocess.run(
        [os.environ[ENGINE_PYTHON], str(script), str(tmp_path / "request.json"), str(tmp_path / "answer.json")],
        env={**ENGINE, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "answer.json").read_text())
    for answer in found.values():
        assert answer["guessed"] == answer["plain"]
    target, draft = TinyModel(SPECS["tiny-m2"]).eval(), draft_model.load(DRAFT)
    export.load(target, M2)
    source, counts = found[str(M2)], list[int]()
    for ids, answer in zip(asked, source["plain"], strict=True):
        counts += draft_model.accepted_per_step(draft, target, torch.tensor(ids + answer), len(ids), GUESSES)
    lengths = {name: 1 + answer["counters"][ACCEPTED] / answer["counters"][DRAFTED] for name, answer in found.items()}
    expected = 1 + sum(counts) / len(counts)
    print(f"reference {expected:.3f}, vLLM {lengths}")
    assert expected > 1.2 and abs(lengths[str(M2)] - expected) < 0.05 * expected
    assert lengths[str(int4)] > 0.8 * lengths[str(M2)]


def bench(checkpoint: Path, tmp_path: Path, *options: str) -> dict[str, Any]:
    texts = write_prompts(tmp_path / "texts.jsonl", REQUESTS)
    done = subprocess.run(
        [sys.executable, "-m", "m3quant", "bench", str(checkpoint), "--on=cpu:1GiB", "--concurrency=4", "--context=1100", f"--output={OUTPUT}",
         "--rounds=2", f"--texts={texts}", f"--draft={DRAFT}", "--temperature=0", f"--port={free_port()}", f"--log={tmp_path / 'bench.log'}",
         "--start-timeout=240", "--json", *options],
        env=ENGINE, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_bench_measures_acceptance_and_holds_it_against_the_source(int4: Path, tmp_path: Path) -> None:
    source = bench(M2, tmp_path)
    (row,) = source["rows"]
    assert row["acceptance_length"] > 1.1 and row["acceptance_length"] == pytest.approx(
        1 + sum(row["acceptance_by_guess"])
    )
    (tmp_path / "source.json").write_text(json.dumps(source))
    page = tmp_path / "page.html"
    ours = bench(
        int4, tmp_path, f"--acceptance-of={tmp_path / 'source.json'}", "--least-acceptance=0.7", f"--report={page}"
    )
    (measured,) = ours["rows"]
    assert measured["acceptance_share"] == pytest.approx(measured["acceptance_length"] / row["acceptance_length"])
    assert ours["acceptance_of"]["below"] == [] and f"{measured['acceptance_share']:.1%}" in page.read_text()


def test_the_cpu_build_loses_temperatures_with_a_draft() -> None:
    """Why `serve` and `plan` warn there: every value of a float table is expanded into a copy, and what is used stays as it was made."""
    code = (
        "import torch; from vllm.platforms import current_platform; current_platform.register_triton_kernel_overrides();"
        "from vllm.v1.sample import rejection_sampler as r; torch.Tensor.new_empty = lambda self, *shape: self.new_zeros(*shape);"
        "print(r.expand_batch_to_tokens(torch.tensor([0.5, 1.0]), torch.tensor([2, 3], dtype=torch.int32), 3).tolist())"
    )
    done = subprocess.run(
        [os.environ[ENGINE_PYTHON], "-c", code], env=ENGINE, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "[0.0, 0.0, 0.0]", done.stdout + done.stderr
