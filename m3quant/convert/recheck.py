"""What is read again before a conversion continues: finished shards, saved hidden states, source shards whose files changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..artifact.identity import SOURCE, SourceIdentity, touched
from ..artifact.journal import Journal
from ..artifact.reread import THREADS, check_states, other_shards, stored_infos
from ..checkpoint import Checkpoint, sha256_file
from ..errors import OutputError
from ..planning.plan import Plan
from ..running import steps
from ..running.progress import Progress
from ..running.stopping import StopFlag
from ..running.words import human_bytes


def recheck(
    plan: Plan,
    journal: Journal,
    now: SourceIdentity,
    stop: StopFlag,
    progress: Progress,
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Before a conversion continues: its records, shards and hidden states are those that were written, and its source the same.

    now: the source's identity, which differs from the journal's by stamps at most. elsewhere: as `ShardSink.begin` gives it.
    Forgets the records of data-free shards that are lost or damaged, so that they are made again. Raises OutputError for
    calibrated ones and for another source.
    """
    _check_records(plan, journal)
    if not journal.records:
        return
    away = elsewhere or {}
    records = [journal.records[index] for index in sorted(journal.records)]
    here = [record for record in records if record["shard"] not in away]
    size = sum(record["size"] for record in here)
    steps.step("checking finished shards")
    progress.say(f"checking {len(here)} finished shards ({human_bytes(size)}) against their sha256")
    lost = {record["unit"]: why for record in records if (why := away.get(record["shard"]))}
    _drop_changed(plan, journal, lost | changed_shards(journal.output, here, stop))
    if last := next((record for record in reversed(records) if record["boundary"]), None):
        check_states(journal.folder, last["boundary"], journal.output)
    if moved := touched(journal.read[SOURCE], now):
        refuse_unknown(plan.checkpoint, journal.output, moved)
        progress.say(
            f"files of the source were written or moved since: reading what {len(moved)} shards gave to finished ones"
        )
        read = {index: record["read"] for index, record in journal.records.items()}
        if other := other_shards(plan.checkpoint, read, lambda i: stored_infos(plan.units[i]), moved, stop):
            raise OutputError(
                f"{journal.output} was begun with other settings (another source: {', '.join(other)} held other weights when "
                "finished shards were made of them): put the earlier files back and repeat the command, or choose another folder."
            )


def refuse_unknown(checkpoint: Checkpoint, output: Path, moved: Sequence[str]) -> None:
    """Raise OutputError where only reading all these shards again, from elsewhere, could tell whether they are the same."""
    if (store := checkpoint.remote) is not None:
        raise OutputError(
            f"{output} was made of a source of which nothing says that {moved[0]} is the shard that is now on {store.kind}: give that "
            "source as it was, or choose another folder for the output."
        )


def _check_records(plan: Plan, journal: Journal) -> None:
    """Raise OutputError for records that are not of this plan, or of calibrated layers that do not follow one another."""
    units, calibrated = plan.units, plan.recipe.calibrated
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
