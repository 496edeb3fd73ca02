"""Counts a prompt of a hundred thousand token ids without making a hundred thousand Python integers.

The array after `"prompt":` or `"token_ids":` is replaced by a marker and its ids are counted by its commas. A quote, the name and a quote,
followed by a colon and a bracket, cannot occur inside a JSON string (its quotes would be escaped), so what is replaced is always an
array. The parser says which member it is (`is_marked`): another member's, a tool's schema for instance, has to be read as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pydantic_core

LONG = 65536  # bytes of a body from which this pays
MARKER = -(2**40)  # not a token id
OPENING = re.compile(rb"[ \t\r\n]*+:[ \t\r\n]*+\[")
IN_ARRAY = b"0123456789, \t\r\n"
TRIES = 64  # places looked at: a body that names its prompt more often is read whole
FIRST_PIECE = 64  # bytes; each further piece is twice as long


@dataclass(frozen=True)
class IdSpan:
    """The bytes between the brackets, and how many ids they hold."""

    raw: bytes
    count: int

    def ids(self) -> list[int]:
        """The ids; none of an array that is no JSON (counting commas does not notice), which the engine will say."""
        try:
            ids: list[int] = pydantic_core.from_json(b"[%b]" % self.raw)
            return ids
        except ValueError:
            return []


def is_marked(value: Any) -> bool:
    """Whether a parsed member is the marker in place of its array. Of a shortened body only: no client's number is the marker there."""
    return isinstance(value, list) and len(value) == 1 and type(value[0]) is int and value[0] == MARKER


def shorten(body: bytes, names: tuple[bytes, ...]) -> tuple[bytes, IdSpan | None]:
    """The body with its long array of ids replaced by [MARKER], and that array; the body itself when there is none.

    Time is linear in the body: a failed try reads at most about twice the bytes before the next one can begin, and tries are few.
    """
    if (
        len(body) < LONG or b"%d" % MARKER in body
    ):  # a client's own marker would take another member's array for its prompt
        return body, None
    for name in names:
        at = body.find(name)
        for _ in range(TRIES):
            if at < 0:
                break
            at += len(name)
            if (opening := OPENING.match(body, at)) and (span := id_span(body, opening.end())):
                start = opening.end()
                return b"%b%d%b" % (body[:start], MARKER, body[start + len(span.raw) :]), span
            at = body.find(name, at)
    return body, None


def id_span(body: bytes, start: int) -> IdSpan | None:
    """The array whose bracket opens just before `start`, if it is long and of plain non-negative numbers."""
    at, size = start, FIRST_PIECE
    while piece := body[at : at + size]:
        if rest := piece.translate(None, IN_ARRAY):
            end = body.index(rest[:1], at) if rest[:1] == b"]" else -1
            if end - start < LONG // 2:
                return None
            raw = body[start:end]
            return IdSpan(raw, raw.count(b",") + 1)
        at, size = at + size, 2 * size
    return None
