"""Tasks whose answer is in the prompt: what a sample is, and how exact matches are counted from a teacher-forced pass.

An answer is what greedy decoding generates if and only if each of its tokens is the most likely one after the true
prefix: the first token that is not ends the match, and until then the prefix generated is the true one. So one pass over
prompt + answer decides the match, with no decoding. Torch-free.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artifact.eval_record import Data, Result
from .haystack import Answer, Reach
from .intervals import wilson
from .task import Predictions, ScoredSequence

CONVENTION = "greedy exact match, teacher-forced"
SEVERAL = "greedy exact match of all values in one fixed order, teacher-forced"


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer, and the cell it counts in. `sequence.scored` are the answer's tokens, all of them."""

    sequence: ScoredSequence
    length: int
    depth: float | None
    spans: tuple[range, ...]


def make_sample(pieces: Sequence[Any], answer: Answer, length: int, depth: float | None) -> Sample:
    ids = np.concatenate([np.asarray(piece, dtype=np.int64) for piece in (*pieces, answer.ids)])
    assert len(ids) == length
    scored = np.arange(length - len(answer.ids), length)
    return Sample(ScoredSequence(ids, scored), length, depth, answer.spans)


@dataclass(frozen=True)
class RetrievalTask:
    """Samples scored by exact match, in cells of one length (and depth)."""

    kind: str
    name: str
    label: str
    samples: Sequence[Sample]
    data: Data
    reach: Reach
    notes: tuple[str, ...] = ()

    def sequences(self) -> Sequence[ScoredSequence]:
        return [sample.sequence for sample in self.samples]

    def results(self, checkpoint: Sequence[Predictions], source: Sequence[Predictions] | None) -> list[Result]:
        """One result: accuracy with its interval over all samples and by length; cells by length and depth."""
        groups: dict[tuple[int, float | None], list[int]] = defaultdict(list)
        for index, sample in enumerate(self.samples):
            groups[sample.length, sample.depth].append(index)
        cells = []
        for (length, depth), members in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] or 0.0)):
            cell: dict[str, Any] = {"length": length, **({} if depth is None else {"depth": depth})}
            cell["exercises_msa"] = self.reach.exercises(length)
            cell |= self._count(members, checkpoint)
            if source is not None:
                cell |= {f"{key}_source": value for key, value in self._count(members, source).items()}
            cells.append(cell)
        lengths = [sample.length for sample in self.samples]
        several = len(self.samples[0].spans) > 1
        return [
            Result(
                task=self.name,
                convention=SEVERAL if several else CONVENTION,
                label=self.label,
                data=self.data,
                tokens=sum(len(sample.sequence.scored) for sample in self.samples),
                metrics=self._metrics(checkpoint),
                source_metrics=None if source is None else self._metrics(source),
                cells=cells,
                notes=[*self.notes, *self.reach.notes(lengths)],
            )
        ]

    def _metrics(self, predictions: Sequence[Predictions]) -> dict[str, float]:
        total = self._count(range(len(self.samples)), predictions)
        out = {"accuracy": total["accuracy"], "accuracy_low": total["low"], "accuracy_high": total["high"]}
        if "values" in total:
            out["values_given_prefix"] = total["values"]
        lengths = sorted({sample.length for sample in self.samples})
        if len(lengths) > 1:
            for length in lengths:
                members = [i for i, sample in enumerate(self.samples) if sample.length == length]
                out[f"accuracy@{length}"] = self._count(members, predictions)["accuracy"]
        if "answer_nll" in total:
            out["answer_nll"] = total["answer_nll"]
        return out

    def _count(self, members: Iterable[int], predictions: Sequence[Predictions]) -> dict[str, Any]:
        """hits, samples, accuracy, its 95 % interval; mean nll per answer token where the predictor knows it."""
        hits = samples = found = values = 0
        nll: list[float] = []
        for index in members:
            sample, said = self.samples[index], predictions[index]
            right = said.best == sample.sequence.ids[sample.sequence.scored]
            samples += 1
            hits += bool(right.all())
            found += sum(bool(right[span.start : span.stop].all()) for span in sample.spans)
            values += len(sample.spans)
            nll += said.nll.tolist()
        low, high = wilson(hits, samples)
        out: dict[str, Any] = {"samples": samples, "hits": hits, "accuracy": hits / samples, "low": low, "high": high}
        # A predictor that only generates knows neither probabilities nor what would follow the true prefix.
        if all(map(math.isfinite, nll)):
            if values > samples:
                out["values"] = found / values
            out["answer_nll"] = sum(nll) / len(nll)
        return out
