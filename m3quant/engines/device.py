"""One accelerator, as engines count its memory."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
MIB = 2**20
CPU = "CPU"  # the name of the device that an engine's CPU build runs on


@dataclass(frozen=True)
class Gpu:
    """One accelerator. total_bytes: usable by torch; bandwidth: HBM bytes per second (datasheet).

    link: bytes per second from the host's memory; host_bytes: of host memory for each GPU in the maker's own machine. 0: not known.
    shared: whether its memory is the host's, so that there is nowhere to move anything.
    chip: GPUs of one chip differ in their memory alone (same die, SMs, clocks and NVLink), so that a speed measured on one bounds the
    others' (runtime/near.py); "": no other is known to be alike.
    """

    name: str
    total_bytes: int
    bandwidth: float
    source: str
    generation: str = "hopper"
    link: float = 0.0
    host_bytes: int = 0
    shared: bool = False
    chip: str = ""
