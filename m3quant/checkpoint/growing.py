"""The sha256 of a file that is still being downloaded: taken while it grows, so that nobody waits for it afterwards.

Comparing a shard of 5 GB takes some seconds, in which its room on a small disk serves nobody.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from .system import file_locks, flags, read_at

PIECE_BYTES = 8 * 2**20
DESCRIPTORS = Path("/proc/self/fd")


class GrowingDigest:
    """Of the one file that this process writes below `folder` while the `with` runs. It needs /proc, and gives None without it.

    A library opens the file, under a name of its own, and maybe a lock: the file is found among the open descriptors once it has bytes.
    Each byte is hashed once, where it first lies. What is written anywhere but at the end gives no digest: `came` is told less than nothing, or more
    bytes in all than the file has, or the file is longer than what was told (Xet and whoever writes pieces in any order, or makes room first).
    Who finds the digest to be another than it should be hashes the file: no library promises how it writes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = os.path.realpath(folder)
        self._told = 0
        self._grows = True  # only at its end
        self._over = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._descriptor = -1
        self._hash, self._count = hashlib.sha256(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._grows = False
        self._end()
        with self._changed:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def came(self, count: int) -> None:
        """So many bytes are about to be written. From any thread."""
        with self._changed:
            if count < 0 or self._over:
                self._grows = False
            elif self._grows and self._descriptor < 0 and self._told:
                self._begin()
            if self._descriptor >= 0 and os.fstat(self._descriptor).st_size > self._told:
                self._grows = False
            self._told += count
            self._changed.notify()

    def _begin(self) -> None:
        self._descriptor = _written_below(self._folder)
        if self._descriptor >= 0:
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()

    def digest(self, path: Path) -> str | None:
        """The sha256 (hex) of the file, now whole and at `path`; None if it is not what was read as it grew."""
        self._end()
        if self._descriptor < 0 or not self._grows:
            return None
        ours, found = os.fstat(self._descriptor), os.stat(path)
        same = (ours.st_dev, ours.st_ino) == (found.st_dev, found.st_ino)
        whole = found.st_size == self._count == self._told
        return self._hash.hexdigest() if same and whole else None

    def _end(self) -> None:
        """Read what is left, unless nobody wants it."""
        with self._changed:
            self._over = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        piece = memoryview(bytearray(PIECE_BYTES))
        while self._grows:
            with self._changed:
                over, told = self._over, self._told
            try:
                got = read_at(self._descriptor, [piece], self._count)
            except OSError:  # whoever reads the whole file meets it again, and says so
                self._grows = False
                return
            if got:
                self._hash.update(piece[:got])
                self._count += got
            elif over:
                return
            else:
                with self._changed:
                    while self._told == told and not self._over:
                        self._changed.wait()


def _written_below(folder: str) -> int:
    """A descriptor of its own, for reading, of the one file with bytes below `folder` that this process writes; -1 if there is not just one."""
    found: list[int] = []
    for link in DESCRIPTORS.iterdir() if DESCRIPTORS.is_dir() else ():
        try:
            if os.readlink(link).startswith(folder + os.sep) and _is_written(int(link.name)):
                found.append(os.open(link, flags("O_RDONLY", "O_CLOEXEC")))
        except OSError:
            continue  # it was closed while we looked, or may not be read
    if len(found) == 1:
        return found[0]
    for descriptor in found:
        os.close(descriptor)
    return -1


def _is_written(descriptor: int) -> bool:
    fcntl = file_locks()  # where there is /proc there is fcntl
    facts, how = os.fstat(descriptor), fcntl.fcntl(descriptor, fcntl.F_GETFL)
    return how & os.O_ACCMODE != os.O_RDONLY and stat.S_ISREG(facts.st_mode) and facts.st_size > 0
