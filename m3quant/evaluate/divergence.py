"""How far a checkpoint is from its source, token by token over the whole vocabulary, compared with what rounding alone does to the
source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from ..artifact.eval_record import Result
from . import metrics
from .perplexity import WindowParams, cut_windows
from .task import Predictions, ScoredSequence
from .texts import Texts, load_texts, token_ids


class DivergenceParams(WindowParams):
    """noise_windows: windows on which the source is also compared with itself, spread over all of them."""

    noise_windows: int = Field(default=2, ge=1)


class Divergence:
    """KL divergence, agreement and the true token's probability, on the windows of the GPTQ convention."""

    kind = "divergence"

    def __init__(
        self, texts: Texts, windows: Sequence[np.ndarray], noise_windows: int, name: str | None = None
    ) -> None:
        self.name = name or self.kind
        self._texts, self._length = texts, len(windows[0])
        self._sequences = [ScoredSequence(w, np.arange(1, self._length)) for w in windows]
        count = min(noise_windows, len(windows))
        self._noise_of = sorted({round(i) for i in np.linspace(0, len(windows) - 1, count)})
        self._noise: Sequence[Predictions] | None = None
        self._noise_run = ""

    def sequences(self) -> Sequence[ScoredSequence]:
        return self._sequences

    def noise_sequences(self) -> Sequence[int]:
        return self._noise_of

    def take_noise(self, predictions: Sequence[Predictions], run: str) -> None:
        self._noise, self._noise_run = predictions, run

    def results(self, checkpoint: Sequence[Predictions], source: Sequence[Predictions] | None) -> list[Result]:
        where = f"{len(self._sequences)} windows of {self._length} tokens"
        common = {"task": self.name, "data": self._texts.data()}
        if source is None:
            label = f"divergence from the source: {where}"
            return [
                Result(convention="kl-full-vocabulary", label=label, not_run="no --source was given", **common)  # type: ignore[arg-type]
            ]
        scored = [s.scored for s in self._sequences]
        out = [
            Result(
                convention=f"kl-full-vocabulary-windows-{self._length}",
                label=f"divergence from the source, whole vocabulary, nats per token: {where}",
                tokens=sum(map(len, scored)),
                metrics=metrics.divergence(source, checkpoint),
                cells=metrics.by_position(scored, source, checkpoint),
                **common,  # type: ignore[arg-type]
            )
        ]
        if self._noise is not None:
            mine = [source[i] for i in self._noise_of]
            out.append(
                Result(
                    convention=f"noise-floor-windows-{self._length}",
                    label=f"noise floor: the source against itself, {self._noise_run}, {len(mine)} of these windows",
                    tokens=sum(len(p.nll) for p in mine),
                    metrics=metrics.divergence(mine, self._noise),
                    cells=metrics.by_position([scored[i] for i in self._noise_of], mine, self._noise),
                    **common,  # type: ignore[arg-type]
                )
            )
        return out


def divergence(tokenizer: Any, config: dict[str, Any], params: DivergenceParams) -> Divergence:
    texts = load_texts(params.data, tokenizer)
    windows = cut_windows(token_ids(tokenizer, texts.joined()), texts, params.window, params.max_windows)
    return Divergence(texts, windows, params.noise_windows, params.name)
