"""Whole files of a Hub repo into a folder, by huggingface_hub (through Xet where hf_xet is installed), compared before anybody reads them.

A file that is not what the Hub says of it, in size, checksum or (of a shard) in the header that was planned from, is fetched
again once and then refused. What may pass (429, 5xx, a connection that drops) is asked again after pauses that are told.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, StoppedError
from ..running.retry import again
from .hub import HubStore, TransientError, passing
from .reader import Stamp, read_header, stamp_of
from .shard_cache import Abandoned
from .writer import sha256_file

# About five minutes without an answer; then the run stops, to be continued.
PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0)
# Xet and a fast server fill the network with one; more of them would keep the first layer waiting for shards of later ones.
DOWNLOADS_AT_ONCE = 4
SLEEP_SECONDS = 2.0  # after which a pause looks whether the fetch is still wanted
# huggingface_hub's words for a file of another size than the Hub said before
_INCONSISTENT = "Consistency check failed"


class _Other(Exception):
    """What came is not the file that was asked for."""


class Fetcher:
    """Fetches files of one store into one folder, on any threads.

    advance: told the bytes that have come, less than none where they are dropped again. left: whether to give up.
    """

    def __init__(
        self,
        store: HubStore,
        folder: Path,
        advance: Callable[[int], None],
        say: Callable[[str], None],
        left: Callable[[], bool] = lambda: False,
    ) -> None:
        self.store, self.folder = store, folder
        self.advance, self.say, self.left = advance, say, left
        self._network = threading.Semaphore(DOWNLOADS_AT_ONCE)
        # A cache of chunks beside the shards would lie on the disk twice (read when hf_xet is first used).
        os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
        # Its own retries would be told between our bars; what it gives up on is told by `again`.
        logging.getLogger("huggingface_hub.file_download").setLevel(logging.ERROR)

    def fetch(self, name: str) -> Stamp:
        """The stamp of `name` in the folder, whole and compared; one that lies there already is compared too.

        Raises CheckpointError for what cannot be had or is not what the Hub says, StoppedError for a full disk or a Hub that
        does not answer, both with the Hub's words.
        """
        path, size = self.folder / name, self.store.file_size(name)
        if path.is_file() and path.stat().st_size == size and self._difference(name, path) is None:
            self.advance(size)
            return stamp_of(path.stat())
        try:
            try:
                return self._fetch_and_compare(name, path, fresh=False)
            except _Other as other:
                self.say(f"{self.store.path(name)}: {other}; fetching it again")
            return self._fetch_and_compare(name, path, fresh=True)
        except _Other as other:
            raise CheckpointError(
                f"{self.store.path(name)} was fetched twice and is not the file that the Hub lists: {other}. "
                "Try again later, or download the checkpoint elsewhere and give the folder."
            ) from None
        except TransientError as error:
            raise StoppedError(f"{error} Finished work is kept: the same command continues.") from None

    def _fetch_and_compare(self, name: str, path: Path, fresh: bool) -> Stamp:
        path.unlink(missing_ok=True)
        came = _Bytes(self)
        try:
            again(partial(self._download, name, came, fresh), passing, PAUSES_SECONDS, self._tell(name), self._sleep)
            if (difference := self._difference(name, path)) is not None:
                raise _Other(difference)
        except BaseException:
            path.unlink(missing_ok=True)
            came.drop()
            raise
        self.advance(self.store.file_size(name) - came.count)  # a copy out of the Hub's own cache is told as one
        return stamp_of(path.stat())

    def _download(self, name: str, came: _Bytes, fresh: bool) -> None:
        """fresh: neither what came before (1.x of huggingface_hub resumes) nor what lies in the Hub's cache is taken."""
        from huggingface_hub import hf_hub_download

        came.drop()
        try:
            with self._network, self.store.errors(name):
                try:
                    hf_hub_download(
                        self.store.repo,
                        name,
                        revision=self.store.revision,
                        local_dir=self.folder,
                        force_download=fresh,
                        tqdm_class=came.bar(),
                    )
                except OSError as error:
                    if str(error).startswith(_INCONSISTENT):
                        raise _Other(str(error).splitlines()[0]) from None
                    raise
        except RuntimeError as error:  # what hf_xet raises
            if os.strerror(errno.ENOSPC) in str(error):
                raise StoppedError(
                    f"{self.store.path(name)} cannot be written into {self.folder}: {os.strerror(errno.ENOSPC)}. "
                    "Free space and run the same command again."
                ) from None
            raise TransientError(f"{self.store.path(name)} could not be fetched ({error}). Try again.") from error

    def _difference(self, name: str, path: Path) -> str | None:
        """In which way a file is not the one that the Hub lists, or None."""
        size, wanted = self.store.file_size(name), self.store.sha256(name)
        if (found := path.stat().st_size) != size:
            return f"it has {found:,} bytes, not {size:,}"
        if (digest := sha256_file(path)) != wanted:
            return f"its sha256 is {digest[:12]}..., not {wanted[:12]}..."
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

    def bar(self) -> Any:
        """A progress bar class for huggingface_hub that draws nothing, counts here, and ends a fetch that is not wanted."""
        from tqdm.std import tqdm

        came = self

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **given: Any) -> None:
                super().__init__(*args, **{**given, "disable": True})

            def update(self, n: float | None = 1) -> None:
                if came.fetcher.left():
                    raise Abandoned(f"{came.fetcher.store.where} is not read any more.")
                came.count += int(n or 0)
                came.fetcher.advance(int(n or 0))

            # With these two, hf_xet's bytes on the network and on the disk come as one bar.
            def update_transfer(self, n: float | None = 1) -> None: ...

            def set_transfer_postfix_str(self, *_: object, **__: object) -> None: ...

        return Bar
