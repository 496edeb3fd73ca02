"""What is read again before a conversion goes on: finished shards, saved hidden states, and source shards whose files changed.

Everything here runs at the pace of the disk, or of THREADS cores that make sha256 (xxh3 for the source) where that is less.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from ..artifact.identity import SourceIdentity, touched
from ..artifact.journal import Journal
from ..checkpoint import Checkpoint, TensorInfo, sha256_file
from ..checkpoint.content import ReadDigests
from ..errors import OutputError
from ..planning.plan import Plan, Unit
from ..running.progress import Progress
from ..running.stopping import StopFlag
from ..running.words import human_bytes

THREADS = 8
PIECE_BYTES = 16 * 2**20


def stored_infos(plan: Plan, unit: Unit) -> list[TensorInfo]:
    """What the source stores of a unit's tensors, scales too."""
    return [plan.checkpoint.tensors[name] for planned in unit.tensors for name in planned.source.names]


def unit_digest(plan: Plan, unit: Unit) -> str:
    """Digest of what was read of a unit's source tensors; those that nothing has read yet are read now."""
    digests = plan.checkpoint.record_reads()
    infos = stored_infos(plan, unit)
    for info in digests.missing(infos):
        read_again(plan.checkpoint, info, digests, StopFlag())
    return digests.of(infos)


def read_again(checkpoint: Checkpoint, info: TensorInfo, digests: ReadDigests, stop: StopFlag) -> None:
    """Read one tensor piece by piece for its digest alone."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, info.nbytes)))
    for first in range(0, info.nbytes, PIECE_BYTES):
        stop.check()
        piece = buffer[: min(PIECE_BYTES, info.nbytes - first)]
        checkpoint.read_ranges([(info, first, piece)])
        if checkpoint.digests is not digests:
            digests.add(info, first, piece)


def other_shards(plan: Plan, recorded: Mapping[int, str], shards: Iterable[str], stop: StopFlag) -> list[str]:
    """Those of the source's `shards` from which a unit was made of other bytes than they hold now. recorded: unit -> digest.

    All tensors of every such unit are read.
    """
    among, found = set(shards), set[str]()
    for index, digest in sorted(recorded.items()):
        infos = stored_infos(plan, plan.units[index])
        mine = {info.shard for info in infos} & among
        if mine and _digest(plan.checkpoint, infos, stop) != digest:
            found |= mine
    return sorted(found)


def _digest(checkpoint: Checkpoint, infos: list[TensorInfo], stop: StopFlag) -> str:
    digests = ReadDigests()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda info: read_again(checkpoint, info, digests, stop), infos))
    return digests.of(infos)


def recheck(plan: Plan, journal: Journal, now: SourceIdentity, stop: StopFlag, progress: Progress) -> None:
    """Before a conversion goes on: its records, shards and hidden states are those that were written, and its source the same.

    now: the source's identity, which differs from the journal's by stamps at most. Forgets the records of data-free shards
    that are lost or damaged, so that they are made again. Raises OutputError for calibrated ones and for another source.
    """
    _check_records(plan, journal)
    if not journal.records:
        return
    records = [journal.records[index] for index in sorted(journal.records)]
    size = sum(record["size"] for record in records)
    progress.say(f"checking {len(records)} finished shards ({human_bytes(size)}) against their sha256")
    _drop_changed(plan, journal, changed_shards(journal.output, records, stop))
    if last := next((record for record in reversed(records) if record["layer"] is not None), None):
        check_boundary(journal.folder, last["boundary"])
    assert journal.source is not None
    if moved := touched(journal.source, now):
        progress.say(
            f"files of the source were written or moved since: reading what {len(moved)} shards gave to finished ones"
        )
        read = {index: record["read"] for index, record in journal.records.items()}
        if other := other_shards(plan, read, moved, stop):
            raise OutputError(
                f"{journal.output} was begun with other settings (another source: {', '.join(other)} held other weights when "
                "finished shards were made of them): put the earlier files back and repeat the command, or choose another folder."
            )


def _check_records(plan: Plan, journal: Journal) -> None:
    """Raise OutputError for records that are not of this plan, or of calibrated layers that do not follow one another."""
    units, calibrated = plan.units, plan.recipe.calibration != "none"
    for index, record in journal.records.items():
        unit = units[index] if index < len(units) else None
        if unit is None or (record["shard"], record["size"]) != (unit.shard, unit.bytes_out):
            raise journal.damaged(
                f"holds a record of {record['shard']!r} as unit {index}, which is not of this conversion"
            )
        if record["layer"] != (unit.layer if calibrated else None):
            raise journal.damaged(f"holds a record of unit {index} as layer {record['layer']}")
    layers = [index for index in journal.records if index > 0] if calibrated else []
    if len(layers) != max(layers, default=0):
        absent = min(set(range(1, max(layers))) - set(layers))
        raise journal.damaged(f"lacks layer {absent - 1}, without which later layers cannot have been made")


def _drop_changed(plan: Plan, journal: Journal, changed: Mapping[int, str]) -> None:
    """Forget records of shards that are not what was written; calibrated layers can only go on from the last."""
    for index, why in changed.items():
        if journal.records[index]["layer"] is not None:
            raise OutputError(
                f"{journal.output / plan.units[index].shard} was finished but {why} now: calibrated layers depend on one "
                f"another, so remove {journal.output} and start again."
            )
    for index in changed:
        del journal.records[index]


def changed_shards(output: Path, records: Iterable[Mapping[str, Any]], stop: StopFlag) -> dict[int, str]:
    """Unit -> what is wrong with its finished shard, for those whose bytes are not the recorded ones."""

    def problem(record: Mapping[str, Any]) -> str | None:
        stop.check()
        path = output / record["shard"]
        if not path.is_file() or path.stat().st_size != record["size"]:
            return "is missing or has another size"
        return None if sha256_file(path) == record["sha256"] else "holds other bytes"

    looked = list(records)
    with ThreadPoolExecutor(THREADS) as pool:
        problems = list(pool.map(problem, looked))
    return {record["unit"]: why for record, why in zip(looked, problems, strict=True) if why}


def check_boundary(folder: Path, boundary: Mapping[str, str]) -> None:
    """Raise OutputError unless the hidden states that the next layer begins with are those that were saved.

    boundary: file name -> xxh3_128 (hex), as journalled with the layer before.
    """
    for name, expected in boundary.items():
        path = folder / name
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        except OSError as error:
            found = error.strerror or "unreadable"
        if found != expected:
            raise OutputError(
                f"{path} is missing or holds other hidden states than were saved: the run cannot go on from its last layer; "
                f"remove {folder.parent} and start again."
            )
