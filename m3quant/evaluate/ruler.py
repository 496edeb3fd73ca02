"""Retrieval with several keys, values and queries, and variable tracking, after RULER's rules (arXiv:2404.06654). Torch-free.

What differs from RULER is in docs/long_context.md: the scoring is a teacher-forced exact match.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ..errors import EvaluationError
from .haystack import Encode, Haystack, Reach, TextParams, answer_in_context, encoder, parse
from .needle import FEWEST
from .phrasing import NamedPhrasing, Phrasing, digits_value, phrasing, random_uuid, words_key
from .retrieval import RetrievalTask, Sample, make_sample


@dataclass(frozen=True)
class Variant:
    """A RULER task by its numbers: facts with distinct keys, values stated for each asked key, keys asked for.

    filled: the haystack is facts with other keys instead of text. keys and values: words and digits, or uuids.
    """

    label: str
    keys: int = 1
    values: int = 1
    queries: int = 1
    filled: bool = False
    uuid_keys: bool = False
    uuid_values: bool = False


VARIANTS = {
    "niah_single_2": Variant("one fact in text"),
    "niah_single_3": Variant("one fact in text, uuid value", uuid_values=True),
    "niah_multikey_1": Variant("one of 4 keys in text", keys=4),
    "niah_multikey_2": Variant("one key among facts only", filled=True),
    "niah_multikey_3": Variant("one uuid key among facts only, uuid values", filled=True, uuid_keys=True, uuid_values=True),
    "niah_multivalue": Variant("4 values of one key in text", values=4),
    "niah_multiquery": Variant("4 keys asked for at once, in text", keys=4, queries=4),
}  # fmt: skip
VT = "vt"
VT_INTRO = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
VT_QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the"
    " value {value}, they are:"
)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class RulerParams(TextParams):
    """variant: a RULER task. lengths: tokens of prompt and answer together. chains, hops, example: of `vt` only."""

    variant: Literal[
        "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multivalue",
        "niah_multiquery", "vt"
    ]  # fmt: skip
    lengths: list[int] = Field(min_length=1)
    samples: int = Field(default=20, ge=1)
    seed: int = 0
    phrasing: NamedPhrasing | Phrasing = "ruler"
    chains: int = Field(default=1, ge=1)
    hops: int = Field(default=4, ge=1)
    example: bool = True


def make(tokenizer: Any, config: Mapping[str, Any], params: Mapping[str, Any]) -> RetrievalTask:
    """One RULER task at one or several lengths. Raises EvaluationError as `needle.make` does."""
    given = parse(RulerParams, params, "ruler")
    name = given.name or f"ruler_{given.variant}"
    if min(given.lengths) < 1 or len(set(given.lengths)) < len(given.lengths):
        raise EvaluationError(f"task {name}: lengths must be distinct positive numbers of tokens.")
    reach = Reach.of(config)
    reach.check(given.lengths, name)
    haystack, encode = Haystack(tokenizer, given.text, name), encoder(tokenizer)
    samples = []
    for length in given.lengths:
        for number in range(given.samples):
            rng = random.Random(f"{given.seed}/{given.variant}/{length}/{number}")
            if given.variant == VT:
                samples.append(_tracking(encode, haystack, given, name, length, rng))
            else:
                samples.append(_retrieval(encode, haystack, given, name, length, rng))
    if given.variant == VT:
        label, worded = f"variable tracking, {given.chains} x {given.hops} hops", "RULER's"
    else:
        label, worded = VARIANTS[given.variant].label, given.phrasing if isinstance(given.phrasing, str) else "given"
    notes = [
        *haystack.notes(),
        f"phrasing: {worded}; seed: {given.seed}; {given.samples} samples a length (RULER: 500)",
    ]
    if given.samples < FEWEST:
        notes.append(f"fewer than {FEWEST} samples: intervals are wide")
    return RetrievalTask("ruler", name, f"RULER {given.variant}: {label}", samples, given.data(), reach, tuple(notes))


def _retrieval(
    encode: Encode, haystack: Haystack, given: RulerParams, task: str, length: int, rng: random.Random
) -> Sample:
    variant, wording = VARIANTS[given.variant], phrasing(given.phrasing)
    taken: set[str] = set()

    def fact() -> tuple[str, str]:
        for _ in range(1000):
            key = random_uuid(rng) if variant.uuid_keys else words_key(rng, wording)
            if key not in taken:
                taken.add(key)
                return key, value()
        raise EvaluationError(
            f"task {task}: {length} tokens need more keys than there are pairs of words; use niah_multikey_3."
        )

    def value() -> str:
        return random_uuid(rng) if variant.uuid_values else digits_value(rng, wording)

    stated = [fact() for _ in range(variant.keys)]
    asked = [key for key, _ in stated[: variant.queries]]
    stated += [(asked[0], value()) for _ in range(variant.values - 1)]
    # Depths are drawn sorted, so that the values of one key are asked for in the order of the text.
    depths = sorted(rng.random() for _ in stated)
    if variant.values == 1:
        rng.shuffle(depths)
    answers = [text for key, text in stated if key in asked]
    opening, question = encode(wording.opening(answers)), wording.ask(asked, answers)
    answer = answer_in_context(encode, question, answers, wording.separator, task)
    tail = encode(question)
    facts = [(depth, encode(wording.state(*one))) for depth, one in zip(depths, stated, strict=True)]
    room = length - len(opening) - len(tail) - len(answer.ids) - sum(len(ids) for _, ids in facts)
    _check_room(room, length, task)
    if not variant.filled:
        return make_sample([opening, *haystack.place(room, facts, rng), tail], answer, length, None)
    fill: list[list[int]] = []
    while room:
        ids = encode(wording.state(*fact()))
        if len(ids) > room:
            # What no further fact fills is text, so that every prompt has exactly its length.
            break
        fill.append(ids)
        room -= len(ids)
    for depth, ids in facts:
        fill.insert(round(depth * len(fill)), ids)
    rest = haystack.ids[np.arange(room) % len(haystack.ids)]
    return make_sample([opening, rest, *fill, tail], answer, length, None)


def _tracking(
    encode: Encode, haystack: Haystack, given: RulerParams, task: str, length: int, rng: random.Random
) -> Sample:
    """A chain VAR A = 12345, VAR B = VAR A, ... spread over the text in order, and others with other values."""
    chains = [_chain(rng, given.hops) for _ in range(given.chains)]
    variables, value = chains[0]
    question = VT_QUESTION.format(value=value, count=len(variables))
    example = _example(rng, given.hops) if given.example else ""
    answer = answer_in_context(encode, question, variables, "", task)
    opening, tail = encode(example + VT_INTRO), encode(question)
    facts = []
    for names, number in chains:
        lines = _assignments(names, number)
        facts += list(zip(sorted(rng.random() for _ in lines), map(encode, lines), strict=True))
    room = length - len(opening) - len(tail) - len(answer.ids) - sum(len(ids) for _, ids in facts)
    _check_room(room, length, task)
    return make_sample([opening, *haystack.place(room, facts, rng), tail], answer, length, None)


def _chain(rng: random.Random, hops: int) -> tuple[list[str], str]:
    names: list[str] = []
    while len(names) <= hops:
        name = "".join(rng.choice(_LETTERS) for _ in range(5))
        if name not in names:
            names.append(name)
    return names, str(rng.randrange(10000, 100000))


def _assignments(names: list[str], value: str) -> list[str]:
    return [f"\nVAR {name} = {f'VAR {names[i - 1]}' if i else value}\n" for i, name in enumerate(names)]


def _example(rng: random.Random, hops: int) -> str:
    """A worked case without text, so that the model sees the form of the answer."""
    names, value = _chain(rng, hops)
    asked = VT_QUESTION.format(value=value, count=len(names))
    return f"{VT_INTRO}{''.join(_assignments(names, value))}{asked} {' '.join(names)}\n\n"


def _check_room(room: int, length: int, task: str) -> None:
    if room < 0:
        raise EvaluationError(
            f"task {task}: {length} tokens do not hold the facts and the question ({length - room} tokens); "
            "give longer lengths."
        )
