"""This process as another system would have it: what Python's os and its modules lack there is taken away.

O_NONBLOCK, `sysconf` and `resource` stay: the Linux halves of filelock and psutil, which are loaded here, need them.
"""

import os
import sys

LACKS = {
    "macos": ("posix_fadvise", "POSIX_FADV_DONTNEED", "sched_getaffinity", "copy_file_range", "memfd_create"),
    "windows": (
        "posix_fadvise", "POSIX_FADV_DONTNEED", "sched_getaffinity", "copy_file_range", "memfd_create", "preadv", "pwritev", "pread", "pwrite",
        "fork", "killpg", "getuid", "geteuid", "O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY",
    ),
}  # fmt: skip
MODULES = {"macos": (), "windows": ("fcntl", "pwd", "grp", "termios")}


def become(system: str) -> None:
    for name in LACKS[system]:
        if hasattr(os, name):
            delattr(os, name)
    for name in MODULES[system]:
        sys.modules[name] = None  # type: ignore[assignment]
