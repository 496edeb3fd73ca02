"""The contract between tasks and the pass that runs them.

A task gives token sequences and says which of their tokens are to be predicted; one pass over the weights serves all
tasks together; then the task turns its own predictions into figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ..artifact.eval_record import Result


@dataclass(frozen=True)
class ScoredSequence:
    """Token ids [L] int64, run from an empty context, and which of them are predicted.

    scored: ascending positions [N] int64, 1 <= scored < L: the token at `scored[i]` is predicted from ids[: scored[i]].
    Nothing is computed in the head for other positions, so a long prompt with a short answer costs the answer only.
    """

    ids: np.ndarray
    scored: np.ndarray


@dataclass(frozen=True)
class Predictions:
    """What a model says of the scored tokens of one sequence; every array is [N], in the order of `ScoredSequence.scored`.

    nll: float32, negative natural log of the probability of the true token. best: int64, the most likely id (lowest id on
    a tie). kl: float32, KL(source || this) in nats over the whole vocabulary, None for the source itself or without one.
    """

    nll: np.ndarray
    best: np.ndarray
    kl: np.ndarray | None = None


class Task(Protocol):
    """One measurement. `name` is unique in a suite and appears in reports; `kind` is what the suite calls it by `task`."""

    @property
    def kind(self) -> str: ...

    @property
    def name(self) -> str: ...

    def sequences(self) -> Sequence[ScoredSequence]:
        """What is to be run; the same list at every call."""
        ...

    def results(self, checkpoint: Sequence[Predictions], source: Sequence[Predictions] | None) -> list[Result]:
        """Figures from this task's own predictions, one `Predictions` per sequence, in the order of `sequences`."""
        ...


@runtime_checkable
class NoiseFloor(Protocol):
    """What a task has in addition to `Task` to find out how far the source differs from itself.

    The source runs these sequences a second time, in another dtype and other batches, in the same pass.
    """

    def noise_sequences(self) -> Sequence[int]:
        """Numbers of the sequences wanted, into `sequences()`."""
        ...

    def take_noise(self, predictions: Sequence[Predictions], run: str) -> None:
        """Called before `results`, with the second run's predictions, `kl` against the first; run: what differed, in words."""
        ...
