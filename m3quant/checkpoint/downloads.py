"""Downloads of one store, of many bytes in processes of their own (`running.workers`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..running import workers
from ..running.workers import WorkerLost, Workers, WorkersEnded
from .growing import GrowingDigest
from .remote import Download, RemoteStore, TransientError
from .shard_cache import Abandoned


@dataclass(frozen=True)
class _Fetch:
    """One download after the other, in a process that has a copy of the store."""

    store: RemoteStore

    def __call__(self, tell: Callable[[int], None], name: str, folder: Path, fresh: bool) -> str | None:
        with GrowingDigest(folder) as growing:

            def came(count: int) -> None:
                growing.came(count)
                tell(count)

            self.store.download(name, folder, came, fresh)
            return growing.digest(folder / name)


@contextmanager
def downloads(store: RemoteStore, count: int) -> Iterator[Download]:
    """How `count` bytes of a store are best downloaded while the block runs.

    In a process of its own a download raises what it would raise here, TransientError if the process dies, and Abandoned if the block ends.
    """
    if not store.in_processes or count < workers.WORTH_BYTES:
        yield store.download
        return
    with Workers(_Fetch(store)) as processes:

        def download(name: str, folder: Path, came: Callable[[int], None], fresh: bool) -> str | None:
            try:
                return processes.run(came, name, folder, fresh)
            except WorkerLost as lost:
                words = f"a download ended with {lost.code}"
                raise TransientError(f"The process that downloaded ended with {lost.code}. Try again.", words) from None
            except WorkersEnded:
                raise Abandoned("the downloads have ended.") from None

        yield download
