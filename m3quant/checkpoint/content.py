"""What was read: a digest of every tensor's bytes, made where they are in memory anyway, and sampled blocks of a shard.

xxh3 (https://xxhash.com) and not sha256, because a source is read faster than one core makes a sha256 of it. It distinguishes one
model from another and a damaged file from a whole one; it is no proof against somebody who forges weights.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from ..errors import CheckpointError
from .header import TensorInfo
from .reader import Stamp, open_file, read_into

CHUNK_BYTES = 2**20
SAMPLED_BLOCKS = 16
BLOCK_BYTES = 4096
_MODULUS = 2**128


@dataclass
class _Tensor:
    """A tensor being read: chunk -> digest, and chunk -> bytes of it that came so far, where a piece ended within it."""

    chunks: dict[int, int] = field(default_factory=dict)
    pending: dict[int, dict[int, bytes]] = field(default_factory=dict)


class ReadDigests:
    """Digests of tensors that are read in pieces of any size, in any order, by any number of threads.

    A tensor's digest is the sum modulo 2**128 of xxh3_128 of its chunks of CHUNK_BYTES, each seeded with its number, so
    that it does not depend on the order in which they come.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, _Tensor] = {}
        self._done: dict[str, int] = {}

    def add(self, info: TensorInfo, first: int, view: memoryview) -> None:
        """`view` holds the tensor's bytes from `first` on. Raises CheckpointError if an earlier read found other bytes."""
        view = view.cast("B")
        digests: dict[int, int] = {}
        pieces: list[tuple[int, int, bytes]] = []
        position, end = first, first + view.nbytes
        while position < end:
            number = position // CHUNK_BYTES
            begin, stop = number * CHUNK_BYTES, min((number + 1) * CHUNK_BYTES, info.nbytes)
            part = view[position - first : min(stop, end) - first]
            if position == begin and end >= stop:
                digests[number] = xxhash.xxh3_128_intdigest(part, number)
            else:
                pieces.append((number, position - begin, bytes(part)))
            position += part.nbytes
        with self._lock:
            tensor = self._open.setdefault(info.name, _Tensor())
            for number, offset, data in pieces:
                _put(tensor, number, offset, data, min(CHUNK_BYTES, info.nbytes - number * CHUNK_BYTES))
            tensor.chunks |= digests
            if len(tensor.chunks) == -(-info.nbytes // CHUNK_BYTES):
                del self._open[info.name]
                digest = sum(tensor.chunks.values()) % _MODULUS
                if self._done.setdefault(info.name, digest) != digest:
                    raise CheckpointError(
                        f"{info.shard}: tensor '{info.name}' holds other bytes than when it was first read. "
                        "Leave the checkpoint alone while it is read, and start again."
                    )

    def missing(self, infos: Iterable[TensorInfo]) -> list[TensorInfo]:
        """Those that have bytes and were not read whole."""
        with self._lock:
            return [info for info in infos if info.nbytes and info.name not in self._done]

    def of(self, infos: Iterable[TensorInfo]) -> str:
        """One digest (hex) of all these tensors, which were read whole: of their names and bytes, in any order."""
        with self._lock:
            lines = [f"{info.name}\0{self._done[info.name] if info.nbytes else 0:032x}\n" for info in infos]
        return xxhash.xxh3_128_hexdigest("".join(sorted(lines)).encode("utf-8", "surrogatepass"))


def _put(tensor: _Tensor, number: int, offset: int, data: bytes, size: int) -> None:
    """Keep a piece of a chunk of `size` bytes until the whole of it is there."""
    found = tensor.pending.setdefault(number, {})
    found[offset] = data
    if sum(map(len, found.values())) == size:
        whole = b"".join(found[at] for at in sorted(found))
        tensor.chunks[number] = xxhash.xxh3_128_intdigest(whole, number)
        del tensor.pending[number]


def sampled_digest(path: Path, stamp: Stamp, header_bytes: int) -> str:
    """sha256 (hex) of up to SAMPLED_BLOCKS blocks of a shard's data, the first and the last among them, evenly spaced.

    Raises CheckpointError if the file is not the one stamped.
    """
    span = stamp.size - header_bytes
    size = min(BLOCK_BYTES, span)
    count = min(SAMPLED_BLOCKS, -(-span // BLOCK_BYTES)) if span else 0
    digest = hashlib.sha256()
    with open_file(path, stamp) as descriptor:
        for number in range(count):
            block = bytearray(size)
            offset = header_bytes + (span - size) * number // max(1, count - 1)
            read_into(descriptor, [memoryview(block)], offset, path)
            digest.update(block)
    return digest.hexdigest()


def file_stamp(path: Path) -> str:
    """What changes when a file is written, replaced or moved: a digest (hex) of inode, size, mtime and ctime.

    The same stamp means the same bytes, but for a damaged disk; another one means nothing. A digest, because it goes into
    files that are published.
    """
    status = os.stat(path)
    facts = f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def combined(digests: Mapping[str, str]) -> str:
    """One sha256 (hex) of named digests."""
    text = "".join(f"{name}\0{digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
