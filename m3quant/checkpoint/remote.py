"""A checkpoint that lies elsewhere, on the Hub or in an object store: headers by range, weights only while a cache is attached.

What the kinds of stores have in common. Headers go through the same strict parser as those of local files.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ..errors import CheckpointError
from ..running.retry import again, retry_after
from .bounded import TOKENIZER_BYTES, read_bounded, too_large
from .copying import Copied, copy_file, hash_file
from .header import PREFIX_BYTES, TensorInfo, header_length
from .listing import Listing, classify
from .reader import Stamp, open_file, read_ranges
from .writer import sync_folder

# Headers of MiniMax shards take 20-120 KB: one request for most of them.
FIRST_BYTES = 128 * 1024
REQUESTS_AT_ONCE = 8
RETRY_PAUSES_SECONDS = (1.0, 3.0)


class TransientError(CheckpointError):
    """A failure that may be gone at the next try. words: what happened, for who is told of a pause; pause_seconds: what the server asks
    to wait, where the answer that says so is not the cause."""

    exit_code = 4

    def __init__(self, message: str, words: str = "the request failed", pause_seconds: float | None = None) -> None:
        super().__init__(message)
        self.words, self.pause_seconds = words, pause_seconds

    def __reduce__(self) -> tuple[type[TransientError], tuple[str], dict[str, Any]]:
        # what caused it stays behind
        return type(self), (str(self),), vars(self) | {"pause_seconds": retry_after(self)}


# As `RemoteStore.download`; the sha256 (hex) of the file where it was taken while the file came, None otherwise.
Download = Callable[[str, Path, Callable[[int], None], bool], str | None]


class NotTheFile(Exception):
    """What came is not the file that was asked for; the text says in which way."""


def passing(error: Exception) -> str | None:
    """What happened, in words, where a TransientError says that it may pass."""
    return error.words if isinstance(error, TransientError) else None


class Cache(Protocol):
    """Whole shards in a folder, as `shard_cache.ShardCache` keeps them."""

    folder: Path

    def reading(self, shards: Iterable[str]) -> AbstractContextManager[Mapping[str, Stamp]]: ...

    def fetch_other(self, name: str) -> Path: ...

    def finish(self, key: Hashable) -> None: ...

    def abandon(self) -> None: ...


class RemoteStore(ABC):
    """The files of one checkpoint elsewhere, as they were when the store was made.

    where: how messages name it; kind: what it is on, in messages. sizes: name -> bytes, None where the store states none;
    marks: name -> what changes with the file's content. repo, ref, revision: of a Hub repo its name, what was asked for, and the commit.
    Raises CheckpointError for what cannot be had or is not what was asked for, TransientError for what may pass.
    """

    kind: str
    in_processes = False  # whether the store may go to other processes, which download for this one
    repo: str | None = None
    ref: str | None = None
    revision: str | None = None

    def __init__(self, where: str) -> None:
        self.where = where
        self.sizes: dict[str, int | None] = {}
        self.marks: dict[str, str] = {}
        self.header_digests: dict[str, str] = {}  # shard -> sha256 (hex) of everything before its tensors
        self.expected: dict[str, str] = {}  # file -> sha256 (hex) that somebody else says it has
        self.cache: Cache | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a process that downloads: all but the shards that are here."""
        return self.__dict__ | {"cache": None}

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the checkpoint, without where it lies."""

    @property
    @abstractmethod
    def pinned(self) -> str:
        """What opens just this again."""

    @abstractmethod
    def sha256(self, name: str) -> str | None:
        """The sha256 (hex) that is known of a large file; None where files are told by their marks."""

    @abstractmethod
    def digest(self, name: str) -> str:
        """The sha256 (hex) of a large file, which is read whole for it where the store does not know it."""

    @abstractmethod
    def download(self, name: str, folder: Path, came: Callable[[int], None], fresh: bool) -> None:
        """Bring a file into `folder`, under its name. came: told the bytes that have come; it raises where they are not wanted any more.
        fresh: nothing that came before is taken. Raises NotTheFile for a file that is not as long as the store said."""

    @abstractmethod
    def difference(self, name: str, path: Path, digest: str | None = None) -> str | None:
        """In which way the content of a file of the right size is not what the store says of it, or None.

        digest: its sha256 (hex) as it came; the file is read only if that is not the right one."""

    @abstractmethod
    def _small_file(self, name: str) -> Path:
        """A file of at most TOKENIZER_BYTES on this machine, as the store listed it."""

    @abstractmethod
    def _range_once(self, name: str, start: int, count: int, size: int) -> bytes: ...

    def path(self, name: str) -> str:
        return f"{self.where}/{name}"

    def listing(self) -> Listing:
        return classify(self.sizes, self.where)

    def file_size(self, name: str) -> int:
        """0 where the store states none."""
        return self.sizes[name] or 0

    def known_size(self, name: str) -> int:
        """Raises CheckpointError where the store states none."""
        size = self.sizes[name]
        if size is None:
            raise CheckpointError(
                f"{self.kind[0].upper()}{self.kind[1:]} states no size for {self.path(name)}. {self.remedy}"
            )
        return size

    def file(self, name: str, limit: int) -> bytes:
        """A file of at most `limit` bytes. A larger one is not downloaded."""
        if (size := self.known_size(name)) > limit:
            raise CheckpointError(too_large(self.path(name), size, limit))
        return read_bounded(self._small_file(name), limit)

    def files(self, names: Iterable[str]) -> Path:
        """The folder that holds these files, of at most TOKENIZER_BYTES each."""
        wanted = sorted(names)
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            paths = dict(zip(wanted, pool.map(self._small_file, wanted), strict=True))
        name, path = next(iter(paths.items()))
        return path.parents[name.count("/")]

    def is_small(self, name: str) -> bool:
        """Whether a file is one that is kept: settings, texts and tokenizers, not a draft's weights."""
        return not name.endswith(".safetensors") and self.file_size(name) <= TOKENIZER_BYTES

    def headers(self, names: list[str]) -> dict[str, tuple[bytes, bytes, int]]:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            found = dict(zip(names, pool.map(self._header, names), strict=True))
        self.header_digests = {
            name: hashlib.sha256(prefix + raw).hexdigest() for name, (prefix, raw, _) in found.items()
        }
        return found

    @contextmanager
    def opened(self, shards: Iterable[str], action: str) -> Iterator[tuple[Path, Mapping[str, Stamp]]]:
        """The folder of the attached cache, once it holds these shards."""
        if self.cache is None:
            raise CheckpointError(self.headers_only(action))
        with self.cache.reading(shards) as stamps:
            yield self.cache.folder, stamps

    def headers_only(self, action: str) -> str:
        """The sentence about `action`, which needs weights, where only headers are read."""
        return (
            f"{self.where} is on {self.kind}, where only headers are read: cannot {action} what is there. {self.remedy}"
        )

    @property
    @abstractmethod
    def remedy(self) -> str:
        """How to get the files here, as a sentence."""

    def peek(self, ranges: Iterable[tuple[TensorInfo, int, memoryview]]) -> None:
        """Bytes of tensors: from the attached cache, or, where there is none, by range requests."""
        wanted = list(ranges)
        if self.cache is not None:
            with self.cache.reading({info.shard for info, _, _ in wanted}) as stamps:
                read_ranges(self.cache.folder, wanted, stamps)
            return

        def fill(part: tuple[TensorInfo, int, memoryview]) -> None:
            info, first, view = part
            size = self.file_size(info.shard)
            view[:] = self._range(info.shard, info.start + first, view.nbytes, size) if view.nbytes else b""

        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            list(pool.map(fill, wanted))

    def copy_file(self, name: str, target: Path) -> Copied:
        """A large file is fetched beside the shards and moved, so that it never lies on the disk twice."""
        if self.is_small(name):
            return copy_file(self._small_file(name), target)
        if self.cache is None:
            raise CheckpointError(f"{self.path(name)} is not downloaded. {self.remedy}")
        path = self.cache.fetch_other(name)
        copied = hash_file(path)
        with open_file(path) as descriptor:
            os.fsync(descriptor)
        os.replace(path, target)
        sync_folder(target.parent)
        return copied

    def _header(self, name: str) -> tuple[bytes, bytes, int]:
        size = self.known_size(name)
        first = self._range(name, 0, min(size, FIRST_BYTES), size) if size else b""
        length = header_length(first, size, self.path(name))
        raw = first[PREFIX_BYTES : PREFIX_BYTES + length]
        if len(raw) < length:
            raw += self._range(name, PREFIX_BYTES + len(raw), length - len(raw), size)
        return first[:PREFIX_BYTES], raw, size

    def _range(self, name: str, start: int, count: int, size: int) -> bytes:
        """`count` bytes of a file from `start` on; a busy server or a dropped connection is asked again."""
        with self._listed(name):
            return again(lambda: self._range_once(name, start, count, size), passing, RETRY_PAUSES_SECONDS)

    @contextmanager
    def _listed(self, name: str) -> Iterator[None]:
        """Around reading for who does not fetch a second time: a file that is not the one listed is a CheckpointError."""
        try:
            yield
        except NotTheFile as other:
            raise CheckpointError(
                f"{self.path(name)} is not the file that {self.kind} lists: {other}. Try again."
            ) from None
