"""A checkpoint in an object store (s3://, gs://), through fsspec: the same way as from the Hub, but for what tells a damaged file.

An object store states no sha256 of its objects. What is checked of a shard instead: its size, its header against the one that was
read first, the md5 where the store states one (docs/hub.md), and before and after it is fetched that it is still the object that was listed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, M3QuantError, StoppedError
from ..running.retry import TRANSIENT_STATUS, again
from .copying import PIECE_BYTES
from .listing import CONFIG_NAME
from .object_drivers import ABSENT, DRIVERS, FORBIDDEN
from .remote import RETRY_PAUSES_SECONDS, NotTheFile, RemoteStore, TransientError, passing
from .system import flags

BLOCK_BYTES = 16 * 2**20  # one request, and after how many bytes a fetch looks whether it is still wanted
BLOCKS_AT_ONCE = 4  # of one object: a single request does not fill the network
MOST_OBJECTS = 10_000  # under one prefix; the releases have some hundred files
_LIST = "the list of objects"
_URL = re.compile(
    r"(?P<scheme>[a-z0-9]+)://(?P<bucket>[a-z0-9][a-z0-9._-]{1,221})(?P<prefix>(/[^/?#*\[\]\x00-\x1f\x7f]+)*)/?"
)


class ObjectStore(RemoteStore):
    """The objects under one prefix, as they are when the store is made.

    Raises CheckpointError, one sentence and a remedy, for an address that is none, a bucket or prefix that is absent or not open,
    a store that cannot be reached, and an object that is another than the one listed; PackageMissing without the driver.
    """

    def __init__(self, url: str) -> None:
        found = _URL.fullmatch(url)
        if found is None or found["scheme"] not in DRIVERS or {".", ".."} & set(found["prefix"].split("/")):
            raise CheckpointError(
                f"{url} is no address of a checkpoint: give s3://BUCKET/PREFIX or gs://BUCKET/PREFIX, a folder, or a Hub repo."
            )
        super().__init__(url.rstrip("/"))
        self._driver = DRIVERS[found["scheme"]]
        self.kind = self._driver.kind
        self._root = f"{found['bucket']}{found['prefix']}"
        self._files = self._driver.open()
        self._lock = threading.Lock()
        self._here: set[str] = set()  # small files that were fetched
        self._list()

    @property
    def name(self) -> str:
        return self._root.rpartition("/")[2]

    @property
    def pinned(self) -> str:
        return self.where

    @property
    def remedy(self) -> str:
        return "Download it and give the folder."

    def sha256(self, name: str) -> None:
        return None

    def digest(self, name: str) -> str:
        digest, size = hashlib.sha256(), self.known_size(name)
        for start in range(0, size, BLOCK_BYTES):
            digest.update(self._range(name, start, min(BLOCK_BYTES, size - start), size))
        self._check_unchanged(name)
        return digest.hexdigest()

    def download(self, name: str, folder: Path, came: Callable[[int], None], fresh: bool) -> None:
        size, path = self.known_size(name), folder / name
        self._check_unchanged(name)

        def block(start: int) -> int:
            data = self._range_once(name, start, min(BLOCK_BYTES, size - start), size)
            came(len(data))
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, memoryview(data)[written:], start + written)
            return len(data)

        with self._written(name, folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            how = flags("O_WRONLY", "O_CREAT", "O_TRUNC", "O_CLOEXEC", "O_NOFOLLOW")
            descriptor = os.open(path, how, 0o666)
            pool = ThreadPoolExecutor(BLOCKS_AT_ONCE)
            try:
                for _ in pool.map(block, range(0, size, BLOCK_BYTES)):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)
                os.close(descriptor)
        self._check_unchanged(name)

    def difference(self, name: str, path: Path, digest: str | None = None) -> str | None:
        wanted = self._driver.md5(self.marks[name])
        if wanted is None:
            return None
        md5 = hashlib.md5(usedforsecurity=False)
        with open(path, "rb") as file:
            while data := file.read(PIECE_BYTES):
                md5.update(data)
        found = md5.hexdigest()
        return f"its md5 is {found[:12]}..., not {wanted[:12]}..." if found != wanted else None

    def _list(self) -> None:
        """Fill sizes and marks, level by level; only the top of a prefix without config.json, which may be a whole bucket."""
        folders, seen = [self._root], 0
        while folders:
            folder = folders.pop()
            for info in again(partial(self._level, folder, MOST_OBJECTS - seen), passing, RETRY_PAUSES_SECONDS):
                name = str(info["name"]).removeprefix(f"{self._root}/")
                seen += 1
                if info["type"] == "directory":
                    if not name.rstrip("/").rpartition("/")[2].startswith("."):
                        folders.append(str(info["name"]).rstrip("/"))
                elif not name.endswith("/"):  # a marker of a folder
                    size = info["size"]
                    self.sizes[name], self.marks[name] = None if size is None else int(size), self._driver.mark(info)
            if seen > MOST_OBJECTS:
                raise CheckpointError(
                    f"{self.where} holds more than {MOST_OBJECTS:,} objects: give the prefix of one checkpoint."
                )
            if CONFIG_NAME not in self.sizes:
                return

    def _level(self, folder: str, most: int) -> list[dict[str, Any]]:
        with self._errors(_LIST):
            found = self._driver.level(self._files, folder, most + 1)  # beside a marker of the folder itself
            return [info for info in found if str(info["name"]).rstrip("/") != folder]

    def _check_unchanged(self, name: str) -> None:
        """Raise CheckpointError for an object that is not the one that was listed."""
        info = again(partial(self._info, name), passing, RETRY_PAUSES_SECONDS)
        if (int(info["size"]), self._driver.mark(info)) != (self.file_size(name), self.marks[name]):
            raise CheckpointError(
                f"{self.path(name)} has changed since it was listed. Leave the checkpoint alone while it is read, and start again."
            )

    def _info(self, name: str) -> dict[str, Any]:
        with self._errors(name):
            found: dict[str, Any] = self._files.info(f"{self._root}/{name}")
            return found

    @cached_property
    def _folder(self) -> Path:
        """Of small files; gone with the store, or with the process."""
        folder = tempfile.mkdtemp(prefix="m3quant-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    def _small_file(self, name: str) -> Path:
        with self._lock:
            folder = self._folder
        if name not in self._here:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".") as own:
                again(partial(self._whole_small_file, name, Path(own)), passing, RETRY_PAUSES_SECONDS)
                with self._written(name, folder):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(Path(own) / name, folder / name)
            self._here.add(name)
        return folder / name

    def _whole_small_file(self, name: str, folder: Path) -> None:
        with self._listed(name):
            self.download(name, folder, lambda count: None, fresh=True)
            if (difference := self.difference(name, folder / name)) is not None:
                raise NotTheFile(difference)

    def _range_once(self, name: str, start: int, count: int, size: int) -> bytes:
        with self._errors(name):
            data: bytes = self._files.cat_file(f"{self._root}/{name}", start=start, end=start + count)
        if len(data) > count:
            raise NotTheFile(f"{len(data):,} bytes came in place of {count:,}")
        if len(data) < count:
            self._check_unchanged(name)
            raise TransientError(
                f"{self.kind} sent {len(data)} of {count} bytes of {self.path(name)}. Try again.", self._no_answer
            )
        return data

    @property
    def _no_answer(self) -> str:
        return f"{self.kind} did not answer in full"

    @contextmanager
    def _written(self, name: str, folder: Path) -> Iterator[None]:
        """Around writing into a folder of this machine."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoppedError(
                    f"{self.path(name)} cannot be written into {folder}: {error.strerror}. Free space and run the same command again."
                ) from None
            raise CheckpointError(f"{self.path(name)} cannot be written into {folder}: {error.strerror}.") from error

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Put every failure of the file system and the network into a sentence: drivers raise what their libraries do."""
        try:
            yield
        except M3QuantError:
            raise
        except Exception as error:
            status = self._driver.failure(error)
            if status in TRANSIENT_STATUS:
                words = f"{self.kind} answered {status}" if status else self._no_answer
                raise TransientError(self._sentence(what, error, status), words) from error
            raise CheckpointError(self._sentence(what, error, status)) from error

    def _sentence(self, what: str, error: Exception, status: int | None) -> str:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if status == ABSENT and what == _LIST:
            return f"{self.where} is not there: {self.kind} has no such bucket, or nothing under that prefix ({reason}). Check the address."
        if status == ABSENT:
            return f"{self.where}: {what} is gone since it was listed ({reason}). Leave the checkpoint alone while it is read."
        if status in (401, FORBIDDEN):
            return f"{self.where} is not open to you ({what}: {reason}): {self._driver.access}."
        if status is None:
            return f"{self.kind} could not be asked for {what} of {self.where} ({reason}): check the network, or try again later."
        return f"{self.kind} answered {status} when asked for {what} of {self.where} ({reason}): try again later."
