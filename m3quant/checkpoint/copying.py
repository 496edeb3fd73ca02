"""Files next to the weights, copied and hashed in pieces: a 3 GB notes.txt takes a few megabytes of memory."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .reader import open_file
from .writer import AtomicFile

PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Copied:
    """What was copied. sha256: hex, of the bytes; git_sha1: hex, of the bytes as git's blob (the Hub's etag of a small file)."""

    size: int
    sha256: str
    git_sha1: str

    def has_etag(self, etag: str) -> bool:
        """Whether these are the bytes of the file that the Hub gave this etag."""
        return etag in (self.git_sha1, self.sha256)


class _Digests:
    def __init__(self, size: int) -> None:
        self.size = 0
        self.sha256 = hashlib.sha256()
        self.sha1 = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    def update(self, piece: memoryview) -> None:
        self.size += piece.nbytes
        self.sha256.update(piece)
        self.sha1.update(piece)

    def result(self) -> Copied:
        return Copied(self.size, self.sha256.hexdigest(), self.sha1.hexdigest())


def copy_file(source: Path, target: Path) -> Copied:
    """Copy `source` to `target`, whole or not at all.

    Raises CheckpointError for a source that cannot be read or grows or shrinks meanwhile, StoppedError or OutputError as
    `ShardWriter` for the target.
    """
    with open_file(source) as descriptor:
        size = os.fstat(descriptor).st_size
        file = AtomicFile(target.parent, target.name, size)
        try:
            digests = _read(descriptor, size, source, file)
        except BaseException:
            file.abort()
            raise
        file.commit()
    return digests.result()


def hash_file(path: Path) -> Copied:
    """Size and both hashes of a file, read in pieces. Raises CheckpointError."""
    with open_file(path) as descriptor:
        return _read(descriptor, os.fstat(descriptor).st_size, path, None).result()


def _read(descriptor: int, size: int, source: Path, file: AtomicFile | None) -> _Digests:
    digests = _Digests(size)
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(size, 1))))
    while count := os.readv(descriptor, [buffer]):
        if digests.size + count > size:
            break
        digests.update(buffer[:count])
        if file is not None:
            file.write(buffer[:count])
    if count or digests.size != size:
        raise CheckpointError(f"{source} changed while it was read. Leave it alone and start again.")
    return digests
