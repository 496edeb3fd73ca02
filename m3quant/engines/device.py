"""One accelerator, as engines count its memory."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
MIB = 2**20
CPU = "CPU"  # the name of the device that an engine's CPU build runs on


@dataclass(frozen=True)
class Gpu:
    """One accelerator. total_bytes: usable by torch; bandwidth: HBM bytes per second (datasheet)."""

    name: str
    total_bytes: int
    bandwidth: float
    source: str
    generation: str = "hopper"
