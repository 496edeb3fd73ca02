"""Links in a checkpoint's folder: none is followed but those that the Hub's own cache makes, into its blobs.

A link can lead anywhere on the machine, and what it leads to would be read, copied into an output, or published. Layout of the
cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    models--ORG--NAME/snapshots/COMMIT/FILE -> models--ORG--NAME/blobs/ETAG
    models--ORG--NAME/blobs/ETAG            a regular file, or (huggingface_hub 2.4) -> blobs/XX/XET_HASH of the whole cache
"""

import os
import re
import stat
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError, M3QuantError
from .strict_json import shown

_REPO = re.compile(r"(?:models|datasets|spaces)--.+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHARED = re.compile(r"[0-9a-f]{64}")


def cache_blob(path: Path) -> Path | None:
    """The regular file behind a link that the Hub's cache made, or None for any other link."""
    try:
        folder = path.parent.resolve(strict=True)
        step = folder / os.readlink(path)
    except OSError:
        return None
    commit = next((p for p in (folder, *folder.parents) if p.parent.name == "snapshots"), None)
    if commit is None or not _COMMIT.fullmatch(commit.name) or not _REPO.fullmatch(commit.parent.parent.name):
        return None
    repo = commit.parent.parent
    blob = Path(os.path.normpath(step))
    if blob.parent != repo / "blobs" or not _ETAG.fullmatch(blob.name):
        return None
    if blob.is_symlink():
        store = repo.parent / "blobs"
        blob = Path(os.path.normpath(blob.parent / os.readlink(blob)))
        if blob.parent.parent != store or not _SHARED.fullmatch(blob.name) or blob.parent.name != blob.name[:2]:
            return None
    return blob if is_regular(blob) else None


def is_regular(path: Path) -> bool:
    """Whether `path` itself is a regular file: no link, pipe, device or folder."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def link_refusal(path: Path) -> str:
    """The sentence about a link that is not followed."""
    try:
        target = shown(os.readlink(path))
    except OSError:
        target = "another place"
    return (
        f"{path} is a link to {target}: only regular files inside the folder are read, copied or published (and the links that the "
        f"Hub's cache makes into its blobs). Put the file itself there, or remove the link."
    )


def require_regular(root: Path, name: str, error: type[M3QuantError] = CheckpointError) -> Path:
    """The path of `name` below `root`, once no part of it is a link and it is a regular file.

    name: relative, with '/', possibly from a manifest that somebody else wrote. Raises `error` naming the file.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or not name.isprintable():
        raise error(
            f"{root} lists a file named {shown(name)}, which is no name of a file in it. Remove it from the list."
        )
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink() and cache_blob(path) is None:
            raise error(link_refusal(path))
    if not path.is_symlink() and not is_regular(path):
        reason = "is not a regular file" if path.exists() else "is missing"
        raise error(f"{path} {reason}: put the file itself there.")
    return path
