"""How a conversion runs, and what it tells of itself, as opposed to what it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..calibration.corpus import Windows
    from ..calibration.ranks import Ranks
    from ..plan import Plan
    from ..reading import SourceReader
    from .journal import Journal
    from .ray_cluster import Cluster
    from .stopping import StopFlag


class Progress(Protocol):
    """What a conversion tells of itself while it runs."""

    def start(self, total_bytes: int, done_bytes: int) -> None: ...

    def advance(self, count: int) -> None: ...

    def say(self, line: str) -> None: ...


class Silent:
    """A Progress that shows nothing and keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.total = self.done = 0

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self.total, self.done = total_bytes, done_bytes

    def advance(self, count: int) -> None:
        self.done += count

    def say(self, line: str) -> None:
        self.lines.append(line)


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


@dataclass(frozen=True)
class Run:
    """One conversion under way in this process: what is made of what, how, and whom it tells."""

    plan: Plan
    output: Path
    reader: SourceReader
    settings: Settings
    device: torch.device
    journal: Journal
    stop: StopFlag
    progress: Progress
    cluster: Cluster | None = None  # whose workers do it; None: this process
