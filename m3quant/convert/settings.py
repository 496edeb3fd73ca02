"""How a conversion runs, and what it tells of itself, as opposed to what it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..calibration.corpus import Windows
    from ..calibration.ranks import Ranks


class Progress(Protocol):
    """What a conversion tells of itself while it runs."""

    def start(self, total_bytes: int, done_bytes: int) -> None: ...

    def advance(self, count: int) -> None: ...

    def say(self, line: str) -> None: ...


@dataclass
class Settings:
    """How to run, as opposed to what to make. windows is None for data-free recipes."""

    device: str = "cpu"
    windows: Windows | None = None
    strict_coverage: bool = False
    spill: bool = False  # keep hidden states on disk instead of memory
    micro_batch_tokens: int = 16384
    engine: str = "local"  # or "ray": units over the GPUs of a cluster
    address: str | None = None  # of the Ray cluster; None starts one on this machine
    ranks: Ranks | None = None  # this process among those that calibrate together; None: alone
