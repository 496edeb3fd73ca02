"""The identity of a checkpoint by content: what is known before a weight is read, and how two checkpoints differ.

    revision   the Hub commit that huggingface_hub recorded for all files
    files      sha256 of config.json, the index and every carried file
    shards     size, stamp (inode, size, mtime, ctime), digest of sampled blocks, and the Hub's sha256 where it is recorded

Of a checkpoint that is read from the Hub the repo, its commit and the Hub's checksums are known, and no block is sampled: a
shard's stamp is its checksum, which each file is compared with when it comes. In an object store a shard's stamp is what the
store says of its content (`object_drivers.Driver.mark`).

What cannot be known without reading everything is recorded as it is read, one digest per unit (`Journal.finish_unit`,
`manifest.source.read`). A stamp that differs decides nothing by itself: then the units that were made from that shard are
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
from ..checkpoint.remote import RemoteStore

SOURCE = "source"  # the label of what a conversion reads


class _Identity(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardIdentity(_Identity):
    """One shard of a source. known_sha256: as the Hub sent it, where that is recorded and the file is no newer.
    sampled: None of a shard that is not on this machine."""

    size: int = Field(ge=0)
    stamp: str
    sampled: str | None
    known_sha256: str | None = None


class SourceIdentity(_Identity):
    """A source as it is now. files: name -> sha256 (of a large one in an object store, its mark). Of one on the Hub its repo, and the branch, tag or commit that was asked for as `ref`
    (None: the default branch)."""

    repo: str | None = None
    ref: str | None = None
    revision: str | None
    files: dict[str, str]
    shards: dict[str, ShardIdentity]


def identify(checkpoint: Checkpoint, carried: Iterable[str] = ()) -> SourceIdentity:
    """The identity of a checkpoint: files are hashed, of local shards a few blocks are read. Raises CheckpointError.

    carried: names of the files that count, other than config.json, index and shards.
    """
    files = {CONFIG_NAME: sha256(checkpoint.config_text).hexdigest()}
    if checkpoint.index_text is not None:
        files[INDEX_NAME] = sha256(checkpoint.index_text).hexdigest()
    if checkpoint.remote is not None:
        return _elsewhere(checkpoint, checkpoint.remote, files, list(carried))
    root = Path(checkpoint.root)
    files |= {name: sha256_file(root / name) for name in carried}
    sampled, stamps = checkpoint.sampled(), checkpoint.file_stamps()
    return SourceIdentity(
        repo=None,
        ref=None,
        revision=origin_of(root, [*checkpoint.shards, *files]).revision,
        files=files,
        shards={
            name: ShardIdentity(
                size=shard.size, stamp=stamps[name], sampled=sampled[name], known_sha256=known_sha256(root, name)
            )
            for name, shard in checkpoint.shards.items()
        },
    )


def _elsewhere(checkpoint: Checkpoint, store: RemoteStore, files: dict[str, str], carried: list[str]) -> SourceIdentity:
    small = [name for name in carried if store.is_small(name)]
    folder = checkpoint.files(small)
    files |= {
        name: sha256_file(folder / name) if name in small else store.sha256(name) or store.marks[name]
        for name in carried
    }
    return SourceIdentity(
        repo=store.repo,
        ref=store.ref,
        revision=store.revision,
        files=files,
        shards={
            name: ShardIdentity(size=shard.size, stamp=store.marks[name], sampled=None, known_sha256=store.sha256(name))
            for name, shard in checkpoint.shards.items()
        },
    )


def sampled_identity(checkpoint: Checkpoint) -> str:
    """One digest of the sampled blocks of all shards, or of what the store says of them: what another process that opens the same
    checkpoint must find."""
    if (store := checkpoint.remote) is not None:
        return combined({name: store.marks[name] for name in checkpoint.shards})
    return combined(checkpoint.sampled())


def differences(then: SourceIdentity, now: SourceIdentity, finished: bool = False) -> Iterator[str]:
    """The differences that show that two identities are of different sources, by name; stamps alone show nothing.

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
        elif _differ(shard.sampled, other.sampled) or _differ(shard.known_sha256, other.known_sha256):
            yield f"{name} holds other weights"
    yield from (f"{name} is new" for name in now.shards if name not in then.shards)


def _differ(one: str | None, other: str | None) -> bool:
    return None not in (one, other) and one != other


def touched(then: SourceIdentity, now: SourceIdentity) -> list[str]:
    """Shards whose file was written, replaced or moved since, so that only reading it shows whether it is the same.

    Between a folder and the Hub or an object store, those whose checksum the folder does not know.
    """
    moved = then.repo != now.repo

    def same(shard: ShardIdentity, other: ShardIdentity) -> bool:
        return shard.stamp == other.stamp or (
            moved and shard.known_sha256 is not None and shard.known_sha256 == other.known_sha256
        )

    return [name for name, shard in then.shards.items() if not same(shard, now.shards[name])]
