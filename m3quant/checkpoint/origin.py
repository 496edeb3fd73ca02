"""Where a local checkpoint was downloaded from, as huggingface_hub itself recorded it. Nothing is guessed.

`hf download --local-dir` leaves, per file, .cache/huggingface/download/NAME.metadata: commit, etag and time, one a line. A
file of the Hub's cache is in models--ORG--NAME/snapshots/COMMIT/. https://huggingface.co/docs/huggingface_hub/guides/download
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError
from .bounded import read_text

RECORD_BYTES = 4096
_SHA256 = re.compile(r"[0-9a-f]{64}")
METADATA_FOLDER = Path(".cache/huggingface/download")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHED = re.compile(r"models--(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)")


@dataclass(frozen=True)
class Origin:
    """repo: "org/name", known only of a folder of the Hub's cache; revision: the commit of all files asked about, or None.

    etags: name -> etag of every file with a record. A git blob's sha1 for small files, the sha256 for large ones.
    """

    repo: str | None = None
    revision: str | None = None
    etags: Mapping[str, str] = field(default_factory=dict)


def origin_of(root: Path, names: Iterable[str]) -> Origin:
    """The origin of `names` in `root`. The revision is None unless every one of them is recorded with the same commit."""
    snapshot = root.resolve()
    cached = _CACHED.fullmatch(snapshot.parent.parent.name)
    if cached and snapshot.parent.name == "snapshots" and _COMMIT.fullmatch(snapshot.name):
        return Origin(f"{cached['org']}/{cached['name']}", snapshot.name)
    commits: set[str | None] = set()
    etags = {}
    for name in names:
        commit, etag = _record(root / METADATA_FOLDER / f"{name}.metadata")
        commits.add(commit)
        if etag:
            etags[name] = etag
    return Origin(None, commits.pop() if len(commits) == 1 else None, etags)


def known_sha256(root: Path, name: str) -> str | None:
    """The sha256 (hex) with which the Hub sent a file that has not been written since; None where that is not recorded.

    A file of the Hub's cache links to a blob of that name. Of another the metadata states etag and time of the download,
    and huggingface_hub itself takes the record for void once the file is newer (`read_download_metadata`).
    """
    path = root / name
    if path.is_symlink():
        blob = Path(os.readlink(path))
        return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None
    metadata = root / METADATA_FOLDER / f"{name}.metadata"
    etag = _record(metadata)[1]
    if etag is None or not _SHA256.fullmatch(etag):
        return None
    try:
        downloaded = float(read_text(metadata, RECORD_BYTES).splitlines()[2])
    except (CheckpointError, ValueError):
        return None
    return etag if path.stat().st_mtime - 1 <= downloaded else None


def _record(path: Path) -> tuple[str | None, str | None]:
    """(commit, etag) of a metadata file; (None, None) where there is none or it is not one."""
    try:
        lines = read_text(path, RECORD_BYTES).splitlines()
    except CheckpointError:
        return None, None
    if len(lines) < 3 or not _COMMIT.fullmatch(lines[0]):
        return None, None
    return lines[0], lines[1].strip('"')
