"""How sequences of different lengths become batches of one flat run of tokens. No padding: attention runs over groups of
equal length, everything else over tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .task import ScoredSequence


@dataclass(frozen=True)
class Batch:
    """Consecutive tokens of the flat run: `groups` of (sequences, length) one after another fill `tokens`."""

    tokens: slice[int, int, None]
    groups: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return self.tokens.stop - self.tokens.start


@dataclass(frozen=True)
class Layout:
    """Sequences laid end to end, ordered by length.

    ids: [T] int64, all tokens that are run. place: per sequence, its first token in `ids`. batches cover `ids` in order.
    rows, targets: [N] int64, for every predicted token the place of the state that predicts it, and its id; scored:
    per sequence, its part of them.
    """

    ids: np.ndarray
    place: np.ndarray
    batches: tuple[Batch, ...]
    rows: np.ndarray
    targets: np.ndarray
    scored: tuple[slice, ...]


def lay_out(sequences: Sequence[ScoredSequence], batch_tokens: int, *, longest_first: bool = False) -> Layout:
    """Tokens behind the last predicted one change nothing and are left out, as is the last predicted one itself.

    batch_tokens: a batch has at most this many tokens, or one sequence.
    """
    lengths = np.array([int(s.scored[-1]) for s in sequences], dtype=np.int64)
    order = np.argsort(-lengths if longest_first else lengths, kind="stable")
    place = np.empty(len(sequences), dtype=np.int64)
    place[order] = np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
    ids = np.concatenate([sequences[i].ids[: lengths[i]] for i in order])
    scored, rows, targets, start = [], [], [], 0
    for sequence, first in zip(sequences, place, strict=True):
        scored.append(slice(start, start + len(sequence.scored)))
        rows.append(first + sequence.scored - 1)
        targets.append(sequence.ids[sequence.scored])
        start += len(sequence.scored)
    batches = tuple(_batches([int(lengths[i]) for i in order], batch_tokens))
    return Layout(ids, place, batches, np.concatenate(rows), np.concatenate(targets), tuple(scored))


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[Batch]:
    start, groups, size = 0, list[list[int]](), 0
    for length in lengths:
        if groups and size + length > batch_tokens:
            yield Batch(slice(start, start + size), tuple((n, width) for n, width in groups))
            start, groups, size = start + size, [], 0
        if groups and groups[-1][1] == length:
            groups[-1][0] += 1
        else:
            groups.append([1, length])
        size += length
    if groups:
        yield Batch(slice(start, start + size), tuple((n, width) for n, width in groups))


def unique(sequences: Sequence[ScoredSequence]) -> tuple[list[ScoredSequence], list[tuple[int, np.ndarray]]]:
    """Each text once, with every position that anyone wants predicted.

    Returns the texts and, per given sequence, which text it is and where its own positions are in it.
    """
    found: dict[bytes, int] = {}
    ids: list[np.ndarray] = []
    wanted: list[list[np.ndarray]] = []
    which = []
    for sequence in sequences:
        number = found.setdefault(sequence.ids.tobytes(), len(ids))
        if number == len(ids):
            ids.append(sequence.ids)
            wanted.append([])
        wanted[number].append(sequence.scored)
        which.append(number)
    union = [np.unique(np.concatenate(parts)) for parts in wanted]
    texts = [ScoredSequence(one, scored) for one, scored in zip(ids, union, strict=True)]
    where = [(number, np.searchsorted(union[number], s.scored)) for number, s in zip(which, sequences, strict=True)]
    return texts, where
