"""Read a checkpoint that is elsewhere without downloading it whole: what a command wraps its work in."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OptionError, StoppedError
from ..running.stopping import StopFlag
from ..running.words import human_bytes
from .downloads import downloads
from .fetcher import Fetcher
from .shard_cache import ShardCache
from .shard_plan import AHEAD, Step, plan_shards, too_small

if TYPE_CHECKING:
    from ..running.progress import Progress
    from .checkpoint import Checkpoint

# Left free where --cache-disk does not say how much shards may take: for the journal, reports, and whatever else writes there.
RESERVE_BYTES = 10**9


@contextmanager
def streamed(
    checkpoint: Checkpoint,
    steps: Iterable[Step],
    folder: Path,
    budget: int,
    stop: StopFlag,
    progress: Progress,
    keep: bool = False,
    label: str = "fetch",
    ahead: int = AHEAD,
    others: Iterable[str] = (),
) -> Iterator[None]:
    """Read tensors of a checkpoint elsewhere, step by step, while the block runs; of a folder nothing changes.

    steps: all that is read, in order; whoever is done with one tells `checkpoint.finish_step`. folder: for shards, of at most
    `budget` bytes at a time. keep: whether whole shards stay after an error, for the run that continues.
    ahead: as `shard_plan.AHEAD`. others: files that are fetched besides and are no shards.
    Raises OptionError for too small a budget.
    """
    store = checkpoint.remote
    if store is None:
        yield
        return
    plan = plan_shards(steps, checkpoint.shard_sizes, budget, ahead)
    total = plan.fetch_bytes + sum(map(store.known_size, others))
    advance = progress.beside(label, total)

    def came(count: int) -> None:
        if count > 0:  # not where they are lost again
            cache.came()
        advance(count)

    with downloads(store, total) as download:
        fetcher = Fetcher(
            store, folder, came, progress.say, lambda: cache.left, download, lambda name: cache.order(name)
        )
        cache = ShardCache(folder, plan, fetcher.fetch, stop, progress.say, keep)
        with cache:
            store.cache = cache
            try:
                yield
            finally:
                store.cache = None


def reading_words(checkpoint: Checkpoint) -> str:
    """What a command does while it waits for weights, which may be on their way."""
    return "reading" if checkpoint.remote is None else "fetching and reading"


def no_shards(folder: str) -> str:
    """The sentence about --cache-disk where nothing is elsewhere."""
    return f"--cache-disk is about shards of a checkpoint on the Hub or in an object store, and {folder} is a folder: leave it out."


def least_budget(checkpoint: Checkpoint, steps: Iterable[Step]) -> int:
    """The smallest budget that `streamed` takes for these steps; 0 of a folder."""
    return plan_shards(steps, checkpoint.shard_sizes, None).least if checkpoint.remote else 0


def remote_budget(checkpoint: Checkpoint, steps: Iterable[Step], folder: Path, asked: int | None) -> int:
    """Bytes that shards for these steps may take in `folder`, beside which nothing large is written; 0 of a checkpoint in a folder.

    asked: as --cache-disk. Raises OptionError for a folder, and as `cache_budget`.
    """
    if checkpoint.remote is None:
        if asked is not None:
            raise OptionError(no_shards(checkpoint.root))
        return 0
    return cache_budget(asked, folder, 0, least_budget(checkpoint, steps))


def cache_budget(asked: int | None, folder: Path, to_write: int, least: int) -> int:
    """Bytes that shards in `folder` may take: what is asked for, or what is free beside the reserve and `to_write` bytes.

    Raises OptionError for less than `least`, StoppedError where the disk has no room for that much.
    """
    if asked is not None and asked < least:
        raise OptionError(too_small(asked, least))
    place = folder
    while not place.exists():
        place = place.parent
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    free = shutil.disk_usage(place).free + present - to_write
    if asked is not None:
        if asked > free:
            raise StoppedError(
                f"the disk of {place} has {human_bytes(max(free, 0))} free beside the output, less than --cache-disk {human_bytes(asked)}: free space, "
                f"give less (at least {human_bytes(least)}), or choose another folder. Nothing was changed."
            )
        return asked
    if free - RESERVE_BYTES < least:
        raise StoppedError(
            f"the disk of {place} has {human_bytes(max(free, 0))} free beside the output, and shards from the Hub or an object store take at least "
            f"{human_bytes(least)}, with {human_bytes(RESERVE_BYTES)} in reserve: free space, or give --cache-disk {least} to do without "
            "the reserve. Nothing was changed."
        )
    return free - RESERVE_BYTES
