"""Numbers in words."""

from __future__ import annotations

import re
from decimal import Decimal

from ..errors import OptionError


def human_bytes(count: float) -> str:
    """Decimal units, as disks and the Hub count: 1 GB = 10^9 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


LONG_SECONDS = 5400.0  # from here on, times are told in hours


def duration(seconds: float) -> str:
    """40 s, 12 min, 3 h 05 min, 2 days 4 h: two figures, rounded."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} days {hours % 24} h"


_SIZE = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*(B|kB|MB|GB|TB|KiB|MiB|GiB|TiB)?\s*", re.IGNORECASE)
_UNITS = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def size_of(given: int | str | None) -> int | None:
    """Bytes, or a text as of `parse_size`. Raises OptionError."""
    try:
        return parse_size(given) if isinstance(given, str) else given
    except ValueError as error:
        raise OptionError(f"{error}.") from None


def parse_size(text: str) -> int:
    """Bytes of "8MB", "118.4 GiB" or "8000000": decimal units, and binary ones with an i. Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is no size: write bytes, or for example 8MB, 120GB or 118.4GiB")
    unit = (match[2] or "").lower()
    base = 1024 if unit.endswith("ib") else 1000
    size = Decimal(match[1]) * base ** _UNITS[unit[:1]]
    if 0 < size < 1:
        raise ValueError(f"{text[:40]!r} is less than a byte")
    return int(size)
