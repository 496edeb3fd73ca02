"""A text file that a command writes besides its output: checked before the work, and written with one sentence where it fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ..errors import OutputError, StoppedError


def check_file(path: Path) -> None:
    """Raise OutputError for a file that could not be written once the work is done."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{path} cannot be written: name a file in a folder that exists and is yours to write in.")


def write_file(path: Path, text: str) -> None:
    """Raises StoppedError for a full disk, OutputError for anything else."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoppedError(f"{path} cannot be written: {error.strerror}. Free space and run it again.") from None
        raise OutputError(
            f"{path} cannot be written ({error.strerror}): name a file in a folder that exists and is yours to write in."
        ) from None
