"""JSON that means one thing: unique keys, an object at the top, and one kind of error."""

import json
from typing import Any, NoReturn

from ..errors import CheckpointError


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} occurs twice")
            seen.add(key)
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def shown(text: str, limit: int = 160) -> str:
    """`text` quoted, escaped and cut, so that a hostile name cannot garble a terminal."""
    return _cut(repr(text), limit)


def described(value: Any, limit: int = 80) -> str:
    """A parsed JSON value as Python shows it, of at most `limit` characters."""
    try:
        return _cut(repr(value), limit)
    except RecursionError:
        # The parser may have stood less deep in the stack than this.
        return f"a deeply nested {type(value).__name__}"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def parse_object(raw: bytes, what: str, remedy: str, *, constants: bool = False) -> dict[str, Any]:
    """The JSON object in `raw` (UTF-8).

    what: names the file in the error; remedy: the error's last sentence;
    constants: accept NaN and Infinity, which Python's writers put into config.json files.
    Raises CheckpointError for anything but one object with unique keys (at every depth).
    """
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=None if constants else _no_constant
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is not UTF-8 text (byte {error.start}). {remedy}") from error
    except RecursionError as error:
        raise CheckpointError(f"{what} is not usable JSON: it is nested too deeply. {remedy}") from error
    except ValueError as error:
        raise CheckpointError(f"{what} is not usable JSON: {error}. {remedy}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}, not an object. {remedy}")
    return value
