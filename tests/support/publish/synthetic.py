"""Checkpoints of any config.json that nobody has to hold: every shard is a header and slices of one seeded pool of bytes.

Names, dtypes and shapes are those that `planning.headers.from_config` gives. A tensor's bytes are the pool of its kind, from an offset
that its name decides, round and round: the same for a whole file and for any range of it, on any machine. Pools hold values that a
model could have: FP8 and E2M1 codes, positive scales, norms near 1, weights near 0.02. Nothing is written; a range is handed out as
views of the pool, so that a server is as fast as its socket, and sha256 as fast as the cores.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from m3quant.checkpoint import DTYPE_BYTES, Entry, TensorInfo, aligned_order, entry_bytes, header_bytes
from m3quant.planning.headers import from_config
from tests.support.publish.hub_state import Entry as HubEntry
from tests.support.publish.hub_state import Hub, Repo

POOL_BYTES = 32 * 2**20
SHARD_BYTES = 5 * 10**9  # as releases have them
ALIGNMENT = 64
HASHED_AT_ONCE = 64 * 2**20
WEIGHT_STD = 0.02
INDEX = "model.safetensors.index.json"


class Pool:
    """Seeded bytes by kind of value. size: bytes of each kind."""

    def __init__(self, seed: int = 0, size: int = POOL_BYTES) -> None:
        self.seed, self.size = seed, size
        self._kinds: dict[str, memoryview] = {}

    def kind(self, info: TensorInfo) -> str:
        """What a tensor holds, from its name and dtype."""
        leaf = info.name.rpartition(".")[2]
        if leaf in ("weight_scale_2", "input_scale"):
            return "multiplied scale"
        if leaf in ("weight_global_scale", "input_global_scale"):
            return "divided scale"
        if "scale" in leaf:
            return f"{info.dtype} scale"
        if leaf == "weight" and len(info.shape) == 1 and info.dtype in ("BF16", "F32"):
            return f"{info.dtype} norm"
        return info.dtype

    def of(self, kind: str) -> memoryview:
        if kind not in self._kinds:
            digest = hashlib.sha256(f"{self.seed} {kind}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self._kinds[kind] = self._values(kind, generator).contiguous().view(torch.uint8).numpy().data
        return self._kinds[kind]

    def _values(self, kind: str, generator: torch.Generator) -> torch.Tensor:
        """`size` bytes of values."""

        def normal(width: int) -> torch.Tensor:
            return torch.randn(self.size // width, generator=generator)

        def uniform(width: int, low: float, high: float) -> torch.Tensor:
            return torch.rand(self.size // width, generator=generator) * (high - low) + low

        code, _, what = kind.partition(" ")
        if kind == "multiplied scale":  # of E2M1 codes up to 6 and group scales near 100
            return uniform(4, 0.5e-4, 1.5e-4)
        if kind == "divided scale":
            return 1 / uniform(4, 0.5e-4, 1.5e-4)
        if what == "scale":
            return {
                "F32": lambda: uniform(4, 0.5, 1.5) * WEIGHT_STD / 64,
                "BF16": lambda: (uniform(2, 0.5, 1.5) * WEIGHT_STD / 64).bfloat16(),
                "F8_E4M3": lambda: uniform(1, 50.0, 150.0).to(torch.float8_e4m3fn),
                "U8": lambda: uniform(1, 113.0, 117.0).to(torch.uint8),  # E8M0: near 2^-12, of FP8 codes near 64
            }[code]()
        center = 1.0 if what == "norm" else 0.0
        if code == "F32":
            return center + WEIGHT_STD * normal(4)
        if code == "BF16":
            return (center + WEIGHT_STD * normal(2)).bfloat16()
        if code == "F8_E4M3":
            return (64 * normal(1)).clamp(-448, 448).to(torch.float8_e4m3fn)
        if code == "U8":  # two E2M1 codes a byte
            return torch.randint(0, 256, (self.size,), dtype=torch.uint8, generator=generator)
        raise ValueError(f"no pool for {kind}: teach tests/support/publish/synthetic.py what such a tensor holds")


@dataclass(frozen=True)
class SyntheticShard(HubEntry):
    """A shard of the pool. starts: of every tensor in the file, after the header; bodies: its pool, the offset in it, its bytes."""

    data: bytes = b""  # the header
    lfs: bool = True
    starts: tuple[int, ...] = ()
    bodies: tuple[tuple[memoryview, int, int], ...] = ()

    @property
    def size(self) -> int:
        return self.starts[-1] + self.bodies[-1][2]

    def pieces(self, first: int, end: int) -> Iterator[memoryview]:
        if first < len(self.data):
            yield memoryview(self.data)[first:end]
        for number in range(max(0, int(np.searchsorted(self.starts, first, "right")) - 1), len(self.starts)):
            start, (pool, offset, count) = self.starts[number], self.bodies[number]
            if start >= end:
                return
            yield from _round(pool, offset, max(0, first - start), min(count, end - start))

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for piece in self.pieces(0, self.size):
            digest.update(piece)
        return self.claimed or digest.hexdigest()


def _round(pool: memoryview, offset: int, first: int, end: int) -> Iterator[memoryview]:
    """Bytes `first` to `end` of a tensor that begins in `pool` at `offset` and goes round."""
    while first < end:
        at = (offset + first) % pool.nbytes
        piece = pool[at : min(pool.nbytes, at + end - first)]
        yield piece
        first += piece.nbytes


@dataclass
class SyntheticModel:
    """The checkpoint of a config.json: shards, index and the files given beside it."""

    config: Path
    seed: int = 0
    shard_bytes: int = SHARD_BYTES
    pool_bytes: int = POOL_BYTES
    beside: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = Pool(self.seed, self.pool_bytes)
        groups = self._groups()
        names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
        self.shards = {name: self._shard(group) for name, group in zip(names, groups, strict=True)}
        weight_map = {info.name: name for name, group in zip(names, groups, strict=True) for info in group}
        total = sum(info.nbytes for group in groups for info in group)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        self.files = {"config.json": self.config.read_bytes(), INDEX: json.dumps(index).encode(), **self.beside}

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards.values())

    def _groups(self) -> list[list[TensorInfo]]:
        """The tensors of each shard, in the order of the layers: a shard ends where it is full, not where a layer does."""
        groups: list[list[TensorInfo]] = [[]]
        filled = 0
        for info in from_config(self.config).tensors.values():
            if groups[-1] and filled + info.nbytes > self.shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(info)
            filled += info.nbytes
        return groups

    def _shard(self, infos: list[TensorInfo]) -> SyntheticShard:
        kinds = {info.name: self.pool.kind(info) for info in infos}
        entries: list[Entry] = [(info.name, info.dtype, info.shape) for info in infos]
        begins = accumulate((entry_bytes(entry) for entry in entries), initial=0)
        if any(start % DTYPE_BYTES[entry[1]] for start, entry in zip(begins, entries, strict=False)):
            entries = aligned_order(entries)
        header = header_bytes(entries, {"format": "pt"})
        sizes = [entry_bytes(entry) for entry in entries]
        starts = tuple(accumulate(sizes[:-1], initial=len(header)))
        bodies = tuple(
            (self.pool.of(kinds[entry[0]]), self._offset(entry[0]), size)
            for entry, size in zip(entries, sizes, strict=True)
        )
        return SyntheticShard(header, starts=starts, bodies=bodies)

    def _offset(self, name: str) -> int:
        digest = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % (self.pool_bytes // ALIGNMENT) * ALIGNMENT

    def digest(self, threads: int) -> None:
        """Take the sha256 of every shard, several at once: the server states them."""
        with ThreadPoolExecutor(threads) as workers:
            list(workers.map(lambda shard: shard.sha256, self.shards.values()))

    def add_to(self, hub: Hub, name: str, threads: int = 1) -> Repo:
        """Put the whole checkpoint on the server."""
        self.digest(threads)
        repo = hub.add(name, dict(self.files))
        repo.commit({**repo.tree(), **self.shards}, "the shards")
        return repo

    def write(self, folder: Path) -> Path:
        """The checkpoint as files, for comparisons; small ones only."""
        folder.mkdir(parents=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        for name, shard in self.shards.items():
            with open(folder / name, "wb") as file:
                for piece in shard.pieces(0, shard.size):
                    file.write(piece)
        return folder
