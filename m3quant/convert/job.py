"""One conversion in this process: how it runs, not what it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import StoppedError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..artifact.journal import Journal
    from ..calibration.corpus import Windows
    from ..calibration.ranks import Ranks
    from ..planning.plan import Plan
    from ..quant.reading import SourceReader
    from ..running.progress import Progress
    from ..running.stopping import StopFlag
    from .ray.cluster import Cluster
    from .shard_sink import ShardSink


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
    boundary_every: int | None = None  # layers between saved hidden states; None: resources.boundary_interval
    cache_disk: int | None = None  # bytes that shards from elsewhere may take at a time; None: what is free
    ranks: Ranks | None = None  # this process among those that calibrate together; None: alone
    sink: ShardSink | None = None  # where finished shards go beyond the disk


@dataclass(frozen=True)
class Run:
    """One running conversion in this process: its source, output and settings, and where it reports."""

    plan: Plan
    output: Path
    reader: SourceReader
    settings: Settings
    device: torch.device
    journal: Journal
    stop: StopFlag
    progress: Progress
    cluster: Cluster | None = None  # whose workers do it; None: this process


def out_of_memory(device: object, error: torch.OutOfMemoryError, can_spill: bool = False) -> StoppedError:
    """can_spill: whether --spill is a choice of this run and was not taken."""
    or_spill = ", or keep hidden states on the disk with --spill," if can_spill else ""
    return StoppedError(
        f"{device} has too little free memory ({str(error).split('. ')[0]}); finished work is kept: free memory on it{or_spill} "
        "and run the same command again."
    )
