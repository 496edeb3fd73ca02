"""Figures from per-token predictions, in float64. Definitions are those of the tools named; nothing here is a convention of m3quant's own
unless it says so."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence

import numpy as np

from ..errors import EvaluationError
from .task import Predictions

_MOST = math.log(sys.float_info.max)  # nats
# The tail that matters: a mean hides single tokens that went wrong.
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats. Raises EvaluationError where that is no number of float64's."""
    try:
        return math.exp(loss)
    except OverflowError:
        raise EvaluationError(
            f"the mean loss is {loss:.0f} nats per token, whose perplexity is no float64: the checkpoint predicts nothing; look "
            "for damaged weights (m3quant verify)."
        ) from None


def gptq_perplexity(windows: Sequence[np.ndarray], length: int) -> float:
    """GPTQ and AWQ: per window the mean loss of its `length` - 1 predicted tokens counts `length` times (IST-DASLab/gptq)."""
    losses = [float(w.astype(np.float64).mean()) * length for w in windows]
    return perplexity(sum(losses) / (len(windows) * length))


def rolling_perplexities(log_likelihood: float, words: int, characters: int) -> dict[str, float]:
    """lm-eval's word_perplexity, byte_perplexity and bits_per_byte from the summed log-likelihood (nats) of all documents.

    words, characters: of the original documents; `characters` are UTF-8 bytes. word_perplexity is left out where it is no
    float64: text written without spaces is one long word.
    """
    per_word = {}
    if -log_likelihood / words < _MOST:
        per_word["word_perplexity"] = math.exp(-log_likelihood / words)
    return {
        **per_word,
        "byte_perplexity": perplexity(-log_likelihood / characters),
        "bits_per_byte": -log_likelihood / characters / math.log(2),
    }


def llama_cpp_perplexity(nll: np.ndarray) -> dict[str, float]:
    """llama.cpp's final estimate and its +/-: exp(mean), and that times sigma / sqrt(n - 1), sigma with n (llama-perplexity).

    A single token has no +/-.
    """
    wide = nll.astype(np.float64)
    mean = float(wide.mean())
    variance = float((wide**2).mean()) - mean**2
    found = {"perplexity": perplexity(mean)}
    if wide.size > 1:
        found["perplexity_error"] = math.sqrt(max(0.0, variance) / (wide.size - 1)) * found["perplexity"]
    return found


def divergence(source: Sequence[Predictions], other: Sequence[Predictions]) -> dict[str, float]:
    """How `other` differs from `source` on the same tokens.

    kl_*: KL(source || other) in nats per token. delta_p_*: probability of the true token, other minus source; as in
    llama.cpp, rms is its root mean square. nll_pearson: correlation of the two log-probabilities of the true token.
    kl_mean_error: standard error of the mean over tokens, taken as independent.
    """
    kl = np.concatenate([p.kl for p in other if p.kl is not None]).astype(np.float64)
    nll_source = np.concatenate([p.nll for p in source]).astype(np.float64)
    nll_other = np.concatenate([p.nll for p in other]).astype(np.float64)
    agree = np.concatenate([a.best == b.best for a, b in zip(source, other, strict=True)])
    delta = np.exp(-nll_other) - np.exp(-nll_source)
    count = kl.size
    figures = {
        "kl_mean": float(kl.mean()),
        "kl_mean_error": float(kl.std() / math.sqrt(count - 1)) if count > 1 else math.nan,
        "kl_median": float(np.median(kl)),
        **{f"kl_p{p:g}": float(np.percentile(kl, p)) for p in PERCENTILES if p > 50},
        "kl_max": float(kl.max()),
        "top1_agreement": float(agree.mean()),
        "delta_p_mean": float(delta.mean()),
        "delta_p_rms": float(np.sqrt((delta**2).mean())),
        **{f"delta_p_p{p:g}": float(np.percentile(delta, p)) for p in PERCENTILES},
        "nll_pearson": pearson(nll_source, nll_other),
        "nll_difference_mean": float((nll_other - nll_source).mean()),
    }
    return {name: value for name, value in figures.items() if not math.isnan(value)}


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation coefficient; NaN where one of them does not vary."""
    a, b = x - x.mean(), y - y.mean()
    norm = math.sqrt(float((a**2).sum()) * float((b**2).sum()))
    return float((a * b).sum()) / norm if norm else math.nan


def position_edges(longest: int, first: int = 64) -> list[int]:
    """Bucket edges 0, first, 2 first, 4 first, ... up to the first at or above `longest`."""
    edges = [0, first]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return edges


def by_position(
    scored: Sequence[np.ndarray], source: Sequence[Predictions], other: Sequence[Predictions]
) -> list[dict[str, float]]:
    """Mean KL and loss of both models per bucket [start, stop) of the predicted token's position; empty ones left out."""
    where = np.concatenate(scored)
    kl = np.concatenate([p.kl for p in other if p.kl is not None]).astype(np.float64)
    nll_source = np.concatenate([p.nll for p in source]).astype(np.float64)
    nll_other = np.concatenate([p.nll for p in other]).astype(np.float64)
    agree = np.concatenate([a.best == b.best for a, b in zip(source, other, strict=True)])
    edges = position_edges(int(where.max()) + 1)
    cells = []
    for start, stop in itertools.pairwise(edges):
        inside = (where >= start) & (where < stop)
        if inside.any():
            cells.append(
                {
                    "start": start,
                    "stop": stop,
                    "tokens": int(inside.sum()),
                    "kl_mean": float(kl[inside].mean()),
                    "nll_source": float(nll_source[inside].mean()),
                    "nll": float(nll_other[inside].mean()),
                    "top1_agreement": float(agree[inside].mean()),
                }
            )
    return cells
