"""Acceptance of a draft before a quantized target, held against an earlier bench of the source with the same draft and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..checkpoint.bounded import CONFIG_BYTES, TEXT_BYTES, read_bounded, read_json
from ..checkpoint.strict_json import shown
from ..engines.drafts import Draft
from ..errors import OptionError
from ..families.config import is_positive
from .bench import Load, Point, Row

LEAST_SHARE = 0.9  # of the source's acceptance length; what is below is said
_POINT = ("concurrency", "context", "output", "requests")
_REMEDY = "give the file that bench --json wrote for the source"


@dataclass(frozen=True)
class Baseline:
    """checkpoint: what was measured there; lengths: tokens a step by point; least: the share of them that this checkpoint's must reach."""

    path: Path
    checkpoint: str
    lengths: Mapping[Point, float]
    least: float

    def share(self, row: Row) -> float | None:
        """Tokens a step over the source's; None where none was measured."""
        length = row.measured.acceptance_length
        return None if length is None else length / self.lengths[row.point]

    def below(self, rows: Sequence[Row]) -> list[str]:
        """A sentence for each point whose share is less than `least`."""
        return [
            f"{row.point.concurrency} at once of {row.point.context:,} tokens: a step with the draft gives {row.measured.acceptance_length:.2f} tokens, "
            f"{share:.1%} of the {self.lengths[row.point]:.2f} with {self.checkpoint}, less than {self.least:.0%}"
            for row in rows
            if (share := self.share(row)) is not None and share < self.least
        ]


def measured_with(draft: Draft | None, load: Load) -> dict[str, Any]:
    """What two measurements of acceptance must have in common, as bench --json writes it."""
    texts = (
        sha256(read_bounded(load.texts, TEXT_BYTES, error=OptionError, follow=True)).hexdigest() if load.texts else None
    )
    named = draft and {
        "where": draft.where, "revision": draft.revision, "method": draft.method, "tokens": draft.tokens, "fingerprint": draft.fingerprint,
    }  # fmt: skip
    return {"draft": named, "texts_sha256": texts, "temperature": load.temperature}


def read_baseline(path: Path, draft: Draft | None, load: Load, points: Sequence[Point], least: float) -> Baseline:
    """The source's acceptance at every one of `points`. Raises OptionError for a file of another draft, prompts, temperature or points."""
    if draft is None:
        raise OptionError("--acceptance-of compares what a draft gives: name it with --draft.")
    document = read_json(path, CONFIG_BYTES, f"{_REMEDY}.", error=OptionError, follow=True)
    theirs, ours = document.get("measured_with"), measured_with(draft, load)
    if not isinstance(theirs, Mapping) or not isinstance(theirs.get("draft"), Mapping):
        raise OptionError(f"{path} is no bench with a draft: {_REMEDY}, measured with --draft {draft.where}.")
    for name, key, part in (
        ("draft", "fingerprint", "draft"), ("number of guessed tokens", "tokens", "draft"), ("file of prompts", "texts_sha256", ""),
        ("temperature", "temperature", ""),
    ):  # fmt: skip
        if (theirs[part] if part else theirs).get(key) != (ours[part] if part else ours)[key]:
            raise OptionError(
                f"{path} was measured with another {name}: measure the source again with the same options."
            )
    lengths = _lengths(path, document.get("rows"))
    for point in points:
        if point not in lengths:
            raise OptionError(
                f"{path} has no acceptance for {point.requests} requests, {point.concurrency} at once, of {point.context:,} tokens with {point.output:,} "
                "generated: measure the source at the same points."
            )
    return Baseline(path, shown(str(document.get("checkpoint")), 100), lengths, least)


def _lengths(path: Path, rows: Any) -> dict[Point, float]:
    """Of a point measured with and without the guard, the first."""
    found = dict[Point, float]()
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, Mapping) or any(type(row.get(key)) is not int for key in _POINT):
            raise OptionError(f"{path} has a row without its figures: {_REMEDY}.")
        length = row.get("acceptance_length")
        if length is not None and not (
            is_positive(length) and length >= 1
        ):  # a step gives the target's own token at least
            raise OptionError(f"{path} has an acceptance_length that is no number of at least 1: {_REMEDY}.")
        if length is not None:
            point = Point(row["concurrency"], row["context"], row["output"], row["requests"])
            found.setdefault(point, float(length))
    return found
