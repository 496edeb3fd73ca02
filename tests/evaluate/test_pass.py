"""The pass over the weights: per-token predictions against transformers' eager model, placement, interruption, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from m3quant.artifact.eval_record import EVAL_FILE
from m3quant.calibration import head
from m3quant.errors import EvaluationError, OutputError
from m3quant.evaluate.batches import lay_out, unique
from m3quant.evaluate.evaluation import JOURNAL
from m3quant.evaluate.task import ScoredSequence
from tests.support.calibration import tiny
from tests.support.convert.common import Silent
from tests.support.convert.sources import quantized_source
from tests.support.evaluate.measuring import Plain, StopAfter, changed_copy, full_logits, reference, run, sequence
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def m2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_tiny_m2(tmp_path_factory.mktemp("m2"), seed=3, num_local_experts=8)


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_tiny_m3(tmp_path_factory.mktemp("m3"), seed=4)


# Lengths are mixed and repeated, one ends long after its last scored token; the tiny M3 reads 256 tokens whole.
MIXED = [sequence(40), sequence(700, [3, 300, 699]), sequence(40, seed=1), sequence(90, [10, 11]), sequence(1)]
MIXED[-1] = sequence(1000, range(900, 1000))


@pytest.mark.parametrize("name", ["m2", "m3"])
def test_predictions_equal_transformers_eager(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    """Losses, best tokens and divergence of ragged sequences, against full logits of float32 eager attention."""
    source = request.getfixturevalue(name)
    other = changed_copy(source, tmp_path / "other", 0.02)
    task = Plain(MIXED)
    run(other, source, [task], batch_tokens=800)
    assert task.source is not None
    worst = {"nll": 0.0, "kl": 0.0}
    for one, a, b, mine, theirs in zip(
        MIXED, full_logits(source, MIXED), full_logits(other, MIXED), task.checkpoint, task.source, strict=True
    ):
        (nll_a, logp_a), (nll_b, logp_b) = reference(a, one), reference(b, one)
        kl = (np.exp(logp_a) * (logp_a - logp_b)).sum(-1)
        assert mine.kl is not None and theirs.kl is None
        assert (theirs.nll.dtype, mine.best.dtype, mine.kl.shape) == (np.float32, np.int64, nll_a.shape)
        for found, expected in ((theirs.nll, nll_a), (mine.nll, nll_b)):
            worst["nll"] = max(worst["nll"], float((np.abs(found - expected) / np.maximum(1, expected)).max()))
        worst["kl"] = max(worst["kl"], float((np.abs(mine.kl - kl) / np.maximum(1e-2, kl)).max()))
        assert kl.mean() > 1e-4
        # A tie to within rounding may fall either way; everything else is the same token.
        for found, logp in ((theirs.best, logp_a), (mine.best, logp_b)):
            assert (logp.max(-1) - logp[np.arange(len(found)), found] < 1e-5).all()
    print(f"\n{name}: worst relative error of the loss {worst['nll']:.1e}, of the divergence {worst['kl']:.1e}")
    assert worst["nll"] < 1e-5
    assert worst["kl"] < 1e-3


def test_a_4096_token_sequence_through_block_selection_equals_eager(tmp_path: Path) -> None:
    m3 = tiny.make_tiny_m3(tmp_path / "m3", seed=6, num_hidden_layers=2, num_local_experts=4)
    long = [sequence(4096, [*range(1, 4096, 13), 4095])]
    task = Plain(long)
    run(m3, None, [task])
    expected, _ = reference(full_logits(m3, long)[0], long[0])
    error = np.abs(task.checkpoint[0].nll - expected) / np.maximum(1, expected)
    print(f"\n4,096 tokens: worst relative error {error.max():.1e}")
    assert error.max() < 1e-5


def test_a_model_is_its_own_equal_and_the_noise_floor_is_not_zero(m3: Path) -> None:
    task = Plain(MIXED, noise=[0, 3])
    record = run(m3, m3, [task])
    assert [layer["relative_error"] for layer in record.layers] == [0.0, 0.0, 0.0]
    assert all(float(p.kl.max()) < 1e-9 for p in task.checkpoint if p.kl is not None)
    assert [len(p.nll) for p in task.noise] == [39, 2]
    noise = np.concatenate([p.kl for p in task.noise if p.kl is not None])
    assert 1e-7 < noise.mean() < 1.0
    for number, rounded in zip((0, 3), task.noise, strict=True):
        exact = task.checkpoint[number].nll
        assert 0 < float(np.abs(rounded.nll - exact).mean()) < 0.5


def test_tasks_share_a_text_and_keep_their_own_tokens(m2: Path) -> None:
    one = sequence(60)
    first, second = (type(one)(one.ids, np.array(scored)) for scored in ([5, 9, 30], [9, 59]))
    together = [Plain([first], name="a"), Plain([second, sequence(20)], name="b")]
    progress = Silent()
    run(m2, None, together, progress=progress)
    assert "78 tokens" in progress.lines[0]  # 59 that lie before the last one predicted, and 19
    alone = Plain([one])
    run(m2, None, [alone])
    assert np.array_equal(together[0].checkpoint[0].nll, alone.checkpoint[0].nll[[4, 8, 29]])
    assert np.array_equal(together[1].checkpoint[0].best, alone.checkpoint[0].best[[8, 58]])


def test_layout_covers_every_token_once_and_keeps_batches_small() -> None:
    lengths = [5, 9, 5, 2, 30, 9]
    sequences = [sequence(n, seed=i) for i, n in enumerate(lengths)]
    for longest_first in (False, True):
        layout = lay_out(sequences, 12, longest_first=longest_first)
        assert len(layout.ids) == sum(n - 1 for n in lengths)
        assert [b.tokens.start for b in layout.batches] == [0, *[b.tokens.stop for b in layout.batches[:-1]]]
        for batch in layout.batches:
            assert sum(count * length for count, length in batch.groups) == batch.size
            assert batch.size <= 12 or batch.groups == ((1, batch.size),)
        for one, place, scored in zip(sequences, layout.place, layout.scored, strict=True):
            assert np.array_equal(layout.ids[place : place + len(one.ids) - 1], one.ids[:-1])
            assert np.array_equal(layout.rows[scored], place + one.scored - 1)
            assert np.array_equal(layout.targets[scored], one.ids[one.scored])


def test_unique_merges_what_is_predicted() -> None:
    a, b = sequence(30, [1, 7]), sequence(30, [2, 7, 20])
    texts, where = unique([a, sequence(8), b])
    assert len(texts) == 2 and texts[0].scored.tolist() == [1, 2, 7, 20]
    assert [(n, p.tolist()) for n, p in (where[0], where[2])] == [(0, [0, 2]), (0, [1, 2, 3])]


def test_no_tensor_of_tokens_by_vocabulary(m2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_TOKENS", 50)
    monkeypatch.setattr("m3quant.evaluate.passes.CHUNK_TOKENS", 50)
    monkeypatch.setattr(head, "_WORDS", 64)
    seen = []
    plain = head.linear
    monkeypatch.setattr(head, "linear", lambda x, w: seen.append((len(x), len(w))) or plain(x, w))
    task = Plain([sequence(201)])
    run(m2, m2, [task])
    assert max(rows for rows, _ in seen) <= 50 and max(words for _, words in seen) <= 64
    assert len(seen) == 2 * 4 * 8  # two models, four chunks of tokens, 512 words


def test_states_on_the_disk_give_the_same_bits(m3: Path, tmp_path: Path) -> None:
    figures = []
    for place in ("host", "disk"):
        task, progress = Plain(MIXED, noise=[1]), Silent()
        run(m3, m3, [task], tmp_path / place, progress, states=place, batch_tokens=256)
        figures.append([p.nll for p in (*task.checkpoint, *task.noise)])
        assert {"host": "in host memory", "disk": "on the disk in"}[place] in progress.lines[0]
        assert progress.done == progress.total > 0
        assert sorted(p.name for p in (tmp_path / place).iterdir()) == [EVAL_FILE]
    assert all(np.array_equal(a, b) for a, b in zip(*figures, strict=True))


def test_states_that_do_not_fit_go_to_the_disk_and_it_is_said_first(
    m2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m3quant.evaluate.states.free_memory", lambda: 0)
    progress = Silent()
    run(m2, None, [Plain([sequence(100)])], tmp_path, progress)
    assert "99 tokens x 256 x float32 (checkpoint) = 0.00 GB, on the disk in" in progress.lines[0]
    with pytest.raises(EvaluationError, match="--report"):
        run(m2, None, [Plain([sequence(100)])])


@pytest.mark.parametrize("place", ["host", "disk"])
def test_killed_at_durable_operations_it_continues_with_the_same_figures(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.make_tiny_m3(tmp_path / "source", num_local_experts=2, num_experts_per_tok=1, num_hidden_layers=2)
    other = changed_copy(source, tmp_path / "other", 0.02)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.evaluate.kill_evaluation", str(other), str(source), str(tmp_path), place, "17"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{place}: {found}")
    assert found["differing"] == [] and found["points"] >= 8
    assert found["again"][0] >= 3 and found["again"][1]


def test_an_interrupted_run_continues_with_its_layer_and_a_changed_one_is_refused(m3: Path, tmp_path: Path) -> None:
    task = Plain([sequence(80)])
    with pytest.raises(KeyboardInterrupt):
        run(m3, m3, [task], tmp_path, StopAfter(2))
    assert not (tmp_path / EVAL_FILE).exists()
    records = [json.loads(line) for line in (tmp_path / JOURNAL / "units.jsonl").read_text().splitlines()]
    assert [r["unit"] for r in records] == [0, 1]
    with pytest.raises(OutputError, match="batch_tokens was 16384, now 99"):
        run(m3, m3, [task], tmp_path, batch_tokens=99)
    with pytest.raises(OutputError, match=r"task plain was .1 sequences, 80 tokens, .*now .1 sequences, 81 tokens"):
        run(m3, m3, [Plain([sequence(81)])], tmp_path)
    cut = tmp_path / JOURNAL / "states-00002-source.states"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:100])
    with pytest.raises(OutputError, match=rf"holds other hidden states .*remove .*{JOURNAL} and start again"):
        run(m3, m3, [task], tmp_path)
    cut.write_bytes(whole)
    progress = Silent()
    resumed = run(m3, m3, [task], tmp_path, progress)
    assert "continuing: 2 of 3 layers are finished" in progress.lines
    assert [facts["layer"] for facts in resumed.layers] == [0, 1, 2]
    assert resumed.results == run(m3, m3, [task]).results


def _broken(source: Path, folder: Path, suffix: str) -> Path:
    """A copy in which one tensor holds a NaN."""
    changed_copy(source, folder, 0.0)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith(suffix):
                tensors[name].view(-1)[5] = torch.nan
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_the_layer_where_nan_began_is_named(m2: Path, tmp_path: Path) -> None:
    broken = _broken(m2, tmp_path / "layer", "layers.1.self_attn.v_proj.weight")
    with pytest.raises(EvaluationError, match=r"^layer 1 of .*layer gives NaN or Inf"):
        run(broken, m2, [Plain([sequence(30)])])
    broken = _broken(m2, tmp_path / "head", "lm_head.weight")
    for checkpoint, source in ((broken, m2), (m2, broken)):
        with pytest.raises(
            EvaluationError, match=r"^lm_head of .*head holds NaN or Inf, the layers before it are finite"
        ):
            run(checkpoint, source, [Plain([sequence(30)])])
    broken = _broken(m2, tmp_path / "embedding", "embed_tokens.weight")
    with pytest.raises(EvaluationError, match=r"^embed_tokens of .*embedding holds NaN or Inf"):
        run(broken, m2, [Plain([ScoredSequence(np.zeros(30, dtype=np.int64), np.arange(1, 30))])])


@pytest.mark.parametrize(("family", "kind"), [("m2", "fp8"), ("m3", "mxfp8")])
def test_fp8_sources_are_read_as_what_they_mean(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, kind: str
) -> None:
    """The native FP8 layouts give the same bits as a BF16 checkpoint with their dequantized weights."""
    stored, dense = quantized_source(request.getfixturevalue(family), tmp_path, kind)
    task = Plain([sequence(50)])
    record = run(stored, dense, [task], activations="exact")
    assert task.source is not None and np.array_equal(task.checkpoint[0].nll, task.source[0].nll)
    assert record.checkpoint.stored == {"fp8": "fp8-block", "mxfp8": "mxfp8"}[kind]
    assert record.source is not None and record.source.stored == "bf16"


def test_models_that_do_not_match_are_refused(m2: Path, m3: Path, tmp_path: Path) -> None:
    task = [Plain([sequence(30)])]
    for number, (overrides, message) in enumerate(
        [({"vocab_size": 640}, "vocab_size 640"), ({"num_hidden_layers": 1}, "num_hidden_layers 1")]
    ):
        other = tiny.make_tiny_m2(tmp_path / str(number), num_local_experts=8, **overrides)
        with pytest.raises(EvaluationError, match=message):
            run(other, m2, task)
    with pytest.raises(EvaluationError, match="minimax_m3_vl"):
        run(m3, m2, task)


def test_lengths_beyond_the_context_are_refused(tmp_path: Path) -> None:
    short = tiny.make_tiny_m2(tmp_path / "short", num_local_experts=4, max_position_embeddings=64)
    run(short, None, [Plain([sequence(65)])])
    with pytest.raises(EvaluationError, match=r"task plain runs 65 tokens, .* max_position_embeddings 64"):
        run(short, None, [Plain([sequence(66)])])


def test_short_m3_sequences_do_not_exercise_its_selection(m2: Path, m3: Path) -> None:
    def notes(folder: Path, length: int) -> list[str]:
        return run(folder, None, [Plain([sequence(length)])]).results[0].notes

    assert "does not exercise MSA" in notes(m3, 257)[0]
    assert notes(m3, 258) == [] and notes(m2, 40) == []
