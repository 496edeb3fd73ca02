"""Files that are either whole or absent: written under a temporary name, synced, renamed.

A rename within one folder is atomic (POSIX rename), and syncing the folder makes the new name survive a power cut.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, StoppedError
from ..running.timing import span
from . import system
from .header import Entry, entry_bytes, header_bytes
from .reader import bytes_view, torch_dtype

if TYPE_CHECKING:
    import torch

# What transformers and vLLM expect of a checkpoint written from torch.
DEFAULT_METADATA: Mapping[str, str] = {"format": "pt"}
# Larger buffers are hashed on a second thread while they are written (both release the interpreter's lock).
OVERLAP_BYTES = 2**20
WRITE_BYTES = 64 * 2**20
# The kernel holds written pages back (10 % of memory on Linux) and would begin with the disk only at the sync; from this
# many bytes on it is asked to begin, so that a large shard is on the disk, but for its end, when the last tensor comes.
WRITEBACK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class ShardRecord:
    """A finished file: its name, bytes and sha256 (hex) of the whole of it."""

    name: str
    size: int
    sha256: str


def temporary_name(name: str) -> str:
    """The hidden name under which a file is written; a checkpoint reader passes over hidden files."""
    return f".{name}.tmp"


class AtomicFile:
    """A file of known size being written under its temporary name."""

    def __init__(self, folder: Path, name: str, size: int) -> None:
        if not name or "/" in name or name in (".", ".."):
            raise ValueError(f"{name!r} is not a plain file name")
        self.folder, self.name, self.size = folder, name, size
        self.temporary = folder / temporary_name(name)
        self.written = 0
        self._told = 0  # bytes whose writing to the disk has been asked for
        self._descriptor = -1
        with self._refusals():
            # A leftover of a killed run is overwritten; what it held was never renamed, so nothing relies on it.
            how = system.flags("O_WRONLY", "O_CREAT", "O_TRUNC", "O_CLOEXEC", "O_NOFOLLOW")
            self._descriptor = os.open(self.temporary, how, 0o666)
            if system.free_bytes(folder) < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, data: memoryview) -> None:
        with self._refusals():
            while data.nbytes:
                count = os.write(self._descriptor, data[:WRITE_BYTES])
                self.written += count
                data = data[count:]

    def begin_writeback(self) -> None:
        """Have the kernel write what it holds back; errors show at the sync. May wait for the disk, not for this data."""
        if self.written - self._told >= WRITEBACK_BYTES:
            system.start_writeback(self._descriptor, self._told, self.written - self._told)
            self._told = self.written

    def commit(self) -> None:
        with self._refusals():
            with span("sync", self.size):
                os.fsync(self._descriptor)
            # Some network file systems report a full disk only here.
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
            os.replace(self.temporary, self.folder / self.name)
            sync_folder(self.folder)

    def abort(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            self.temporary.unlink()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """Remove the temporary file at any failure, and put a system error into words."""
        try:
            yield
        except OSError as error:
            refusal = self._refusal(error)
            with contextlib.suppress(OSError):
                self.abort()
            raise refusal from error
        except BaseException:
            with contextlib.suppress(OSError):
                self.abort()
            raise

    def _refusal(self, error: OSError) -> StoppedError | OutputError:
        target = self.folder / self.name
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(f"{target} cannot be written: {error.strerror or error}. Check the folder and the disk.")
        needed = self.size - self.written
        # A quota is reached although the disk has room, and other programs may have freed some meanwhile.
        missing = max(needed - system.free_bytes(self.folder), 1) if error.errno == errno.ENOSPC else needed
        return StoppedError(
            f"{error.strerror}: {missing} bytes are missing to write {target} ({self.size} bytes). "
            f"What was finished is intact: free space and run the same command again."
        )


def sync_folder(folder: Path) -> None:
    """Make renamed and new names in `folder` survive a power cut."""
    system.sync_names(folder)


class ShardWriter:
    """One safetensors file, laid out in full before the first tensor comes.

    entries: (name, dtype code, shape) in the order of `write` calls; metadata: the header's __metadata__.
    Use as a context manager (an exception aborts, a clean end closes; then see `.record`), or call close() or abort().
    Raises StoppedError for a full disk, OutputError if the folder cannot be written, ValueError for misuse.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        entries: Iterable[Entry],
        metadata: Mapping[str, str] | None = DEFAULT_METADATA,
    ) -> None:
        self.entries = [(tensor, dtype, tuple(shape)) for tensor, dtype, shape in entries]
        header = header_bytes(self.entries, metadata)
        self.size = len(header) + sum(entry_bytes(entry) for entry in self.entries)
        self.record: ShardRecord | None = None
        self._next = 0
        self._sha256 = hashlib.sha256()
        self._file = AtomicFile(Path(folder), name, self.size)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._writeback = ThreadPoolExecutor(1, thread_name_prefix="writeback")
        self._append([memoryview(header)])

    def write(self, name: str, data: "torch.Tensor | bytes | bytearray | memoryview") -> None:
        """Append the next tensor. A tensor must have the entry's dtype and shape (F8_E8M0 may come as uint8)."""
        if self._next == len(self.entries):
            raise ValueError(f"{self._file.name}: {name!r} comes after the last of {len(self.entries)} tensors")
        entry = self.entries[self._next]
        if name != entry[0]:
            raise ValueError(f"{self._file.name}: {name!r} comes where {entry[0]!r} was announced")
        if isinstance(data, bytes | bytearray | memoryview):
            view = memoryview(data).cast("B")
        else:
            view = _tensor_bytes(data, entry)
        needed = entry_bytes(entry)
        if view.nbytes != needed:
            raise ValueError(f"{name!r}: {view.nbytes} bytes come where {entry[1]} {entry[2]} takes {needed}")
        self._append([view])
        self._next += 1

    def append(self, views: Sequence[memoryview], tensors: int) -> None:
        """Append the bytes of the next tensors, in pieces of any size; `tensors` of them end in these bytes.

        Only the sum is checked, when the file is closed: the caller answers for the layout.
        """
        self._append(views)
        self._next += tensors

    def _append(self, views: Sequence[memoryview]) -> None:
        count = sum(view.nbytes for view in views)
        if count < OVERLAP_BYTES:
            self._hash(views, count)
            self._write(views, count)
            return
        hashing = self._pool.submit(self._hash, views, count)
        try:
            self._write(views, count)
        finally:
            hashing.result()
        self._writeback.submit(self._file.begin_writeback)

    def _hash(self, views: Sequence[memoryview], count: int) -> None:
        with span("hash", count):
            for view in views:
                self._sha256.update(view)

    def _write(self, views: Sequence[memoryview], count: int) -> None:
        with span("write", count):
            for view in views:
                self._file.write(view)

    def close(self) -> ShardRecord:
        """Sync and rename the finished file. Raises ValueError if tensors are missing."""
        if self.record is None:
            if self._next != len(self.entries):
                missing = self.entries[self._next][0]
                self.abort()
                raise ValueError(f"{self._file.name} closed before {missing!r} was written")
            if self._file.written != self.size:
                self.abort()
                raise ValueError(f"{self._file.name}: {self._file.written} bytes came, {self.size} were announced")
            self._stop_threads()
            self._file.commit()
            self.record = ShardRecord(self._file.name, self.size, self._sha256.hexdigest())
        return self.record

    def abort(self) -> None:
        """Drop the unfinished file; after close() this does nothing."""
        if self.record is None:
            self._stop_threads()
            self._file.abort()

    def _stop_threads(self) -> None:
        """Before the descriptor is closed: its number may then be another file's."""
        self._pool.shutdown()
        self._writeback.shutdown()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _tensor_bytes(tensor: "torch.Tensor", entry: Entry) -> memoryview:
    name, dtype, shape = entry
    expected = {torch_dtype(dtype)}
    if dtype == "F8_E8M0":
        import torch

        expected.add(torch.float8_e8m0fnu)
    if tensor.dtype not in expected or tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name!r}: {tensor.dtype} {tuple(tensor.shape)} comes where {dtype} {shape} was announced")
    return bytes_view(tensor.detach().cpu().contiguous())


def make_folder(path: Path) -> None:
    """Make a folder and its parents. Raises StoppedError for a full disk, OutputError otherwise."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        kind = StoppedError if error.errno in (errno.ENOSPC, errno.EDQUOT) else OutputError
        raise kind(f"{path} cannot be made: {error.strerror}. Mend that and run the same command again.") from error


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """Write a whole file, or leave what was there. Raises StoppedError for a full disk, OutputError otherwise."""
    path = Path(path)
    file = AtomicFile(path.parent, path.name, len(data))
    file.write(memoryview(data))
    file.commit()


def json_bytes(value: Any) -> bytes:
    """The bytes that `write_json_atomic` writes: UTF-8, indented, keys in their order, no NaN."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all. Raises as `write_bytes_atomic`."""
    write_bytes_atomic(path, json_bytes(value))


def sha256_file(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes. Raises OutputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}. Check that it is there and readable.") from error
