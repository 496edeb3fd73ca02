"""Whole files of a store elsewhere into a folder, compared before anybody reads them.

A file that is not what the store says of it, in size, checksum or (of a shard) in the header that was planned from, is fetched
again once and then refused. What may pass (429, 5xx, a connection that drops) is asked again after pauses that are told.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..errors import CheckpointError, StoppedError
from ..running.retry import again
from .download_gate import DownloadGate
from .reader import Stamp, read_header, stamp_of
from .remote import Download, NotTheFile, RemoteStore, TransientError, passing
from .shard_cache import Abandoned
from .writer import sha256_file

# About five minutes without an answer; then the run stops, to be continued.
PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0)
DOWNLOADS_AT_ONCE = 4  # at most (download_gate.py)
SLEEP_SECONDS = 2.0  # after which a pause looks whether the fetch is still wanted


class Fetcher:
    """Fetches files of one store into one folder, on any threads.

    advance: told the bytes that have come, less than none where they are dropped again. left: whether to give up. download: in place of the
    store's own. order: of several files that wait for the network, the one with the smallest comes first.
    """

    def __init__(
        self,
        store: RemoteStore,
        folder: Path,
        advance: Callable[[int], None],
        say: Callable[[str], None],
        left: Callable[[], bool] = lambda: False,
        download: Download | None = None,
        order: Callable[[str], float] = lambda name: 0.0,
    ) -> None:
        self.store, self.folder = store, folder
        self._from_store = download or store.download
        self.advance, self.say, self.left, self.order = advance, say, left, order
        self._gate = DownloadGate(DOWNLOADS_AT_ONCE)

    def fetch(self, name: str) -> Stamp:
        """The stamp of `name` in the folder, whole and compared; one that lies there already is compared too.

        Raises CheckpointError for what cannot be had or is not what the store says, StoppedError for a full disk or a store
        that does not answer, both with the store's words.
        """
        path, size = self.folder / name, self.store.known_size(name)
        if path.is_file() and path.stat().st_size == size and self._difference(name, path) is None:
            self.advance(size)
            return stamp_of(path.stat())
        try:
            try:
                return self._fetch_and_compare(name, path, fresh=False)
            except NotTheFile as other:
                self.say(f"{self.store.path(name)}: {other}; fetching it again")
            return self._fetch_and_compare(name, path, fresh=True)
        except NotTheFile as other:
            raise CheckpointError(
                f"{self.store.path(name)} was fetched twice and is not the file that {self.store.kind} lists: {other}. "
                "Try again later, or download the checkpoint elsewhere and give the folder."
            ) from None
        except TransientError as error:
            raise StoppedError(f"{error} Finished work is kept: the same command continues.") from None

    def _fetch_and_compare(self, name: str, path: Path, fresh: bool) -> Stamp:
        path.unlink(missing_ok=True)
        came = _Bytes(self)
        try:
            download = partial(self._download, name, came, fresh)
            digest = again(download, passing, PAUSES_SECONDS, self._tell(name), self._sleep)
            if (difference := self._difference(name, path, digest)) is not None:
                raise NotTheFile(difference)
        except BaseException:
            path.unlink(missing_ok=True)
            came.drop()
            raise
        self.advance(self.store.file_size(name) - came.count)  # a copy out of a cache is told as one
        return stamp_of(path.stat())

    def _download(self, name: str, came: _Bytes, fresh: bool) -> str | None:
        came.drop()
        with self._gate.download(self.store.file_size(name), self.order(name), self.left) as count:

            def told(size: int) -> None:
                came.add(size)
                count(size)

            return self._from_store(name, self.folder, told, fresh)

    def _difference(self, name: str, path: Path, digest: str | None = None) -> str | None:
        """In which way a file is not the one that the store lists, or None. digest: as `RemoteStore.difference`."""
        size = self.store.file_size(name)
        if (found := path.stat().st_size) != size:
            return f"it has {found:,} bytes, not {size:,}"
        if (other := self.store.difference(name, path, digest)) is not None:
            return other
        expected = self.store.expected.get(name)
        if expected not in (None, digest) and (of_file := sha256_file(path)) != expected:
            return f"its sha256 is {of_file[:12]}..., not {expected[:12]}..."
        if (planned := self.store.header_digests.get(name)) is not None:
            prefix, raw, _ = read_header(path)
            if hashlib.sha256(prefix + raw).hexdigest() != planned:
                return "its header is not the one that was read before"
        return None

    def _tell(self, name: str) -> Callable[[str], None]:
        return lambda words: self.say(f"{self.store.path(name)}: {words}")

    def _sleep(self, seconds: float) -> None:
        while seconds > 0:
            if self.left():
                raise Abandoned(f"{self.store.where} is not read any more.")
            time.sleep(min(SLEEP_SECONDS, seconds))
            seconds -= SLEEP_SECONDS


class _Bytes:
    """The bytes of one file that have come, told as they come."""

    def __init__(self, fetcher: Fetcher) -> None:
        self.fetcher, self.count = fetcher, 0

    def drop(self) -> None:
        """They are gone again."""
        self.fetcher.advance(-self.count)
        self.count = 0

    def add(self, count: int) -> None:
        """They have come. Raises Abandoned where nobody wants them any more."""
        if self.fetcher.left():
            raise Abandoned(f"{self.fetcher.store.where} is not read any more.")
        self.count += count
        self.fetcher.advance(count)
