"""Perplexity in the three conventions that papers and tools report. They differ by more than quantization does: a figure of one
cannot be compared with a figure of another, and each carries its label."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..artifact.eval_record import Result
from ..errors import EvaluationError
from . import metrics
from .task import Predictions, ScoredSequence
from .texts import BUNDLED, Texts, load_texts, token_ids


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid")
    data: str = BUNDLED
    name: str | None = None  # of the task, where a suite has two of a kind


class WindowParams(_Params):
    """window: tokens. max_windows: at most this many from the start of the text, None for all."""

    window: int = Field(default=2048, ge=2)
    max_windows: int | None = Field(default=None, ge=1)


class RollingParams(_Params):
    """window: lm-eval's max_length. max_documents: at most this many from the start, None for all."""

    window: int = Field(default=2048, ge=2)
    max_documents: int | None = Field(default=None, ge=1)


class ChunkParams(_Params):
    """window: llama.cpp's n_ctx. max_windows: its --chunks."""

    window: int = Field(default=512, ge=4)
    max_windows: int | None = Field(default=None, ge=1)


def cut_windows(ids: np.ndarray, texts: Texts, length: int, most: int | None) -> list[np.ndarray]:
    """Whole windows from the start, the remainder dropped. Raises EvaluationError if there is not one."""
    count = len(ids) // length
    if count == 0:
        raise EvaluationError(
            f"{texts.name} has {len(ids)} tokens, less than one window of {length}: give more text, or set a shorter window."
        )
    return [ids[i * length : (i + 1) * length] for i in range(min(count, most or count))]


class GptqPerplexity:
    """Non-overlapping windows of the joined text; the first token of a window is context, all others are predicted."""

    kind = "perplexity-gptq"

    def __init__(self, texts: Texts, windows: Sequence[np.ndarray], name: str | None = None) -> None:
        self.name = name or self.kind
        self._texts, self._length = texts, len(windows[0])
        self._sequences = [ScoredSequence(w, np.arange(1, self._length)) for w in windows]

    def sequences(self) -> Sequence[ScoredSequence]:
        return self._sequences

    def results(self, checkpoint: Sequence[Predictions], source: Sequence[Predictions] | None) -> list[Result]:
        def figures(predictions: Sequence[Predictions]) -> dict[str, float]:
            return {"perplexity": metrics.gptq_perplexity([p.nll for p in predictions], self._length)}

        count = len(self._sequences)
        return [
            Result(
                task=self.name,
                convention=f"gptq-windows-{self._length}",
                label=f"perplexity, GPTQ/AWQ convention: {count} non-overlapping windows of {self._length} tokens, no BOS",
                data=self._texts.data(),
                tokens=count * (self._length - 1),
                metrics=figures(checkpoint),
                source_metrics=figures(source) if source is not None else None,
            )
        ]


def gptq(tokenizer: Any, config: dict[str, Any], params: WindowParams) -> GptqPerplexity:
    texts = load_texts(params.data, tokenizer)
    windows = cut_windows(token_ids(tokenizer, texts.joined()), texts, params.window, params.max_windows)
    return GptqPerplexity(texts, windows, params.name)


class RollingPerplexity:
    """lm-eval's loglikelihood_rolling: each document from its own start, windows that share one token of context.

    The first window is preceded by a prefix token; a last, shorter window keeps as much context as fits.
    """

    kind = "perplexity-lm-eval"

    def __init__(
        self, texts: Texts, documents: Sequence[np.ndarray], prefix: int, window: int, name: str | None = None
    ) -> None:
        self.name = name or self.kind
        self._texts, self._window = texts, window
        self._documents = texts.documents[: len(documents)]
        self._sequences = [s for ids in documents for s in rolling_windows(ids, prefix, window)]

    def sequences(self) -> Sequence[ScoredSequence]:
        return self._sequences

    def results(self, checkpoint: Sequence[Predictions], source: Sequence[Predictions] | None) -> list[Result]:
        # Words as lm-eval splits them, which counts an empty one at either end of a text that begins or ends in white space.
        words = sum(len(re.split(r"\s+", text)) for text in self._documents)
        size = sum(len(text.encode()) for text in self._documents)

        def figures(predictions: Sequence[Predictions]) -> dict[str, float]:
            total = sum(float(p.nll.astype(np.float64).sum()) for p in predictions)
            return metrics.rolling_perplexities(-total, words, size)

        measured = figures(checkpoint)
        beyond = "word_perplexity" not in measured
        return [
            Result(
                task=self.name,
                convention=f"lm-eval-rolling-{self._window}",
                label=f"perplexity per word and byte, lm-eval convention: rolling log-likelihood of {len(self._documents)} "
                f"documents, max_length {self._window}",
                data=self._texts.data(),
                tokens=sum(len(s.scored) for s in self._sequences),
                metrics=measured,
                source_metrics=figures(source) if source is not None else None,
                notes=[f"word_perplexity is beyond float64: the text is {words:,} words of {size:,} bytes"]
                if beyond
                else [],
            )
        ]


def rolling_windows(ids: np.ndarray, prefix: int, window: int) -> list[ScoredSequence]:
    """Every token of `ids` predicted once: lm-eval's rolling windows with a context of one token."""
    padded = np.concatenate([[prefix], ids])
    out = []
    for start in range(0, len(ids), window):
        stop = min(start + window, len(ids))
        # `padded` is one ahead of `ids`: its [a : stop + 1] ends with the last token predicted here.
        first = start if start == 0 or stop - start == window else max(0, stop - window)
        out.append(ScoredSequence(padded[first : stop + 1], np.arange(start - first + 1, stop - first + 1)))
    return out


def lm_eval(tokenizer: Any, config: dict[str, Any], params: RollingParams) -> RollingPerplexity:
    texts = load_texts(params.data, tokenizer)
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise EvaluationError(
            "the tokenizer has neither a BOS nor an EOS token, one of which starts every document here."
        )
    documents = [token_ids(tokenizer, text) for text in texts.shown[: params.max_documents]]
    if not any(len(ids) for ids in documents):
        raise EvaluationError(f"{texts.name} has no token: give text.")
    return RollingPerplexity(texts, documents, int(prefix), params.window, params.name)


class LlamaCppPerplexity:
    """llama-perplexity: chunks of n_ctx tokens, each begun with BOS where the model has one; only the second half counts."""

    kind = "perplexity-llama-cpp"

    def __init__(self, texts: Texts, chunks: Sequence[np.ndarray], bos: bool, name: str | None = None) -> None:
        self.name = name or self.kind
        self._texts, self._bos, self._length = texts, bos, len(chunks[0])
        first = self._length // 2 + 1
        self._sequences = [ScoredSequence(c, np.arange(first, self._length)) for c in chunks]

    def sequences(self) -> Sequence[ScoredSequence]:
        return self._sequences

    def results(self, checkpoint: Sequence[Predictions], source: Sequence[Predictions] | None) -> list[Result]:
        def figures(predictions: Sequence[Predictions]) -> dict[str, float]:
            return metrics.llama_cpp_perplexity(np.concatenate([p.nll for p in predictions]))

        start = "BOS at the start of each" if self._bos else "no BOS"
        return [
            Result(
                task=self.name,
                convention=f"llama.cpp-{self._length}",
                label=f"perplexity, llama.cpp convention: {len(self._sequences)} chunks of {self._length}, second half scored, {start}",
                data=self._texts.data(),
                tokens=sum(len(s.scored) for s in self._sequences),
                metrics=figures(checkpoint),
                source_metrics=figures(source) if source is not None else None,
            )
        ]


def llama_cpp(tokenizer: Any, config: dict[str, Any], params: ChunkParams) -> LlamaCppPerplexity:
    texts = load_texts(params.data, tokenizer)
    ids = token_ids(tokenizer, texts.joined())
    bos = tokenizer.bos_token_id
    if bos is not None:
        ids = np.concatenate(
            [[bos], ids]
        )  # llama.cpp tokenizes with BOS in front, then puts it over each chunk's first
    chunks = [chunk.copy() for chunk in cut_windows(ids, texts, params.window, params.max_windows)]
    if bos is not None:
        for chunk in chunks:
            chunk[0] = bos
    return LlamaCppPerplexity(texts, chunks, bos is not None, params.name)
