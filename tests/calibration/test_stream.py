"""Streaming a checkpoint: per-token losses against transformers, hidden states on disk, read-ahead, divergence."""

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from m3quant.calibration import head as head_module
from m3quant.calibration.head import Head, compare_heads, head_nll
from m3quant.calibration.layers import Layer, layer_spec
from m3quant.calibration.stream import HiddenStates, Prefetcher, embed, nll, read_head, read_layer, run_layer
from m3quant.errors import CalibrationError, CheckpointError
from tests.support.calibration.tiny import FolderSource, load_reference, make_tiny_m2, make_tiny_m3


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_tokens(windows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 500, (windows, length), generator=torch.Generator().manual_seed(length))


def reference_nll(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = load_reference(folder)(input_ids=tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten(), reduction="none").view(
        tokens.shape[0], -1
    )


@pytest.fixture(scope="module")
def m2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_m2(tmp_path_factory.mktemp("m2"), seed=3)


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_m3(tmp_path_factory.mktemp("m3"), seed=4)


@pytest.mark.parametrize("length", [50, 700])
@pytest.mark.parametrize("name", ["m2", "m3"])
def test_nll_equals_transformers(request: pytest.FixtureRequest, name: str, length: int) -> None:
    folder, tokens = request.getfixturevalue(name), random_tokens(2, length)
    expected = reference_nll(folder, tokens)
    found = nll(FolderSource(folder), tokens, micro_batch=1)
    assert found.shape == (2, length - 1) and found.dtype == torch.float32
    error = float(((found - expected).abs() / expected.abs().clamp(min=1)).max())
    assert error < 1e-5, f"{error:.2e}"


def test_nll_with_tied_embeddings_equals_transformers(tmp_path: Path) -> None:
    folder, tokens = make_tiny_m2(tmp_path, seed=5, tie_word_embeddings=True), random_tokens(1, 60)
    source = FolderSource(folder)
    assert "lm_head.weight" not in source.tensors
    expected = reference_nll(folder, tokens)
    assert torch.allclose(nll(source, tokens).double(), expected, rtol=1e-5, atol=1e-5)


def test_spilling_changes_nothing_and_leaves_no_file(m2: Path, tmp_path: Path) -> None:
    source, tokens, done = FolderSource(m2), random_tokens(3, 64), []
    spill = tmp_path / "deep" / "states"
    spilled = nll(source, tokens, micro_batch=2, spill=spill, progress=lambda i, n: done.append((i, n)))
    assert torch.equal(spilled, nll(source, tokens, micro_batch=2))
    assert done == [(1, 2), (2, 2)]
    assert not spill.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spilled_states_keep_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    values = randn(5, 7, 9, seed=1).to(dtype)
    with HiddenStates.empty((5, 7, 9), dtype, spill=tmp_path / "states") as states:
        assert (tmp_path / "states").stat().st_size == values.nbytes
        for windows in states.batches(2):
            states.write(windows, values[windows])
        states.write(slice(1, 2), -values[1:2])
        states.sync()
        assert torch.equal(states.read(slice(0, 5)), torch.cat([values[:1], -values[1:2], values[2:]]))
    with HiddenStates.opened(tmp_path / "states", (5, 7, 9), dtype) as states:
        assert torch.equal(states.read(slice(3, 5)), values[3:])
    with pytest.raises(CalibrationError, match="states hold"):
        HiddenStates.opened(tmp_path / "states", (5, 7, 8), dtype)


def test_spilled_states_refuse_windows_of_another_shape(tmp_path: Path) -> None:
    with (
        HiddenStates.empty((2, 3, 4), spill=tmp_path / "states") as states,
        pytest.raises(ValueError, match="cannot take"),
    ):
        states.write(slice(0, 1), torch.zeros(1, 3, 5))


def test_a_file_cut_short_while_open_is_an_error(tmp_path: Path) -> None:
    with HiddenStates.empty((2, 3, 4), spill=tmp_path / "states") as states:
        os.truncate(tmp_path / "states", 20)
        with pytest.raises(CalibrationError, match="end early"):
            states.read(slice(0, 2))


def test_batches_cover_every_window_once() -> None:
    states = HiddenStates(torch.zeros(7, 1, 1))
    assert [(s.start, s.stop) for s in states.batches(3)] == [(0, 3), (3, 6), (6, 7)]


def test_prefetcher_reads_one_ahead_and_no_more() -> None:
    started = [threading.Event() for _ in range(4)]

    def load(key: int) -> int:
        started[key].set()
        return key * key

    with Prefetcher(load, range(4)) as values:
        found = []
        for key, value in enumerate(values):
            found.append(value)
            if key + 1 < 4:
                assert started[key + 1].wait(10)
            if key + 2 < 4:
                assert not started[key + 2].is_set()
    assert found == [0, 1, 4, 9]


def test_prefetcher_raises_where_the_value_would_have_been() -> None:
    def load(key: int) -> int:
        if key == 1:
            raise OSError("shard gone")
        return key

    with Prefetcher(load, range(3)) as values:
        assert next(values) == 0
        with pytest.raises(OSError, match="shard gone"):
            next(values)


def test_prefetcher_closes_while_a_read_is_running() -> None:
    started, release, finished = threading.Event(), threading.Event(), threading.Event()

    def load(key: int) -> int:
        if key == 1:
            started.set()
            release.wait(10)
            finished.set()
        return key

    with Prefetcher(load, range(3)) as values:
        assert next(values) == 0
        assert started.wait(10)
        release.set()
    assert finished.is_set()
    values.close()
    with pytest.raises(StopIteration):
        next(values)


def test_embed_refuses_tokens_of_another_tokenizer() -> None:
    table = randn(10, 4, seed=1)
    assert torch.equal(embed(torch.tensor([[3, 0]]), table), table[torch.tensor([[3, 0]])])
    for bad in (10, -1):
        with pytest.raises(CalibrationError, match="10 tokens"):
            embed(torch.tensor([[0, bad]]), table)


def random_head(seed: int, vocab: int = 203, hidden: int = 16) -> Head:
    return Head(randn(hidden, seed=seed) * 0.3, randn(vocab, hidden, seed=seed + 1).bfloat16(), 1e-6, True)


def full_log_probabilities(head: Head, x: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    normed = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + head.norm.double())
    return torch.log_softmax(normed @ head.weight.double().T, dim=-1)[:, :-1]


@pytest.mark.parametrize(("tokens_at_once", "words_at_once"), [(2048, 8192), (5, 64), (3, 7)])
def test_divergence_equals_the_full_softmax(
    monkeypatch: pytest.MonkeyPatch, tokens_at_once: int, words_at_once: int
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_TOKENS", tokens_at_once)
    monkeypatch.setattr(head_module, "_WORDS", words_at_once)
    tokens = torch.randint(0, 203, (3, 12), generator=torch.Generator().manual_seed(0))
    source, quant = random_head(1), random_head(1)
    x = randn(3, 12, 16, seed=5)
    y = x + 0.2 * randn(3, 12, 16, seed=6)
    a, b = full_log_probabilities(source, x), full_log_probabilities(quant, y)
    found = compare_heads(source, quant, HiddenStates(x), HiddenStates(y), tokens)
    target = tokens[:, 1:, None]
    assert torch.allclose(found.nll_source.double(), -a.gather(-1, target)[..., 0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.nll_quant.double(), -b.gather(-1, target)[..., 0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.kl.double(), (a.exp() * (a - b)).sum(-1), rtol=1e-4, atol=2e-6)
    assert torch.equal(found.agree, a.argmax(-1) == b.argmax(-1))
    assert 0 < int(found.agree.sum()) < found.agree.numel()
    assert torch.equal(found.nll_source, head_nll(source, HiddenStates(x), tokens))


def test_run_layer_reports_the_relative_error(m2: Path) -> None:
    source = FolderSource(m2)
    layer = Layer(layer_spec(source.config, 0), read_layer(source, 0))
    x = randn(3, 20, 256, seed=1)
    expected = layer.forward(x)
    reference = expected + 0.01 * randn(3, 20, 256, seed=2)
    states = HiddenStates(x.clone())
    error = run_layer(layer, states, 2, reference=HiddenStates(reference))
    assert error == pytest.approx(float((expected - reference).norm() / reference.norm()), rel=1e-4)
    assert torch.allclose(states.read(slice(0, 3)), expected, atol=1e-5)


def test_a_non_finite_output_names_layer_and_windows(m2: Path) -> None:
    source = FolderSource(m2)
    tensors = read_layer(source, 1)
    layer = Layer(
        layer_spec(source.config, 1), tensors | {"self_attn.v_proj.weight": torch.full((128, 256), torch.inf)}
    )
    with pytest.raises(CalibrationError, match=r"layer 1 gives NaN or Inf on windows 0\.\.1"):
        run_layer(layer, HiddenStates(randn(3, 8, 256, seed=1)), 2)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_missing_end_of_the_model_is_named(m2: Path, name: str) -> None:
    source = FolderSource(m2)
    del source.tensors[name]
    with pytest.raises(CheckpointError, match=name):
        nll(source, random_tokens(1, 8))


def test_read_head_takes_the_m3_names(m3: Path) -> None:
    source = FolderSource(m3)
    head = read_head(source)
    assert torch.equal(head.weight, source.tensors["language_model.lm_head.weight"])
    assert torch.equal(head.norm, source.tensors["language_model.model.norm.weight"]) and head.one_plus
