"""Which checkpoint was read, by content: what is known before a weight is read, and how two checkpoints differ.

    revision   the Hub commit that huggingface_hub recorded for all files
    files      sha256 of config.json, the index and every carried file
    shards     size, stamp (inode, size, mtime, ctime), digest of sampled blocks, and the Hub's sha256 where it is recorded

What cannot be known without reading everything is recorded as it is read, one digest per unit (`Journal.finish_unit`,
`manifest.source.read`). A stamp that differs says nothing by itself: then the units that were made from that shard are
read again and their digests compared (`reread.other_shards`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ..checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, sha256_file
from ..checkpoint.content import combined
from ..checkpoint.origin import known_sha256, origin_of

SOURCE = "source"  # the label of what a conversion reads


class _Identity(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardIdentity(_Identity):
    """One shard of a source. known_sha256: as the Hub sent it, where that is recorded and the file is no newer."""

    size: int = Field(ge=0)
    stamp: str
    sampled: str
    known_sha256: str | None = None


class SourceIdentity(_Identity):
    """A source as it is now. files: name -> sha256."""

    revision: str | None
    files: dict[str, str]
    shards: dict[str, ShardIdentity]


def identify(checkpoint: Checkpoint, carried: Iterable[str] = ()) -> SourceIdentity:
    """The identity of a local checkpoint: files are hashed, of shards a few blocks are read. Raises CheckpointError.

    carried: names of the files beside config.json, index and shards that count.
    """
    root = Path(checkpoint.root)
    files = {CONFIG_NAME: sha256(checkpoint.config_text).hexdigest()}
    if checkpoint.index_text is not None:
        files[INDEX_NAME] = sha256(checkpoint.index_text).hexdigest()
    files |= {name: sha256_file(root / name) for name in carried}
    sampled, stamps = checkpoint.sampled(), checkpoint.file_stamps()
    return SourceIdentity(
        revision=origin_of(root, [*checkpoint.shards, *files]).revision,
        files=files,
        shards={
            name: ShardIdentity(
                size=shard.size, stamp=stamps[name], sampled=sampled[name], known_sha256=known_sha256(root, name)
            )
            for name, shard in checkpoint.shards.items()
        },
    )


def sampled_identity(checkpoint: Checkpoint) -> str:
    """One digest of the sampled blocks of all shards: what another process that opens the same checkpoint must find."""
    return combined(checkpoint.sampled())


def differences(then: SourceIdentity, now: SourceIdentity, finished: bool = False) -> Iterator[str]:
    """What tells that two identities are of different sources, by name; stamps alone tell nothing.

    finished: the output is complete, so that a file that has come since would be missing from it.
    """
    if then.revision and now.revision and then.revision != now.revision:
        yield f"its revision was {then.revision}, now {now.revision}"
    for name, digest in then.files.items():
        if name not in now.files:
            yield f"{name} is gone"
        elif now.files[name] != digest:
            yield f"{name} has changed"
    if finished:
        yield from (f"{name} is new" for name in now.files if name not in then.files)
    for name, shard in then.shards.items():
        other = now.shards.get(name)
        if other is None:
            yield f"{name} is gone"
        elif other.size != shard.size:
            yield f"{name} had {shard.size} bytes, now {other.size}"
        elif shard.sampled != other.sampled or _known_to_differ(shard, other):
            yield f"{name} holds other weights"
    yield from (f"{name} is new" for name in now.shards if name not in then.shards)


def _known_to_differ(one: ShardIdentity, other: ShardIdentity) -> bool:
    return None not in (one.known_sha256, other.known_sha256) and one.known_sha256 != other.known_sha256


def touched(then: SourceIdentity, now: SourceIdentity) -> list[str]:
    """Shards whose file was written, replaced or moved since, so that only reading it tells whether it is the same."""
    return [name for name, shard in then.shards.items() if now.shards[name].stamp != shard.stamp]
