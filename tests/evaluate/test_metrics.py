"""Every figure against the tool that defines it, or a plain float64 reference on full logits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3quant.calibration.corpus import load_tokenizer
from m3quant.checkpoint import json_bytes
from m3quant.evaluate import metrics
from m3quant.evaluate.divergence import Divergence
from m3quant.evaluate.perplexity import (
    ChunkParams,
    GptqPerplexity,
    LlamaCppPerplexity,
    RollingParams,
    WindowParams,
    gptq,
    llama_cpp,
    lm_eval,
    rolling_windows,
)
from m3quant.evaluate.task import Predictions, ScoredSequence
from m3quant.evaluate.texts import Texts, wikitext_plain
from tests.support.calibration import tiny
from tests.support.evaluate.measuring import run
from tests.support.paths import FIXTURES

TEXTS = Texts("random", "0" * 64, None, ("a b",), ("a b",))


@pytest.fixture(scope="module")
def logits() -> Callable[[np.ndarray], torch.Tensor]:
    """transformers' eager float32 logits [L, V] of tiny-m2 for ids [L]."""
    model = tiny.load_reference(FIXTURES / "tiny-m2")

    def of(ids: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(ids.copy())[None]).logits[0]

    return of


def predicted(of: Callable[[np.ndarray], torch.Tensor], sequence: ScoredSequence) -> Predictions:
    """Predictions from given logits, float32 as the pass stores them."""
    logp = torch.log_softmax(of(sequence.ids)[torch.from_numpy(sequence.scored) - 1].double(), -1)
    nll = -logp.gather(1, torch.from_numpy(sequence.ids[sequence.scored])[:, None])[:, 0]
    return Predictions(nll.float().numpy(), logp.argmax(-1).numpy())


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two documents: one of many windows, one of a single short one; white space at an end."""
    import json

    text = (FIXTURES / "heldout.txt").read_text(encoding="utf-8")
    path = tmp_path_factory.mktemp("documents") / "two.jsonl"
    path.write_text("\n".join(json.dumps({"text": part}) for part in (text[3000:4800] + "\n", text[9000:9300])))
    return path


def test_rolling_perplexity_equals_lm_eval(documents: Path, logits: Callable[[np.ndarray], torch.Tensor]) -> None:
    """lm-eval's own HFLM.loglikelihood_rolling, process_results and aggregations, on the same model through transformers."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

    tokenizer = load_tokenizer(FIXTURES / "tiny-m2")
    model = tiny.load_reference(FIXTURES / "tiny-m2")
    window = 128
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=window, batch_size=1, device="cpu")
    task = lm_eval(tokenizer, {}, RollingParams(data=str(documents), window=window))
    pages = task._documents
    requests = [Instance("loglikelihood_rolling", {}, (page,), i, metadata=("t", i, 1)) for i, page in enumerate(pages)]
    found = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    items = [process_results({"page": page}, (value,)) for page, value in zip(pages, found, strict=True)]
    expected = {
        "word_perplexity": weighted_perplexity([i["word_perplexity"] for i in items]),
        "byte_perplexity": weighted_perplexity([i["byte_perplexity"] for i in items]),
        "bits_per_byte": bits_per_byte([i["bits_per_byte"] for i in items]),
    }
    ours = task.results([predicted(logits, s) for s in task.sequences()], None)[0]
    assert ours.convention == "lm-eval-rolling-128"
    # word_perplexity is the exponential of thousands of nats: its exponent is compared, which is what the logits decide.
    for name, value in expected.items():
        mine = ours.metrics[name]
        error = abs(mine / value - 1) if name != "word_perplexity" else abs(math.log(mine) / math.log(value) - 1)
        print(f"{name}: lm-eval {value:.10g}, ours {mine:.10g}, relative error {error:.1e}")
        assert error < 1e-6
    streamed = lm_eval(tokenizer, {}, RollingParams(data=str(documents), window=window))
    figures = run(FIXTURES / "tiny-m2", None, [streamed]).results[0].metrics
    print(f"streamed bits per byte {figures['bits_per_byte']:.10g}")
    assert figures["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 23, 31])
def test_rolling_windows_are_those_of_lm_eval(count: int) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = np.random.default_rng(count).integers(0, 99, count)
    expected = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids.tolist(), 777, 8, 1)]
    found = rolling_windows(ids, 777, 8)
    assert [(s.ids[: s.scored[0]].tolist(), s.ids[s.scored].tolist()) for s in found] == [
        (context, continuation) for context, continuation in expected
    ]
    assert all(len(s.ids) - 1 <= 8 for s in found)


def test_wikitext_is_made_plain_as_lm_eval_does() -> None:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    pieces = ["= = =", "= =", "= = = =", " @-@ ", " @,@ ", " @.@ ", " : ", " ; ", " . ", " , ", " ! ", " ? ", "( a )", "[ b ]",
              "{ c }", '" d "', "' e '", " 's", "s ' ", " \n", "\n ", " N ", " ° ", "word", " ", "1", "/' 5/"]  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(300):
        page = "".join(pieces[i] for i in rng.integers(0, len(pieces), 30))
        assert wikitext_plain(page) == wikitext_detokenizer({"page": page})


def test_gptq_perplexity_equals_its_loop(documents: Path, logits: Callable[[np.ndarray], torch.Tensor]) -> None:
    tokenizer = load_tokenizer(FIXTURES / "tiny-m2")
    task = gptq(tokenizer, {}, WindowParams(data=str(documents), window=100, max_windows=5))
    text = "\n\n".join(task._texts.documents)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    nlls = []
    for i in range(5):  # as the GPTQ and AWQ evaluation scripts do it
        batch = ids[:, i * 100 : (i + 1) * 100]
        shift = logits(batch[0].numpy())[:-1]
        nlls.append(torch.nn.functional.cross_entropy(shift.double(), batch[0, 1:]) * 100)
    expected = float(torch.exp(torch.stack(nlls).sum() / (5 * 100)))
    found = task.results([predicted(logits, s) for s in task.sequences()], None)[0]
    assert found.metrics["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert (found.convention, found.tokens) == ("gptq-windows-100", 5 * 99)


def test_llama_cpp_perplexity_equals_its_loop(documents: Path, logits: Callable[[np.ndarray], torch.Tensor]) -> None:
    tokenizer = load_tokenizer(FIXTURES / "tiny-m2")
    n_ctx, bos = 64, tokenizer.bos_token_id
    task = llama_cpp(tokenizer, {}, ChunkParams(data=str(documents), window=n_ctx))
    ids = [bos, *tokenizer("\n\n".join(task._texts.documents), add_special_tokens=False).input_ids]
    n_chunk = len(ids) // n_ctx
    total, squares, count = 0.0, 0.0, 0
    for chunk in range(n_chunk):  # as llama-perplexity does it
        tokens = list(ids[chunk * n_ctx : (chunk + 1) * n_ctx])
        tokens[0] = bos
        logp = torch.log_softmax(logits(np.array(tokens)).double(), -1)
        for j in range(n_ctx // 2, n_ctx - 1):
            value = -float(logp[j, tokens[j + 1]])
            total, squares, count = total + value, squares + value * value, count + 1
    mean = total / count
    error = math.sqrt((squares / count - mean * mean) / (count - 1)) * math.exp(mean)
    found = task.results([predicted(logits, s) for s in task.sequences()], None)[0]
    assert found.tokens == count == n_chunk * (n_ctx - 1 - n_ctx // 2)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
    assert found.metrics["perplexity_error"] == pytest.approx(error, rel=1e-4)


def test_conventions_are_never_one_figure(documents: Path) -> None:
    tokenizer = load_tokenizer(FIXTURES / "tiny-m2")
    data = str(documents)
    tasks = [
        gptq(tokenizer, {}, WindowParams(data=data, window=64)),
        lm_eval(tokenizer, {}, RollingParams(data=data, window=64)),
        llama_cpp(tokenizer, {}, ChunkParams(data=data, window=64)),
    ]
    results = run(FIXTURES / "tiny-m2", None, tasks).results
    assert len({r.convention for r in results}) == 3
    assert all(re.fullmatch(r"[0-9a-f]{64}", r.data.sha256) for r in results if r.data)


def random_predictions(seed: int) -> tuple[list[ScoredSequence], list[Any], list[Any]]:
    """Ragged sequences, and float64 log-probabilities of two models on their scored tokens."""
    rng = np.random.default_rng(seed)
    sequences, first, second = [], [], []
    for length in (200, 37, 90):
        scored = np.sort(rng.choice(np.arange(1, length), length // 2, replace=False))
        sequences.append(ScoredSequence(rng.integers(0, 50, length), scored))
        a = torch.from_numpy(rng.normal(0, 2, (len(scored), 50)))
        b = a + torch.from_numpy(rng.normal(0, 0.3, a.shape))
        first.append(torch.log_softmax(a, -1).numpy())
        second.append(torch.log_softmax(b, -1).numpy())
    return sequences, first, second


def predictions_of(sequences: list[ScoredSequence], logp: list[Any], against: list[Any] | None) -> list[Predictions]:
    out = []
    for i, (s, q) in enumerate(zip(sequences, logp, strict=True)):
        kl = None if against is None else (np.exp(against[i]) * (against[i] - q)).sum(-1).astype(np.float32)
        nll = -q[np.arange(len(q)), s.ids[s.scored]]
        out.append(Predictions(nll.astype(np.float32), q.argmax(-1), kl))
    return out


def test_divergence_figures_equal_a_plain_float64_reference() -> None:
    sequences, a, b = random_predictions(1)
    found = metrics.divergence(predictions_of(sequences, a, None), predictions_of(sequences, b, a))
    p, q = np.concatenate(a), np.concatenate(b)
    true = np.concatenate([s.ids[s.scored] for s in sequences])
    rows = np.arange(len(true))
    kl = (np.exp(p) * (p - q)).sum(-1)
    delta = np.exp(q[rows, true]) - np.exp(p[rows, true])
    expected = {
        "kl_mean": kl.mean(),
        "kl_mean_error": np.std(kl, ddof=1) / math.sqrt(len(kl)),
        "kl_median": np.sort(kl)[len(kl) // 2] if len(kl) % 2 else np.sort(kl)[len(kl) // 2 - 1 : len(kl) // 2 + 1].mean(),
        "kl_p99.9": np.quantile(kl, 0.999),
        "kl_max": max(kl),
        "top1_agreement": np.mean(p.argmax(-1) == q.argmax(-1)),
        "delta_p_mean": delta.mean(),
        "delta_p_rms": math.sqrt(np.mean(delta**2)),
        "delta_p_p1": np.quantile(delta, 0.01),
        "delta_p_p99.9": np.quantile(delta, 0.999),
        "nll_pearson": np.corrcoef(p[rows, true], q[rows, true])[0, 1],
        "nll_difference_mean": (p[rows, true] - q[rows, true]).mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-7), name
    assert 0 < found["top1_agreement"] < 1 and found["delta_p_rms"] > 0.01


def test_position_buckets_hold_every_token_once() -> None:
    sequences, a, b = random_predictions(2)
    source, other = predictions_of(sequences, a, None), predictions_of(sequences, b, a)
    cells = metrics.by_position([s.scored for s in sequences], source, other)
    assert [(c["start"], c["stop"]) for c in cells] == [(0, 64), (64, 128), (128, 256)]
    where = np.concatenate([s.scored for s in sequences])
    kl = np.concatenate([o.kl for o in other if o.kl is not None]).astype(np.float64)
    for cell in cells:
        inside = (where >= cell["start"]) & (where < cell["stop"])
        assert cell["tokens"] == inside.sum()
        assert cell["kl_mean"] == pytest.approx(kl[inside].mean(), rel=1e-9)


def test_divergence_needs_a_source_and_says_so() -> None:
    windows = [np.arange(20)]
    result = Divergence(TEXTS, windows, 1).results(
        [Predictions(np.ones(19, np.float32), np.zeros(19, np.int64))], None
    )[0]
    assert result.not_run == "no --source was given" and result.metrics == {}


def test_gptq_mean_is_of_window_means() -> None:
    task = GptqPerplexity(TEXTS, [np.arange(11), np.arange(11)])
    losses = [np.full(10, 1.0, np.float32), np.full(10, 2.0, np.float32)]
    predictions = [Predictions(nll, np.zeros(10, np.int64)) for nll in losses]
    assert task.results(predictions, predictions)[0].metrics["perplexity"] == pytest.approx(math.exp(1.5))


def test_figures_of_a_single_token_are_numbers_that_eval_json_can_hold() -> None:
    window = np.arange(4)
    said = [Predictions(np.ones(1, np.float32), np.zeros(1, np.int64), np.ones(1, np.float32))]
    data = Texts("text", "0" * 64, None, ("a",), ("a",))
    results = [
        *LlamaCppPerplexity(data, [window], bos=False).results(said, said),
        *GptqPerplexity(data, [window[:2]]).results(said, said),
        *Divergence(data, [window[:2]], 1).results(said, said),
    ]
    assert "perplexity" in results[0].metrics and "perplexity_error" not in results[0].metrics
    json_bytes([result.model_dump(mode="json") for result in results])
