"""Long prompts put together from token ids: running text, facts hidden in it, a question, and the answer that is scored.

Pieces are tokenized one by one and joined as ids, so a prompt and its answer have exactly the requested number of tokens, in
the model's own tokens. Torch-free.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..artifact.eval_record import Data, Result
from ..calibration.tokenizing import encode
from ..errors import EvaluationError
from ..families import family_of
from ..running.complaints import complaint, given, key_of
from .task import ScoredSequence
from .texts import token_ids

SHORT = "does not exercise MSA"
P = TypeVar("P", bound="TextParams")
Encode = Callable[[str], list[int]]


class TextParams(BaseModel):
    """What every task over running text takes. `text` is the text itself; its name and licence go into the record."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(min_length=1)
    text_name: str = "text"
    text_licence: str | None = None
    name: str | None = None  # of the task, where a suite has two of a kind

    def data(self) -> Data:
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        return Data(name=self.text_name, sha256=digest, licence=self.text_licence)


def parse(model: type[P], params: Mapping[str, Any], task: str) -> P:
    """Validated parameters of a task. Raises EvaluationError with one sentence that names the parameter and the task."""
    try:
        return model.model_validate(dict(params))
    except ValidationError as error:
        # Of a union's errors the deepest is the one about what was written; its branch's name is no part of the path.
        first = max(error.errors(), key=lambda one: len(one["loc"]))
        where = key_of(first, branches=("Phrasing",)) or "parameters"
        known = ", ".join(name for name in model.model_fields)
        raise EvaluationError(f"task {task}: {complaint(where, first)}{given(first)}; it takes {known}.") from error


def encoder(tokenizer: Any) -> Encode:
    """Text to token ids without special tokens."""
    return partial(encode, tokenizer)


@dataclass(frozen=True)
class Reach:
    """What a checkpoint's config says of lengths: the longest it was made for, and up to where MSA reads everything.

    read_whole: tokens up to which block-sparse attention selects every block; 0 without it.
    """

    longest: int | None
    read_whole: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Reach:
        family = family_of(config)
        return cls(family.max_positions, family.selected_tokens)

    def check(self, lengths: Sequence[int], task: str) -> None:
        """Raises EvaluationError for a length beyond max_position_embeddings."""
        if self.longest is not None and max(lengths) > self.longest:
            raise EvaluationError(
                f"task {task}: {max(lengths):,} tokens exceed the model's max_position_embeddings of {self.longest:,}; "
                "take the longer lengths out."
            )

    def exercises(self, length: int) -> bool | None:
        """Whether a sequence of this length exercises the block selection; None for a model without one.

        The last token of a sequence is predicted and never read, so one token more than is read whole does not.
        """
        return length - 1 > self.read_whole if self.read_whole else None

    def notes(self, lengths: Sequence[int]) -> list[str]:
        short = [f"{length:,}" for length in sorted(set(lengths)) if self.exercises(length) is False]
        if not short:
            return []
        return [
            f"{SHORT}: {', '.join(short)} tokens (sparse attention selects every block up to {self.read_whole:,} tokens)"
        ]

    def mark(self, result: Result, sequences: Sequence[ScoredSequence]) -> None:
        """Say of a result that no sequence of its task exercises the block selection, unless its own notes say it."""
        longest = max((int(s.scored[-1]) + 1 for s in sequences), default=0)
        if (
            result.not_run is None
            and self.exercises(longest) is False
            and not any(note.startswith(SHORT) for note in result.notes)
        ):
            result.notes.append(
                f"{SHORT}: sparse attention selects every block up to {self.read_whole:,} tokens, no sequence is longer"
            )


class Haystack:
    """Running text as token ids [N] int64, and the places between two of its sentences.

    A text shorter than a prompt is repeated, and `repeats` says how often at most. Facts go to the sentence end nearest
    to their depth, as in RULER; a text without sentence ends is cut anywhere.
    """

    def __init__(self, tokenizer: Any, text: str, task: str) -> None:
        self.ids = token_ids(tokenizer, text)
        if len(self.ids) < 16:
            raise EvaluationError(f"task {task}: the text has {len(self.ids)} tokens; give running text of some pages.")
        distinct = np.unique(self.ids)
        pieces = tokenizer.batch_decode([[int(token)] for token in distinct])
        ends = [token for token, piece in zip(distinct, pieces, strict=True) if _ends_a_sentence(piece)]
        self._ends = np.flatnonzero(np.isin(self.ids, ends)) + 1
        self.repeats = 1

    def place(self, room: int, facts: Sequence[tuple[float, list[int]]], rng: random.Random) -> list[np.ndarray]:
        """`room` tokens of text from a random start with facts (depth 0 to 1, ids) between its sentences, as pieces."""
        size = len(self.ids)
        start = rng.randrange(size - room + 1) if size >= room else rng.randrange(size)
        self.repeats = max(self.repeats, -(-(start + room) // size))
        text = self.ids[(start + np.arange(room)) % size]
        places = sorted((self._nearest(round(depth * room), start, room), i) for i, (depth, _) in enumerate(facts))
        pieces, done = [], 0
        for place, index in places:
            pieces += [text[done:place], np.asarray(facts[index][1], dtype=np.int64)]
            done = place
        return [*pieces, text[done:]]

    def _nearest(self, place: int, start: int, room: int) -> int:
        if place in (0, room) or not len(self._ends):
            return place
        size = len(self.ids)
        lap, at = divmod(start + place, size)
        index = int(np.searchsorted(self._ends, at))
        near = [int(self._ends[i % len(self._ends)]) + size * (lap + i // len(self._ends)) for i in (index - 1, index)]
        best = min(near, key=lambda end: abs(end - start - place))
        return min(max(best - start, 0), room)

    def notes(self) -> list[str]:
        if self.repeats == 1:
            return []
        return [
            f"the text of {len(self.ids):,} tokens is repeated up to {self.repeats} times to fill the longest prompt"
        ]


def _ends_a_sentence(piece: str) -> bool:
    return piece.endswith("\n") or piece.rstrip(" \"'").endswith((".", "!", "?"))


@dataclass(frozen=True)
class Answer:
    """An answer's token ids, and which of them make up each value (the rest are separators)."""

    ids: list[int]
    spans: tuple[range, ...]


def answer_in_context(encode: Encode, question: str, values: Sequence[str], separator: str, task: str) -> Answer:
    """Tokens of `question` + " v1" + separator + " v2" ... that follow the question's own.

    Raises EvaluationError if a token would straddle two pieces: then what follows the prompt is not what is tokenized here.
    """
    done, text = encode(question), question
    first = len(done)
    spans: list[range] = []
    for number, value in enumerate(values):
        for piece, scored in ((separator if number else "", False), (" " + value, True)):
            text += piece
            ids = encode(text)
            if ids[: len(done)] != done:
                raise EvaluationError(
                    f"task {task}: the tokenizer merges {text[-24:]!r} across the place where {piece!r} begins; "
                    "change the phrasing so that its question and separator end where a token ends."
                )
            if scored:
                spans.append(range(len(done) - first, len(ids) - first))
            done = ids
    return Answer(done[first:], tuple(spans))
