"""A checkpoint, known from its config, its index and its shards' headers alone; tensors are read on demand."""

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from ..errors import CheckpointError, DamagedOutput
from .bounded import CONFIG_BYTES, INDEX_BYTES, TEXT_BYTES, read_bounded
from .content import ReadDigests, file_stamp, sampled_digest
from .copying import Copied, copy_file
from .header import PREFIX_BYTES, Header, TensorInfo, parse_header
from .index import INDEX_NAME, Index, check_numbering, check_shard_files, check_tensors, parse_index
from .listing import CONFIG_NAME, Listing, list_folder
from .reader import PARALLEL_BYTES, Stamp, bytes_view, read_header, read_ranges, read_raw, read_tensors
from .strict_json import parse_object, shown

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping

    import torch

    from .remote import RemoteStore

Range: TypeAlias = tuple[TensorInfo, int, memoryview]
"""A buffer to be filled with a tensor's bytes, from an offset within it on."""

SAMPLES_AT_ONCE = 8
DIGEST_THREADS = 4
# What `m3quant.artifact` writes into a finished output, and its folder of the state of one under way.
FINISHED, UNDER_WAY = "m3quant.json", ".m3quant"
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Shard:
    """One safetensors file. size: of the whole file; header_bytes: of everything before the first tensor's bytes."""

    name: str
    size: int
    header_bytes: int
    header_sha256: str
    metadata: dict[str, str]


class Store(Protocol):
    """The place of a checkpoint's files: a local folder, or elsewhere (`remote.RemoteStore`)."""

    where: str

    def listing(self) -> Listing: ...

    def file(self, name: str, limit: int) -> bytes:
        """The content of a file of at most `limit` bytes; a larger one is refused before it is read."""
        ...

    def file_size(self, name: str) -> int: ...

    def headers(self, names: list[str]) -> dict[str, tuple[bytes, bytes, int]]:
        """Per shard: the 8-byte length, the JSON header, the file's size."""
        ...

    def path(self, name: str) -> str:
        """How a file is named in messages."""
        ...

    def files(self, names: "Iterable[str]") -> Path:
        """The folder in which these small files lie."""
        ...

    def copy_file(self, name: str, target: Path) -> Copied: ...

    def opened(
        self, shards: "Iterable[str]", action: str
    ) -> "AbstractContextManager[tuple[Path, Mapping[str, Stamp]]]":
        """The folder in which these shards lie, whole, and the stamps of their files. action: what they are read for, in a refusal."""
        ...

    def peek(self, ranges: "Iterable[Range]") -> None:
        """Fill each buffer from its tensor's bytes, of shards that may lie elsewhere."""
        ...


class LocalStore:
    """A checkpoint in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.where = str(root)
        self.stamps: dict[str, Stamp] = {}

    def listing(self) -> Listing:
        return list_folder(self.root)

    def file(self, name: str, limit: int) -> bytes:
        return read_bounded(self.root / name, limit)

    def file_size(self, name: str) -> int:
        return (self.root / name).stat().st_size

    def headers(self, names: list[str]) -> dict[str, tuple[bytes, bytes, int]]:
        found = {}
        for name in names:
            prefix, raw, self.stamps[name] = read_header(self.root / name)
            found[name] = (prefix, raw, self.stamps[name].size)
        return found

    def path(self, name: str) -> str:
        return str(self.root / name)

    def files(self, names: "Iterable[str]") -> Path:
        return self.root

    def copy_file(self, name: str, target: Path) -> Copied:
        return copy_file(self.root / name, target)

    def opened(
        self, shards: "Iterable[str]", action: str
    ) -> "AbstractContextManager[tuple[Path, Mapping[str, Stamp]]]":
        return nullcontext((self.root, self.stamps))

    def peek(self, ranges: "Iterable[Range]") -> None:
        read_ranges(self.root, ranges, self.stamps)


class Checkpoint:
    """A safetensors checkpoint. Make one with `Checkpoint.open`.

    root: the folder or repo id as text; config: config.json parsed, config_text: its bytes;
    tensors: by name, ordered by shard and offset; shards: by file name; index_text: bytes of the index file, or None;
    other_files: relative names of the files to carry over (all but shards, index and config.json);
    skipped_files: name -> why it is not carried over; warnings: oddities that do no harm;
    revision: the Hub commit that was read, or None; digests: of what was read, once `record_reads` was called.
    """

    digests: ReadDigests | None = None
    renamed: str = ""  # what `rename` did, as a note

    def __init__(self, store: Store, revision: str | None = None) -> None:
        """Read and check everything except the weights. Raises CheckpointError."""
        self._store = store
        self.root = store.where
        self.revision = revision
        listing = store.listing()
        self.other_files = listing.other
        self.skipped_files = listing.skipped
        if not listing.has_config:
            raise CheckpointError(
                f"{self.root} has no {CONFIG_NAME}, so it is no checkpoint or an incomplete one. "
                f"Give the folder that holds {CONFIG_NAME} and the *.safetensors files."
            )
        self.config_text = store.file(CONFIG_NAME, CONFIG_BYTES)
        self.config: dict[str, Any] = parse_object(
            self.config_text, store.path(CONFIG_NAME), "Copy or download it again.", constants=True
        )
        self.index_text: bytes | None = store.file(INDEX_NAME, INDEX_BYTES) if listing.has_index else None
        if not listing.shards and self.index_text is None:
            raise CheckpointError(
                f"{self.root} holds no *.safetensors file. Give a checkpoint in the safetensors format."
            )
        index: Index | None = None
        if self.index_text is not None:
            index = parse_index(self.index_text, store.path(INDEX_NAME))
            check_shard_files(index, listing.shards, self.root, store.path(INDEX_NAME))
        else:
            check_numbering(listing.shards, self.root)

        self.shards: dict[str, Shard] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, (prefix, raw, size) in store.headers(listing.shards).items():
            header = parse_header(raw, size, name, store.path(name))
            digest = hashlib.sha256(prefix + raw).hexdigest()
            self.shards[name] = Shard(name, size, PREFIX_BYTES + len(raw), digest, header.metadata)
            self._add(header)
        self.warnings: list[str] = []
        if index is not None:
            self.warnings = check_tensors(index, self.tensors, self.root, store.path(INDEX_NAME))
        if not self.tensors:
            raise CheckpointError(f"The shards of {self.root} hold no tensor. Give a checkpoint with weights.")

    def _add(self, header: Header) -> None:
        for info in header.tensors:
            other = self.tensors.get(info.name)
            if other is not None:
                raise CheckpointError(
                    f"{self.root}: tensor {shown(info.name)} is in two shards, {other.shard} and {info.shard}. "
                    f"Move the shard that does not belong to this checkpoint out of the folder."
                )
            self.tensors[info.name] = info

    @classmethod
    def open(cls, path_or_repo: str | Path, revision: str | None = None) -> "Checkpoint":
        """Open a local folder, or header-only a Hub repo "org/name" or "org/name@revision", or a prefix of an object store, "s3://...".

        A folder of that name takes precedence over a repo. Raises CheckpointError; DamagedOutput for a finished output of m3quant;
        PackageMissing without the object store's driver.
        """
        text = str(path_or_repo)
        if "://" in text:
            from .object_store import ObjectStore

            if revision is not None:
                raise CheckpointError(
                    f"{text} is in an object store, which has no revision {revision!r}. Leave it out."
                )
            return cls(ObjectStore(text))
        path = Path(path_or_repo).expanduser()
        if path.is_dir():
            if revision is not None:
                raise CheckpointError(f"{path} is a local folder, which has no revision {revision!r}. Leave it out.")
            try:
                return cls(LocalStore(path))
            except CheckpointError as error:
                if (path / FINISHED).is_file() and not (path / UNDER_WAY).exists():
                    raise DamagedOutput(str(error)) from None
                raise
        if path.exists():
            raise CheckpointError(f"{path} is a file. Give the folder with config.json and the *.safetensors files.")
        repo, at, inline = text.partition("@")
        if isinstance(path_or_repo, Path) or not REPO_ID.fullmatch(repo) or (at and not inline):
            raise CheckpointError(
                f"There is no folder {text}. Give a folder, a Hub repo as org/name or org/name@revision, or s3://BUCKET/PREFIX or gs://BUCKET/PREFIX."
            )
        if inline and revision is not None and inline != revision:
            raise CheckpointError(f"Two revisions are given, {inline!r} and {revision!r}. Give one.")
        from .hub import HubStore

        store = HubStore(repo, inline or revision)
        return cls(store, revision=store.revision)

    def rename(self, names: Mapping[str, str]) -> None:
        """From here on, call tensors by other names: stored name -> name, one to one. The files stay as they are."""
        self.tensors = {(new := names.get(name, name)): replace(info, name=new) for name, info in self.tensors.items()}
        stored, name = next(iter(names.items()))
        self.renamed = (
            f"{len(names)} tensors have names of another tree than the release's, such as '{stored}': they are read as the release's "
            f"('{name}'), and outputs have these"
        )
        self.warnings.append(self.renamed)

    @property
    def local(self) -> bool:
        """True if its files lie in a folder."""
        return isinstance(self._store, LocalStore)

    @property
    def remote(self) -> "RemoteStore | None":
        """The Hub repo or object store, where tensors can be read while a cache is attached to it (`shard_cache`); None of a folder."""
        from .remote import RemoteStore

        store = getattr(self, "_store", None)  # one of headers alone has none
        return store if isinstance(store, RemoteStore) else None

    @property
    def pinned(self) -> str:
        """What opens just this again: the folder, the repo with its commit, or the prefix."""
        return self.remote.pinned if self.remote else self.root

    @property
    def name(self) -> str:
        """The folder's name, the repo's without its organization, or the last part of the prefix."""
        return self.remote.name if self.remote else Path(self.root).resolve().name

    def files(self, names: "Iterable[str] | None" = None) -> Path:
        """The folder in which config.json and these of other_files lie; of one elsewhere they are downloaded.

        names: small ones (`RemoteStore.is_small`); None: all of those. Raises CheckpointError.
        """
        if names is None:
            names = [name for name in self.other_files if self.remote is None or self.remote.is_small(name)]
        return self._store.files({CONFIG_NAME, *names})

    def fetched_into(self, folder: Path) -> "Checkpoint":
        """The same checkpoint for another process, which reads shards that this one holds in `folder`. Nothing of the store goes with it."""
        from .fetched import FetchedShards

        other = copy.copy(self)
        # Of a store's methods it has those that read weights: settings and texts are the other process's business.
        other._store = cast(Store, FetchedShards(self.root, folder, self.shard_sizes))
        other.digests = None
        return other

    def finish_step(self, key: "Hashable") -> None:
        """A step of the work (`planning.streaming`) is done: of a checkpoint elsewhere, shards that nothing reads any more leave the disk."""
        if self.remote and self.remote.cache:
            self.remote.cache.finish(key)

    def abandon(self) -> None:
        """The work ends with an error: nobody waits for shards from elsewhere any more."""
        if self.remote and self.remote.cache:
            self.remote.cache.abandon()

    @contextmanager
    def abandoned_on_error(self) -> "Iterator[None]":
        """Around work whose readers run ahead on threads that it waits for: with its error, the room that they wait for never comes."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise

    @property
    def shard_sizes(self) -> dict[str, int]:
        """Shard -> bytes of the file."""
        return {name: shard.size for name, shard in self.shards.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def _fingerprint(self) -> str:
        facts = {
            "config": hashlib.sha256(self.config_text).hexdigest(),
            "index": None if self.index_text is None else hashlib.sha256(self.index_text).hexdigest(),
            "shards": [[shard.name, shard.size, shard.header_sha256] for shard in self.shards.values()],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def fingerprint(self) -> str:
        """sha256 (hex) over config.json, the index, all headers and shard sizes; the same for a folder and its repo."""
        return self._fingerprint

    def read(self, name: str) -> "torch.Tensor":
        """One tensor in its stored dtype, on the CPU (E8M0 as uint8). Raises CheckpointError."""
        return self.read_many([name])[name]

    def read_many(self, names: "Iterable[str]") -> dict[str, "torch.Tensor"]:
        """Tensors by name, in the order asked; each shard is read once, in file order. Raises CheckpointError."""
        infos = [self._info(name) for name in dict.fromkeys(names)]
        with self._store.opened({info.shard for info in infos}, "read") as (root, stamps):
            tensors = read_tensors(root, infos, stamps)
        if (digests := self.digests) is not None:
            threads = DIGEST_THREADS if sum(info.nbytes for info in infos) >= PARALLEL_BYTES else 1
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda info: digests.add(info, 0, bytes_view(tensors[info.name])), infos))
        return tensors

    def read_ranges(self, ranges: "Iterable[Range]") -> None:
        """Fill each buffer from its tensor's bytes, beginning at an offset within them. Raises CheckpointError."""
        wanted = list(ranges)
        with self._store.opened({info.shard for info, _, _ in wanted}, "read") as (root, stamps):
            read_ranges(root, wanted, stamps)
        if self.digests is not None:
            for info, first, view in wanted:
                self.digests.add(info, first, view)

    def peek(self, ranges: "Iterable[Range]") -> None:
        """As `read_ranges`, for inspection only: it enters no digest. Raises CheckpointError."""
        self._store.peek(ranges)

    def read_bytes(self, name: str) -> bytes:
        """A tensor's bytes as they are in the file. Raises CheckpointError."""
        info = self._info(name)
        with self._store.opened([info.shard], "read") as (root, stamps):
            return read_raw(root, info, stamps[info.shard])

    def record_reads(self) -> ReadDigests:
        """From here on, keep a digest of every tensor that `read_many` and `read_ranges` read."""
        if self.digests is None:
            self.digests = ReadDigests()
        return self.digests

    def sampled(self) -> dict[str, str]:
        """Shard -> digest of some blocks of its data (`content.sampled_digest`). Raises CheckpointError."""
        store = self._local_store("sample")

        def digest(shard: Shard) -> str:
            return sampled_digest(store.root / shard.name, store.stamps[shard.name], shard.header_bytes)

        with ThreadPoolExecutor(SAMPLES_AT_ONCE) as pool:
            return dict(zip(self.shards, pool.map(digest, self.shards.values()), strict=True))

    def file_stamps(self) -> dict[str, str]:
        """Shard -> what changes when its file is written, replaced or moved (`content.file_stamp`)."""
        store = self._local_store("stat")
        return {name: file_stamp(store.root / name) for name in self.shards}

    def file_bytes(self, name: str, limit: int = TEXT_BYTES) -> bytes:
        """A small one of other_files, config.json or the index; of a checkpoint elsewhere it is downloaded.

        Raises CheckpointError, also for more than `limit` bytes.
        """
        if name == CONFIG_NAME:
            return self.config_text
        if name == INDEX_NAME and self.index_text is not None:
            return self.index_text
        self._check_other(name)
        return self._store.file(name, limit)

    def copy_file(self, name: str, target: Path) -> Copied:
        """Copy one of other_files to `target` in pieces, whole or not at all. Raises CheckpointError or as ShardWriter."""
        self._check_other(name)
        return self._store.copy_file(name, target)

    def _check_other(self, name: str) -> None:
        if name not in self.other_files:
            raise CheckpointError(f"{self.root} has no file {shown(name)} to carry over; it has: {self.other_files}.")

    def file_size(self, name: str) -> int:
        """Bytes of one of other_files, without reading it."""
        return self._store.file_size(name)

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.root} has no tensor {shown(name)}. Check the name, and that no shard is missing."
            )
        return info

    def _local_store(self, action: str) -> LocalStore:
        if not isinstance(self._store, LocalStore):
            assert self.remote is not None
            raise CheckpointError(self.remote.headers_only(action))
        return self._store

    def __repr__(self) -> str:
        return f"Checkpoint({self.root!r}, {len(self.tensors)} tensors, {len(self.shards)} shards, {self.nbytes} bytes)"
