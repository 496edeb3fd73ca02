"""Bytes of a local checkpoint: headers, and tensors read straight into their own memory.

torch is imported only when a tensor is read.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .header import PREFIX_BYTES, TensorInfo, header_length
from .links import cache_blob, link_refusal
from .system import flags, read_at

if TYPE_CHECKING:
    import torch

# One preadv takes at most 1024 buffers (IOV_MAX) and 0x7ffff000 bytes on Linux; pieces of this size also let several
# threads share one large tensor.
PIECE_BYTES = 64 * 2**20
MAX_BUFFERS = 512
# One core fills fresh pages from the page cache slower than a good NVMe disk delivers; threads pay from this size on.
PARALLEL_BYTES = 4 * PIECE_BYTES
MAX_THREADS = 4

_CHANGED = "Leave the checkpoint alone while it is read, and start again."


@dataclass(frozen=True)
class Stamp:
    """What shows that a file is still the one whose header was read."""

    size: int
    mtime_ns: int


def stamp_of(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, status.st_mtime_ns)


@contextmanager
def open_file(path: Path, stamp: Stamp | None = None) -> Iterator[int]:
    """A read-only file descriptor of a regular file; of links, only the Hub cache's own are followed.

    Raises CheckpointError if the file cannot be read, is a link, or is not the one stamped.
    """
    target = path
    if path.is_symlink():
        blob = cache_blob(path)
        if blob is None:
            raise CheckpointError(link_refusal(path))
        target = blob
    # O_NOFOLLOW: also if the file is replaced by a link between the look and the opening.
    with _opened(path, target, flags("O_NOFOLLOW")) as descriptor:
        if stamp is not None and stamp_of(os.fstat(descriptor)) != stamp:
            raise CheckpointError(f"{path} has changed since the checkpoint was opened. {_CHANGED}")
        yield descriptor


@contextmanager
def open_followed(path: Path) -> Iterator[int]:
    """As `open_file` for a file that the user named, who may name a link. Raises CheckpointError."""
    with _opened(path, path, 0) as descriptor:
        yield descriptor


@contextmanager
def _opened(path: Path, target: Path, more: int) -> Iterator[int]:
    try:
        # O_NONBLOCK: opening a FIFO that someone named model.safetensors must fail below, not wait for a writer.
        descriptor = os.open(target, flags("O_RDONLY", "O_CLOEXEC", "O_NONBLOCK") | more)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path} is not a regular file. Replace it with the file itself.")
        yield descriptor
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)


def _unreadable(path: Path, error: OSError | ValueError) -> CheckpointError:
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(f"{path} cannot be read: {reason}. Check the path, its permissions and the disk.")


def read_header(path: Path) -> tuple[bytes, bytes, Stamp]:
    """The 8-byte length, the JSON header and the file's stamp. Raises CheckpointError."""
    with open_file(path) as descriptor:
        stamp = stamp_of(os.fstat(descriptor))
        first = bytearray(PREFIX_BYTES)
        prefix = bytes(first[: read_at(descriptor, [memoryview(first)], 0)])
        raw = bytearray(header_length(prefix, stamp.size, str(path)))
        read_into(descriptor, [memoryview(raw)], PREFIX_BYTES, path)
        return prefix, bytes(raw), stamp


def read_into(descriptor: int, buffers: Sequence[memoryview], offset: int, path: Path) -> None:
    """Fill at most MAX_BUFFERS buffers, one after the other, from `offset` on.

    Raises CheckpointError at an early end of the file.
    """
    pending = [buffer for buffer in buffers if buffer.nbytes]
    while pending:
        count = read_at(descriptor, pending, offset)
        if count <= 0:
            raise CheckpointError(f"{path} ended at byte {offset} while it was being read. {_CHANGED}")
        offset += count
        while pending and count >= pending[0].nbytes:
            count -= pending.pop(0).nbytes
        if count:
            pending[0] = pending[0][count:]


def torch_dtype(code: str) -> "torch.dtype":
    """The torch dtype in which a safetensors dtype is read; E8M0 scales are uint8 exponents, however labelled."""
    import torch

    return {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.uint8,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
        "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
        "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    }[code]  # fmt: skip


def bytes_view(tensor: "torch.Tensor") -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it (writable)."""
    import torch

    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_tensors(root: Path, infos: Iterable[TensorInfo], stamps: Mapping[str, Stamp]) -> dict[str, "torch.Tensor"]:
    """The tensors by name, in the order of `infos`, each in memory of its own; read shard by shard in file order.

    Raises CheckpointError if a file is not the one that was opened.
    """
    import torch

    wanted = list(infos)
    raw = {info.name: torch.empty(info.nbytes, dtype=torch.uint8) for info in wanted}
    total = sum(info.nbytes for info in wanted)
    threads = min(MAX_THREADS, os.cpu_count() or 1) if total >= PARALLEL_BYTES else 1
    with ThreadPoolExecutor(threads) as pool:
        in_order = sorted(wanted, key=lambda info: (info.shard, info.start, info.end))
        for shard, group in groupby(in_order, key=lambda info: info.shard):
            path = root / shard
            runs = list(_runs((info.start, bytes_view(raw[info.name])) for info in group))
            with open_file(path, stamps[shard]) as descriptor:

                def fill(run: tuple[int, list[memoryview]], descriptor: int = descriptor, path: Path = path) -> None:
                    read_into(descriptor, run[1], run[0], path)

                if threads == 1:
                    for run in runs:
                        fill(run)
                else:
                    pieces = [pool.submit(fill, run) for run in runs]
                    # All must have ended before the descriptor is closed, also when one fails.
                    wait(pieces)
                    for piece in pieces:
                        piece.result()
    return {info.name: raw[info.name].view(torch_dtype(info.dtype)).reshape(info.shape) for info in wanted}


def read_ranges(root: Path, ranges: Iterable[tuple[TensorInfo, int, memoryview]], stamps: Mapping[str, Stamp]) -> None:
    """Fill each buffer with the bytes of its tensor from an offset within it on; neighbours in a file are read together.

    Raises CheckpointError if a file is not the one that was opened.
    """
    in_order = sorted(ranges, key=lambda part: (part[0].shard, part[0].start + part[1]))
    for shard, group in groupby(in_order, key=lambda part: part[0].shard):
        path = root / shard
        with open_file(path, stamps[shard]) as descriptor:
            for offset, buffers in _runs((info.start + skip, view) for info, skip, view in group):
                read_into(descriptor, buffers, offset, path)


def _runs(parts: Iterable[tuple[int, memoryview]]) -> Iterator[tuple[int, list[memoryview]]]:
    """Group neighbouring byte ranges into single reads of about PIECE_BYTES, and split longer ones."""
    start, end, buffers = 0, 0, list[memoryview]()
    for offset, view in parts:
        for skip in range(0, view.nbytes, PIECE_BYTES):
            piece = view[skip : skip + PIECE_BYTES]
            full = len(buffers) == MAX_BUFFERS or end - start + piece.nbytes > PIECE_BYTES
            if buffers and (full or offset + skip != end):
                yield start, buffers
                buffers = []
            if not buffers:
                start = end = offset + skip
            buffers.append(piece)
            end += piece.nbytes
    if buffers:
        yield start, buffers


def read_raw(root: Path, info: TensorInfo, stamp: Stamp) -> bytes:
    """A tensor's bytes as they are in the file. Raises CheckpointError."""
    raw = bytearray(info.nbytes)
    path = root / info.shard
    with open_file(path, stamp) as descriptor:
        for offset, buffers in _runs([(info.start, memoryview(raw))]):
            read_into(descriptor, buffers, offset, path)
    return bytes(raw)
