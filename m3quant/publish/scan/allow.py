"""Findings that are no secrets: a list in which every entry gives its reason. m3quant has one, the user may give another."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ...checkpoint.bounded import parse_yaml, read_yaml
from ...checkpoint.name_list import GLOB_CHARACTERS
from ...checkpoint.patterns import BoundedPattern
from ...errors import OptionError
from ...running.complaints import complaint, key_of

DATA = "allowed.yaml"


def _regex(text: str) -> str:
    try:
        _pattern(text)
    except OptionError as error:
        raise ValueError(str(error)) from None
    return text


@cache
def _pattern(text: str) -> BoundedPattern:
    return BoundedPattern(text, "allow list", OptionError)


class Entry(BaseModel):
    """file: a pattern of paths in the repo (*, ?); kind: of the finding, or any; text: a regex of the whole of what was found."""

    model_config = ConfigDict(extra="forbid")
    text: Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_regex)]
    reason: Annotated[str, Field(min_length=10, max_length=1000)]
    file: Annotated[str, Field(max_length=GLOB_CHARACTERS)] = "*"
    kind: str | None = None


@dataclass(frozen=True)
class Allowed:
    entries: tuple[Entry, ...] = ()

    def allows(self, file: str, kind: str, found: str) -> bool:
        """Whether an entry holds for a finding. Raises OptionError for a regex that takes too long on what was found."""
        return any(
            fnmatchcase(file, entry.file)
            and entry.kind in (None, kind)
            and _pattern(entry.text).fullmatch(found, "what was found")
            for entry in self.entries
        )

    def __add__(self, other: Allowed) -> Allowed:
        return Allowed(self.entries + other.entries)


@cache
def shipped() -> Allowed:
    """The list that comes with m3quant."""
    text = importlib.resources.files(__package__).joinpath(DATA).read_text(encoding="utf-8")
    return Allowed(tuple(_entries(parse_yaml(text, DATA), DATA)))


def read_allowed(path: Path) -> Allowed:
    """A person's list: YAML, entries of text, reason, and optionally file and kind. Raises OptionError with the key that is wrong."""
    return Allowed(tuple(_entries(read_yaml(path, "allow list", error=OptionError), f"allow list {path}")))


def _entries(document: Any, where: str) -> Iterable[Entry]:
    try:
        return TypeAdapter(list[Entry]).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = key_of(first) or "the list"
        raise OptionError(
            f"{where}, {complaint(key, first)}: give entries with text, reason, and optionally file and kind."
        ) from None
