"""What pydantic refuses, in plain words: its own are "Input should be a valid integer", with the names of Python's types."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any


def _number(limit: Any) -> str:
    return f"{int(limit):,}" if limit == int(limit) else f"{limit}"


def _at_least(count: int, of: str) -> str:
    return "must not be empty" if count == 1 else f"must have {count:,} {of} or more"


# Of `ErrorDetails["type"]` that tell of a kind alone.
_MAPPING = "must be a mapping of keys to values"
_KINDS = {
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number of a size that can occur",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "missing": "is missing",
    "extra_forbidden": "is not known",
}

# The same where a limit or a choice belongs to it, from `ErrorDetails["ctx"]`.
_LIMITS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "greater_than_equal": lambda limit: f"must be at least {_number(limit['ge'])}",
    "greater_than": lambda limit: f"must be more than {_number(limit['gt'])}",
    "less_than_equal": lambda limit: f"must be at most {_number(limit['le'])}",
    "less_than": lambda limit: f"must be less than {_number(limit['lt'])}",
    "literal_error": lambda limit: f"must be {limit['expected']}",
    "string_pattern_mismatch": lambda limit: f"must have the form {limit['pattern']}",
    "string_too_short": lambda limit: _at_least(limit["min_length"], "characters"),
    "string_too_long": lambda limit: f"must have {limit['max_length']:,} characters or fewer",
    "too_short": lambda limit: _at_least(limit["min_length"], "entries"),
    "too_long": lambda limit: f"must have {limit['max_length']:,} entries or fewer",
    "json_invalid": lambda limit: f"is not JSON ({limit['error']})",
}
_OWN = "Value error, "  # before what m3quant's own validators raise in words
_BRANCHES = ("str", "int", "float", "bool")
_SHOWN = 60  # characters of a value that was refused


def complaint(subject: str, error: Mapping[str, Any]) -> str:
    """One of `ValidationError.errors()` as a sentence about `subject`, mostly its key: "port must be a whole number".

    What a validator of m3quant's own raised is a sentence already, and follows after a colon.
    """
    kind = error["type"]
    if kind in _LIMITS:
        return f"{subject} {_LIMITS[kind](error['ctx'])}"
    if kind in _KINDS:
        return f"{subject} {_KINDS[kind]}"
    return f"{subject}: {str(error['msg']).removeprefix(_OWN)}"


def given(error: Mapping[str, Any]) -> str:
    """The value that was refused, to be put after `complaint`: " (got null)"; "" where none was given."""
    if error["type"] in ("missing", "extra_forbidden", "json_invalid"):
        return ""
    return f" (got {shown(error['input'])})"


def shown(value: object) -> str:
    """A value as YAML and JSON write it, cut where it is long."""
    words = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return words if len(words) <= _SHOWN else f"{words[: _SHOWN - 3]}..."


def key_of(error: Mapping[str, Any], branches: Collection[str] = _BRANCHES) -> str:
    """The path to the key, with dots; without the names that pydantic gives to the branches of a union, among them `branches`."""
    return ".".join(str(part) for part in error["loc"] if str(part) not in branches and "[" not in str(part))
