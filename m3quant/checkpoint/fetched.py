"""Shards of a checkpoint elsewhere as another process fetched them: what a worker on another node reads."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .reader import Stamp, read_ranges, stamp_of

if TYPE_CHECKING:
    from .checkpoint import Range


class FetchedShards:
    """A store of nothing but the shards that lie in `folder` now, whole and compared, held there by who fetched them.

    where: the checkpoint's place, in messages. sizes: shard -> bytes.
    """

    def __init__(self, where: str, folder: Path, sizes: Mapping[str, int]) -> None:
        self.where, self.folder, self.sizes = where, folder, dict(sizes)

    def path(self, name: str) -> str:
        return f"{self.where}/{name}"

    @contextmanager
    def opened(self, shards: Iterable[str], action: str) -> Iterator[tuple[Path, Mapping[str, Stamp]]]:
        """The folder, and stamps of the files as this machine sees them. Raises CheckpointError where it sees them otherwise or not."""
        yield self.folder, {name: self._stamp(name, action) for name in shards}

    def peek(self, ranges: Iterable[Range]) -> None:
        wanted = list(ranges)
        with self.opened({info.shard for info, _, _ in wanted}, "look at") as (folder, stamps):
            read_ranges(folder, wanted, stamps)

    def _stamp(self, name: str, action: str) -> Stamp:
        path = self.folder / name
        try:
            stamp = stamp_of(path.stat())
        except OSError as error:
            found = error.strerror or "it cannot be read"
        else:
            if stamp.size == self.sizes[name]:
                return stamp
            found = f"it has {stamp.size:,} bytes there, not {self.sizes[name]:,}"
        raise CheckpointError(
            f"node {socket.gethostname()} cannot {action} {self.path(name)}, which was fetched to {path}: {found}. Put the output on a "
            "file system that all nodes share."
        )
