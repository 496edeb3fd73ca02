"""Which finished shards are on the Hub already, and which of those are no longer here: kept beside an output that is published
while it is converted, and for as long as it lacks shards.

    OUT/.m3quant-hub.json    the repo, and of every uploaded shard its size, its sha256 and whether it was dropped

A shard is entered once the Hub states its checksum, and marked as dropped before its file is removed: killed between the two,
the next run removes the file. Never is a shard neither here nor marked.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ..checkpoint import write_bytes_atomic
from ..checkpoint.bounded import MANIFEST_BYTES, read_bounded
from ..errors import CheckpointError, OutputError
from .records import HEX, Sealed, seal, unseal

UPLOADS = ".m3quant-hub.json"


class UploadedShard(Sealed):
    """A shard whose checksum the Hub stated. dropped: whether its file was removed here."""

    size: int = Field(gt=0)
    sha256: str = Field(pattern=HEX, min_length=64, max_length=64)
    dropped: bool = False


class Uploads(Sealed):
    """The whole of the file. shards: by file name."""

    repo: str
    shards: dict[str, UploadedShard] = Field(default_factory=dict)

    @property
    def dropped(self) -> list[str]:
        return sorted(name for name, shard in self.shards.items() if shard.dropped)


def read_uploads(output: Path) -> Uploads | None:
    """What was uploaded of this output; None if it was never published while it was converted. Raises OutputError."""
    path = output / UPLOADS
    if not path.exists():
        return None
    try:
        return unseal(read_bounded(path, MANIFEST_BYTES, error=OutputError), Uploads)
    except ValueError:
        raise OutputError(
            f"{path} is damaged, so that it is not known which shards are on the Hub alone: remove {output} and start again."
        ) from None


def write_uploads(output: Path, uploads: Uploads) -> None:
    """Raises StoppedError for a full disk."""
    write_bytes_atomic(output / UPLOADS, seal(uploads.model_dump(mode="json")) + b"\n")


def refuse_dropped(folder: str | Path) -> None:
    """Raise CheckpointError if `folder` is an output of which shards are on the Hub alone."""
    uploads = read_uploads(Path(folder).expanduser())
    if uploads is not None and (gone := uploads.dropped):
        count = f"{len(gone)} of its shards were" if len(gone) > 1 else "one of its shards was"
        raise CheckpointError(
            f"{folder} is not whole: {count} uploaded to {uploads.repo} and dropped here (--drop-uploaded, first {gone[0]}): "
            f"give {uploads.repo} in its place once it is published, or run m3quant pull {uploads.repo} FOLDER and give that folder."
        )
