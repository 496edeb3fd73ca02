"""System calls that not every system has: what macOS or Windows lacks is left out where it only helps, and replaced where it is needed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def flags(*names: str) -> int:
    """The flags of os.open of these names that this system knows; on Windows O_BINARY too, without which it changes line ends."""
    found = 0
    for name in (*names, "O_BINARY"):
        found |= getattr(os, name, 0)
    return found


def read_at(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """`os.preadv`, or reads into the first buffer alone where there is none. Returns the bytes read, 0 at the end."""
    call: Callable[..., int] | None = getattr(os, "preadv", None)
    if call is not None:
        return call(descriptor, buffers, offset)
    pread: Callable[..., bytes] | None = getattr(os, "pread", None)
    if pread is None:
        os.lseek(descriptor, offset, os.SEEK_SET)
        found = os.read(descriptor, buffers[0].nbytes)
    else:
        found = pread(descriptor, buffers[0].nbytes, offset)
    buffers[0].cast("B")[: len(found)] = found
    return len(found)


def start_writeback(descriptor: int, offset: int, count: int) -> None:
    """Have the kernel write these bytes to the disk now rather than all at the sync. On Linux; elsewhere the sync does it."""
    advise: Callable[..., None] | None = getattr(os, "posix_fadvise", None)
    if advise is not None:
        # On Linux this starts to write dirty pages in the range, and drops none of those from the page cache.
        advise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def sync_names(folder: Path) -> None:
    """Make renamed and new names in `folder` survive a power cut, where folders can be opened (not on Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, flags("O_RDONLY", "O_DIRECTORY", "O_CLOEXEC"))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_locks() -> Any:
    """The module `fcntl`; None on a system without it."""
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl


def free_memory() -> int:
    """Bytes of host memory that can be had without swapping: Linux's MemAvailable, the free pages elsewhere, or half of all."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    page: int = os.sysconf("SC_PAGE_SIZE")
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * page
    except ValueError:  # macOS does not count them
        return os.sysconf("SC_PHYS_PAGES") * page // 2
