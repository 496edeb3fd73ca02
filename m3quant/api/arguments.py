"""Arguments of the Python API whose kind is wrong are refused in words, as the command line refuses its options."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from os import PathLike
from typing import TypeGuard

from ..engines.base import is_release
from ..errors import OptionError
from ..running.complaints import shown
from ..runtime.fit import Ask


def check_place(**given: object) -> None:
    """Raise OptionError for the first of these arguments that names no place: neither text nor a path, or empty."""
    for name, value in given.items():
        if not isinstance(value, str | PathLike) or not str(value):
            raise OptionError(
                f"{name} is {value!r}, which names no checkpoint: give a folder as text or Path, or a Hub repo as text."
            )


def check_word(**given: object) -> None:
    """Raise OptionError for the first that is neither text nor None."""
    _check("must be text", lambda value: value is None or isinstance(value, str), given)


def check_file(**given: object) -> None:
    """Raise OptionError for the first that is neither a path nor None."""
    _check(
        "must be a file or folder, as text or Path",
        lambda value: value is None or isinstance(value, str | PathLike),
        given,
    )


def check_texts(**given: object) -> None:
    """Raise OptionError for the first that is no list of texts. One text is none: its letters would be taken one by one."""
    _check("must be a list of texts", _is_texts, given)


def check_count(**given: object) -> None:
    """Raise OptionError for the first that is neither a whole number of at least 1 nor None."""
    _check(
        "must be a whole number of at least 1", lambda value: value is None or (_is_whole(value) and value > 0), given
    )


def check_size(**given: object) -> None:
    """Raise OptionError for the first that is neither bytes, nor text (`running.words.parse_size`), nor None."""
    _check(
        'must be bytes, or a size as text ("60GB")',
        lambda value: value is None or isinstance(value, str) or (_is_whole(value) and value >= 0),
        given,
    )


def check_serving(serving: object) -> None:
    """Raise OptionError unless these are fields of `runtime.fit.Ask` with values of their kinds, or None."""
    if serving is None:
        return
    if not isinstance(serving, Mapping):
        raise OptionError(f"serving must be a mapping of names to values (got {shown(serving)}).")
    kinds = {one.name: str(one.type).partition(" ")[0] for one in fields(Ask)}
    for name, value in serving.items():
        if name not in kinds:
            raise OptionError(f"serving has an unknown key {shown(name)}: known are {', '.join(kinds)}.")
        if value is None:
            continue
        if kinds[name] == "int":
            _check("must be a whole number", _is_whole, {f"serving key '{name}'": value})
        elif kinds[name] == "str":
            check_word(**{f"serving key '{name}'": value})
        if name == "release":
            _check('must be a version ("0.33.0")', lambda text: is_release(str(text)), {f"serving key '{name}'": value})


def _is_texts(value: object) -> bool:
    return (
        isinstance(value, Collection)
        and not isinstance(value, str | bytes)
        and all(isinstance(one, str) for one in value)
    )


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(needed: str, right: Callable[[object], bool], given: dict[str, object]) -> None:
    for name, value in given.items():
        if not right(value):
            raise OptionError(f"{name} {needed} (got {shown(value)}).")
