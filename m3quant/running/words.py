"""Numbers as people read them."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Decimal units, as disks and the Hub count: 1 GB = 10^9 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
