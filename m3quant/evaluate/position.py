"""Perplexity by absolute position: one long prefill per window, the loss averaged in buckets of positions. Torch-free.

This is the position-bucket convention (PG19 in the long-context papers): it shows where along the context a model gets
worse, and is comparable with no windowed perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from ..artifact.eval_record import Data, Result
from ..errors import EvaluationError
from .haystack import SHORT, Reach, TextParams, parse
from .metrics import perplexity
from .task import Predictions, ScoredSequence
from .texts import token_ids

CONVENTION = "position buckets, one prefill per window, stride = window"
EDGES = (1, 64, 256, 1024, 4096, 16384, 65536, 131072, 262144, 524288)


class PositionParams(TextParams):
    """length: tokens of a window. windows: how many at most. edges: the buckets' first positions, from 1 up."""

    length: int = Field(ge=2)
    windows: int | None = Field(default=None, ge=1)
    edges: list[int] = Field(default=list(EDGES), min_length=1)


@dataclass(frozen=True)
class PositionTask:
    """Windows of running text from an empty context, every token after the first predicted."""

    kind: ClassVar[str] = "position"
    name: str
    windows: Sequence[ScoredSequence]
    edges: tuple[int, ...]
    data: Data
    reach: Reach

    def sequences(self) -> Sequence[ScoredSequence]:
        return self.windows

    def results(self, checkpoint: Sequence[Predictions], source: Sequence[Predictions] | None) -> list[Result]:
        """One result: perplexity of each bucket and of the last one against the first; cells are the buckets."""
        nll = _stacked([said.nll for said in checkpoint])
        others = None if source is None else _stacked([said.nll for said in source])
        divergence = [said.kl for said in checkpoint if said.kl is not None]
        kl = _stacked(divergence) if len(divergence) == len(checkpoint) else None
        length = nll.shape[1] + 1
        cells, metrics, source_metrics = [], {}, {}
        for low, high in buckets(self.edges, length):
            part = slice(low - 1, high - 1)  # column 0 is the loss of position 1
            cell: dict[str, Any] = {"start": low, "stop": high, "tokens": nll[:, part].size, **_loss(nll[:, part])}
            metrics[f"perplexity@{low}-{high - 1}"] = cell["perplexity"]
            if others is not None:
                cell |= {f"{key}_source": value for key, value in _loss(others[:, part]).items()}
                source_metrics[f"perplexity@{low}-{high - 1}"] = cell["perplexity_source"]
            if kl is not None:
                cell["kl_mean"] = float(kl[:, part].mean())
            cell["exercises_msa"] = self.reach.exercises(high)
            cells.append(cell)
        return [
            Result(
                task=self.name,
                convention=CONVENTION,
                label=f"perplexity by position, windows of {length:,} tokens",
                data=self.data,
                tokens=nll.size,
                metrics={"perplexity": perplexity(float(nll.mean())), **metrics},
                source_metrics=None
                if others is None
                else {"perplexity": perplexity(float(others.mean())), **source_metrics},
                cells=cells,
                notes=[
                    f"{len(nll)} windows, not overlapping; position 0 has no context and is not scored",
                    *self._short(cells),
                ],
            )
        ]

    def _short(self, cells: Sequence[dict[str, Any]]) -> list[str]:
        ends = [cell["stop"] for cell in cells if cell["exercises_msa"] is False]
        return [f"{SHORT}: positions below {max(ends):,}"] if ends else []


def buckets(edges: Sequence[int], length: int) -> list[tuple[int, int]]:
    """[from, to) position ranges that cover 1 .. length - 1."""
    starts = sorted({1, *(edge for edge in edges if 1 <= edge < length)})
    return list(zip(starts, [*starts[1:], length], strict=True))


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(rows).astype(np.float64)


def _loss(nll: np.ndarray) -> dict[str, float]:
    """Mean loss, its perplexity, and the standard error of the mean over tokens (none of a single one)."""
    mean = float(nll.mean())
    out = {"nll": mean, "perplexity": perplexity(mean)}
    if nll.size > 1:
        out["nll_error"] = float(nll.std(ddof=1) / math.sqrt(nll.size))
    return out


def make(tokenizer: Any, config: Mapping[str, Any], params: Mapping[str, Any]) -> PositionTask:
    """Windows from the start of the text; what is left over is dropped.

    Raises EvaluationError for wrong parameters, a text shorter than a window, or a window that the model was not made for.
    """
    given = parse(PositionParams, params, "position")
    name = given.name or "position"
    reach = Reach.of(config)
    reach.check([given.length], name)
    if min(given.edges) < 1 or sorted(set(given.edges)) != given.edges:
        raise EvaluationError(f"task {name}: edges must be ascending positions from 1 up.")
    ids = token_ids(tokenizer, given.text)
    available = len(ids) // given.length
    if not available:
        raise EvaluationError(
            f"task {name}: the text {given.text_name} has {len(ids):,} tokens, a window {given.length:,}; "
            "give a longer text or a shorter length."
        )
    count = min(available, given.windows or available)
    scored = np.arange(1, given.length)
    windows = [ScoredSequence(ids[i * given.length : (i + 1) * given.length], scored) for i in range(count)]
    return PositionTask(name, windows, tuple(given.edges), given.data(), reach)
