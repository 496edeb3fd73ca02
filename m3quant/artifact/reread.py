"""Reading again what earlier work read or wrote, where only that shows whether it is unchanged.

At the speed of the disk, or of THREADS cores that compute sha256 (for weights xxh3, about eight times as fast).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from ..checkpoint import Checkpoint, TensorInfo
from ..checkpoint.content import ReadDigests
from ..errors import OutputError
from ..planning.unit import Unit
from ..running.stopping import StopFlag

THREADS = 8
PIECE_BYTES = 16 * 2**20


def stored_infos(unit: Unit) -> list[TensorInfo]:
    """What the source stores of a unit's tensors, scales too."""
    return [part for t in unit.tensors for part in t.read]


def recorded_digests(checkpoint: Checkpoint, infos: Iterable[TensorInfo]) -> dict[str, str]:
    """Shard -> digest of what was read of these tensors since `record_reads`; those that nothing has read are read now."""
    digests, wanted = checkpoint.record_reads(), list(infos)
    for info in digests.missing(wanted):
        _read(checkpoint, info, digests, StopFlag())
    return _by_shard(digests, wanted)


def current_digests(checkpoint: Checkpoint, infos: Iterable[TensorInfo], stop: StopFlag) -> dict[str, str]:
    """Shard -> digest of these tensors as they are on the disk now."""
    digests, wanted = ReadDigests(), list(infos)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda info: _read(checkpoint, info, digests, stop), wanted))
    return _by_shard(digests, wanted)


def _by_shard(digests: ReadDigests, infos: Iterable[TensorInfo]) -> dict[str, str]:
    shards: dict[str, list[TensorInfo]] = {}
    for info in infos:
        shards.setdefault(info.shard, []).append(info)
    return {shard: digests.of(shards[shard]) for shard in sorted(shards)}


def _read(checkpoint: Checkpoint, info: TensorInfo, digests: ReadDigests, stop: StopFlag) -> None:
    buffer = memoryview(bytearray(min(PIECE_BYTES, info.nbytes)))
    for first in range(0, info.nbytes, PIECE_BYTES):
        stop.check()
        piece = buffer[: min(PIECE_BYTES, info.nbytes - first)]
        checkpoint.read_ranges([(info, first, piece)])
        if checkpoint.digests is not digests:
            digests.add(info, first, piece)


def other_shards(
    checkpoint: Checkpoint,
    recorded: Mapping[int, Mapping[str, str]],
    infos_of: Callable[[int], list[TensorInfo]],
    shards: Iterable[str],
    stop: StopFlag,
) -> list[str]:
    """Those of `shards` of which a unit read other bytes than they hold now. recorded: unit -> shard -> digest.

    infos_of: what a unit reads. What it reads of these shards is read again.
    """
    among, found = set(shards), set[str]()
    for index, digests in sorted(recorded.items()):
        infos = [info for info in infos_of(index) if info.shard in among]
        now = current_digests(checkpoint, infos, stop)
        found |= {shard for shard, digest in now.items() if digests.get(shard) != digest}
    return sorted(found)


def states_digest(path: Path) -> str:
    """xxh3_128 (hex) of a file. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def check_states(folder: Path, saved: Mapping[str, str], restart: Path) -> None:
    """Raise OutputError unless the hidden states that the next layer begins with are those that were saved.

    saved: file name -> `states_digest`, as journalled with the layer before; restart: what to remove to start again.
    """
    for name, expected in saved.items():
        path = folder / name
        try:
            found = states_digest(path)
        except OSError as error:
            found = error.strerror or "unreadable"
        if found != expected:
            raise OutputError(
                f"{path} is missing or holds other hidden states than were saved: the run cannot go on from its last layer; "
                f"remove {restart} and start again."
            )
