"""The needle grid: one fact at a given depth of a text of a given length, asked for at the end. Torch-free."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from ..errors import EvaluationError
from .haystack import Haystack, Reach, TextParams, answer_in_context, encoder, parse
from .phrasing import NamedPhrasing, Phrasing, digits_value, phrasing, words_key
from .retrieval import RetrievalTask, Sample, make_sample

FEWEST = 10  # samples of a cell below which its interval says next to nothing


class NeedleParams(TextParams):
    """lengths: tokens of prompt and answer together. depths: 0 is the beginning of the text, 1 its end."""

    lengths: list[int] = Field(min_length=1)
    depths: list[float] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    samples: int = Field(default=FEWEST, ge=1)
    distractors: int = Field(default=0, ge=0)
    seed: int = 0
    phrasing: NamedPhrasing | Phrasing = "code"

    @field_validator("lengths")
    @classmethod
    def _positive(cls, lengths: list[int]) -> list[int]:
        if min(lengths) < 1 or len(set(lengths)) < len(lengths):
            raise ValueError("lengths must be distinct positive numbers of tokens")
        return lengths

    @field_validator("depths")
    @classmethod
    def _share(cls, depths: list[float]) -> list[float]:
        if any(not 0 <= depth <= 1 for depth in depths) or len(set(depths)) < len(depths):
            raise ValueError("depths must be distinct and between 0 (beginning) and 1 (end)")
        return depths


def make(tokenizer: Any, config: Mapping[str, Any], params: Mapping[str, Any]) -> RetrievalTask:
    """The grid as a task; every sample is fixed by the seed, its length, depth and number.

    Raises EvaluationError for parameters that are wrong, lengths that the model was not made for or that do not hold a fact
    and its question.
    """
    given = parse(NeedleParams, params, "needle")
    name = given.name or "needle"
    reach = Reach.of(config)
    reach.check(given.lengths, name)
    if (pairs := phrasing(given.phrasing).pairs) <= given.distractors:
        raise EvaluationError(
            f"task {name}: {given.distractors} distractors and the fact need more keys than the {pairs} pairs of words."
        )
    haystack = Haystack(tokenizer, given.text, name)
    samples = [
        _sample(tokenizer, haystack, given, name, length, depth, number)
        for length in given.lengths
        for depth in given.depths
        for number in range(given.samples)
    ]
    notes = haystack.notes()
    if given.samples < FEWEST:
        notes.append(f"{given.samples} samples a cell: fewer than {FEWEST}, intervals are wide")
    worded = given.phrasing if isinstance(given.phrasing, str) else "given"
    notes.append(f"phrasing: {worded}; distracting facts: {given.distractors}; seed: {given.seed}")
    return RetrievalTask("needle", name, "needle grid, length x depth", samples, given.data(), reach, tuple(notes))


def _sample(
    tokenizer: Any, haystack: Haystack, given: NeedleParams, task: str, length: int, depth: float, number: int
) -> Sample:
    encode, wording = encoder(tokenizer), phrasing(given.phrasing)
    rng = random.Random(f"{given.seed}/{length}/{depth}/{number}")
    keys: list[str] = []
    while len(keys) < 1 + given.distractors:
        key = words_key(rng, wording)
        if key not in keys:
            keys.append(key)
    values = [digits_value(rng, wording) for _ in keys]
    facts = [encode(wording.state(key, value)) for key, value in zip(keys, values, strict=True)]
    opening, question = encode(wording.opening(values[:1])), wording.ask(keys[:1], values[:1])
    answer = answer_in_context(encode, question, values[:1], wording.separator, task)
    asked = encode(question)
    room = length - len(opening) - len(asked) - len(answer.ids) - sum(map(len, facts))
    if room < 0:
        raise EvaluationError(
            f"task {task}: {length} tokens do not hold {len(facts)} facts and the question ({length - room} tokens); "
            "give longer lengths."
        )
    depths = [depth, *(rng.random() for _ in facts[1:])]
    pieces = haystack.place(room, list(zip(depths, facts, strict=True)), rng)
    return make_sample([opening, *pieces, asked], answer, length, depth)
