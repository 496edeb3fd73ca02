"""What callers of the Python API give as the place of a checkpoint."""

from __future__ import annotations

from os import PathLike

from ..errors import OptionError


def check_place(**given: object) -> None:
    """Raise OptionError for the first of these arguments that names no place: neither text nor a path, or empty."""
    for name, value in given.items():
        if not isinstance(value, str | PathLike) or not str(value):
            raise OptionError(
                f"{name} is {value!r}, which names no checkpoint: give a folder as text or Path, or a Hub repo as text."
            )
