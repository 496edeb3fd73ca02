"""Puts a max_tokens into a JSON body without touching any other byte of it.

Only with the two settings that say so: `oversize=clamp` and `default_max_tokens`. Everything else passes the body on as it came.
"""

from __future__ import annotations

import json
import re
from json.decoder import scanstring  # type: ignore[attr-defined]

SPACE = re.compile(r"[ \t\n\r]*+")
DECODER = json.JSONDecoder()


def members(text: str) -> list[tuple[str, int, int]]:
    """Name, start and end of the value of each member of the outermost object, in order. Raises ValueError for anything else."""
    at = skip(text, 0)
    if text[at : at + 1] != "{":
        raise ValueError("not an object")
    at = skip(text, at + 1)
    found: list[tuple[str, int, int]] = []
    while text[at : at + 1] == '"':
        name, at = scanstring(text, at + 1)
        at = skip(text, at)
        if text[at : at + 1] != ":":
            raise ValueError("no colon")
        start = skip(text, at + 1)
        _, end = DECODER.raw_decode(text, start)
        found.append((name, start, end))
        at = skip(text, end)
        if text[at : at + 1] != ",":
            break
        at = skip(text, at + 1)
    return found


def skip(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return match.end() if match else at


def with_number(body: bytes, name: str, value: int) -> bytes:
    """The body with the member `name` of its outermost object set to `value`: replaced in place, or put first.

    Raises ValueError for what is no JSON object in UTF-8, also one nested too deep to be read.
    """
    text = body.decode("utf-8")
    try:
        places = [(start, end) for found, start, end in members(text) if found == name]
    except RecursionError:
        raise ValueError("nested too deep") from None
    number = str(value)
    if not places:
        brace = text.index("{") + 1
        comma = "" if text[skip(text, brace) :].startswith("}") else ","
        return f"{text[:brace]}{json.dumps(name)}:{number}{comma}{text[brace:]}".encode()
    pieces, kept = [], 0
    for start, end in places:  # joined once: replacing in place would copy the body for every duplicate
        pieces += [text[kept:start], number]
        kept = end
    return "".join([*pieces, text[kept:]]).encode()
