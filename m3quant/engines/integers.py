"""Integer widths between which engines distinguish."""

from __future__ import annotations

from collections.abc import Iterable

from ..schemes import Scheme

COMMON_BITS = (4, 8)  # what every engine reads


def is_narrow(scheme: Scheme) -> bool:
    """Whether only some engines, and only newer releases, read this scheme: integers of other widths than 4 and 8 bits."""
    return scheme.kind == "int" and scheme.bits not in COMMON_BITS


def has_common_zero_points(scheme: Scheme) -> bool:
    """Whether this scheme has zero points and a width that every engine reads, if only without them."""
    return scheme.kind == "int" and not scheme.symmetric and not is_narrow(scheme)


def names(schemes: Iterable[Scheme]) -> str:
    return ", ".join(sorted(scheme.name for scheme in schemes))
