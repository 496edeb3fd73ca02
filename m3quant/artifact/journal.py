"""The finished work: the state of a conversion, kept in the output's folder DST/.m3quant/ until it is complete.

    job.json      the facts that the result depends on and the source's identity, so that a refusal can name what differs
    units.jsonl   one line per finished unit, appended and synced after its shard is in place
    boundary-*-*.states      hidden states entering the next layer (calibrated conversions)
    lock          held while a process converts

Order of durability: shard renamed, boundary of the next unit renamed, record appended and synced, old boundary removed.
Killed at any instant, the run continues at the first unit without a record. On a GPU a boundary is not saved after every
layer (resources.boundary_interval): layers since the last one are passed again by both streams, from finished shards.
What job.json and the records hold is typed, and each has a checksum of itself (see records.py).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import sync_folder, system, write_bytes_atomic
from ..checkpoint.bounded import MANIFEST_BYTES, read_bounded
from ..errors import OutputError, StoppedError
from .identity import SOURCE, SourceIdentity, differences
from .manifest import MANIFEST, Manifest, load_manifest
from .records import JOURNAL_SCHEMA, ConvertedUnit, Job, UnitRecord, schema_of, seal, unseal

FOLDER = ".m3quant"
LOCK = "lock"
JOB = "job.json"
RECORDS = "units.jsonl"
_SHOWN = 5  # differences of two sources that a message names


class Journal:
    """The journal of one output folder. Make it with `Journal.begin`.

    records: of every finished unit, as plain values of the type `record`. read: label -> identity of each checkpoint that
    the work was begun with. unit_read: gives the digests of what a unit read, for its record. finished: told of a unit whose
    record is durable.
    """

    def __init__(self, output: Path, folder: str = FOLDER, record: type[UnitRecord] = ConvertedUnit) -> None:
        self.output = output
        self.folder = output / folder
        self.record = record
        self.records: dict[int, dict[str, Any]] = {}
        self.read: dict[str, SourceIdentity] = {}
        self.unit_read: Callable[[int], Mapping[str, Any]] | None = None
        self.finished: Callable[[int], None] = lambda unit: None
        self._lock = -1

    @classmethod
    def begin(
        cls,
        output: Path,
        facts: Mapping[str, Any],
        read: Mapping[str, SourceIdentity],
        folder: str = FOLDER,
        record: type[UnitRecord] = ConvertedUnit,
    ) -> Journal:
        """Start or continue in `output`. facts: name -> value; all must equal those the work was begun with.

        read: label -> checkpoint that is read; each must be the one the work was begun with, stamps aside. folder: where in
        `output` the journal is stored; one that is not a conversion's may be in any folder.
        Raises OutputError for a folder that is not an output of m3quant, is in use, is damaged, or was begun with other facts or another
        checkpoint.
        """
        journal = cls(output, folder, record)
        if folder == FOLDER:
            check_output_folder(output)
        try:
            journal.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{output} cannot be created: {error.strerror}. Choose a folder that can be written."
            ) from None
        journal._take_lock()
        try:
            journal._check_job(facts, read)
            journal._read_records()
        except BaseException:
            journal.release()
            raise
        return journal

    def check(self, facts: Mapping[str, Any], read: Mapping[str, SourceIdentity]) -> bool:
        """Whether work was begun here that `begin` would continue. Writes nothing. Raises OutputError as `begin` does."""
        if not (self.folder / JOB).exists():
            return False
        self._check_job(facts, read)
        self.look()
        return True

    @property
    def _restart(self) -> Path:
        """What to remove for a fresh start."""
        return self.output if self.folder.name == FOLDER else self.folder

    def _take_lock(self) -> None:
        if (fcntl := system.file_locks()) is None:
            raise OutputError(
                "this system has no file locks (fcntl), which keep two processes out of one output: run this on Linux or macOS; "
                "on Windows, plan, card, publish and pull work as they are, and everything does under WSL."
            )
        busy = OutputError(f"{self.output} is in use by another m3quant process: wait for it, or stop it first.")
        try:
            self._lock = os.open(self.folder / LOCK, system.flags("O_RDWR", "O_CREAT", "O_NOFOLLOW"), 0o666)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held, named = os.fstat(self._lock), os.stat(self.folder / LOCK)
        except FileNotFoundError:  # that process has just finished and removed its journal
            self.release()
            raise busy from None
        except OSError as error:
            self.release()
            if error.errno == errno.EWOULDBLOCK:
                raise busy from None
            raise OutputError(f"{self.folder / LOCK} cannot be locked: {error.strerror}.") from None
        if held.st_ino != named.st_ino:
            self.release()
            raise busy

    def _check_job(self, facts: Mapping[str, Any], read: Mapping[str, SourceIdentity]) -> None:
        path = self.folder / JOB
        if not path.exists():
            self._write_job(facts, read)
            return
        data = _bytes(path)
        schema = schema_of(data)
        if schema is None:
            raise self._damaged(path)
        if schema != JOURNAL_SCHEMA:
            raise OutputError(
                f"{path} was written by another version of m3quant (schema {schema}, this one has {JOURNAL_SCHEMA}): finish "
                f"with that version, or remove {self._restart} and start again."
            )
        try:
            begun = unseal(data, Job)
        except ValueError:
            raise self._damaged(path) from None
        other = {label: list(differences(begun.read[label], read[label])) for label in read if label in begun.read}
        refuse_other_facts(self._restart, begun.facts, facts, other)
        if begun.read.keys() != read.keys():
            raise self._damaged(path)
        self.read = begun.read

    def _write_job(self, facts: Mapping[str, Any], read: Mapping[str, SourceIdentity]) -> None:
        job = Job(facts=dict(facts), read=dict(read))
        write_bytes_atomic(self.folder / JOB, seal(job.model_dump(mode="json")) + b"\n")
        self.read = job.read

    def accept(self, facts: Mapping[str, Any], read: Mapping[str, SourceIdentity]) -> None:
        """From here on these identities replace the earlier ones, because they were found to have the same content."""
        if self.read != read:
            self._write_job(facts, read)

    def _damaged(self, path: Path) -> OutputError:
        return OutputError(f"{path} is damaged: remove {self._restart} and start again.")

    def damaged(self, how: str) -> OutputError:
        """The refusal of damaged records. how: what is wrong, after their file's name."""
        return OutputError(f"{self.folder / RECORDS} {how}: it is damaged; remove {self._restart} and start again.")

    def look(self) -> int:
        """Take in the records of units.jsonl, which another process may be appending to; returns the bytes of whole lines.

        Raises OutputError if it is damaged.
        """
        path = self.folder / RECORDS
        *lines, _ = _bytes(path).split(b"\n") if path.exists() else [b""]
        # What comes after the last newline was being appended when the run was killed: its unit is done again.
        for line in lines:
            try:
                record = unseal(line, self.record)
            except ValueError:
                raise self._damaged(path) from None
            self.records[record.unit] = record.model_dump()
        return sum(len(line) + 1 for line in lines)

    def _read_records(self) -> None:
        path, good = self.folder / RECORDS, self.look()
        if path.exists() and good != path.stat().st_size:
            os.truncate(path, good)

    def finish_unit(self, unit: int, record: Mapping[str, Any]) -> None:
        """Append the record of a finished unit and sync it. Raises StoppedError on a full disk.

        A unit that was made in another process has in its record what it `read` there.
        """
        values = {"unit": unit, **record}
        if self.unit_read is not None and "read" not in values:
            values["read"] = self.unit_read(unit)
        kept = self.record.model_validate(values).model_dump()
        line = seal(kept) + b"\n"
        path = self.folder / RECORDS
        new = not path.exists()
        before = 0 if new else path.stat().st_size
        descriptor = os.open(path, system.flags("O_WRONLY", "O_APPEND", "O_CREAT", "O_NOFOLLOW"), 0o666)
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
            if new:
                sync_folder(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, before)
            raise StoppedError(
                f"{path} cannot be written: {error.strerror}. Free space and run the same command again."
            ) from None
        finally:
            os.close(descriptor)
        self.records[unit] = kept
        self.finished(unit)

    def last_boundary(self) -> int:
        """The unit before which the hidden states are saved from which a run continues; 1, the first layer, if none are."""
        return max((index + 1 for index, record in self.records.items() if record.get("boundary")), default=1)

    def boundary(self, unit: int) -> Path:
        """Stem of the files that hold the hidden states entering `unit` (see boundary.py)."""
        return self.folder / f"boundary-{unit:05d}"

    def release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Remove the state of finished work: the records first, for they point at the rest, the lock last, so that no other process
        starts in a half-removed folder."""
        for path in sorted(self.folder.iterdir(), key=lambda p: (p.name == LOCK, p.name != RECORDS, p.name)):
            if path.is_dir():  # an attempt of a Ray worker that was lost
                shutil.rmtree(path)
            else:
                path.unlink()
        with contextlib.suppress(OSError):  # someone else may have made a lock meanwhile; they will remove it
            self.folder.rmdir()
        self.release()


def _bytes(path: Path) -> bytes:
    return read_bounded(path, MANIFEST_BYTES, error=OutputError)  # of M3 a few megabytes


def begun_with(output: Path) -> SourceIdentity | None:
    """What a conversion in `output` reads or has read, begun or finished; None where nothing can be told. Takes no lock."""
    job, manifest = output / FOLDER / JOB, output / MANIFEST
    try:
        if job.exists():
            return unseal(_bytes(job), Job).read.get(SOURCE)
        return load_manifest(manifest, Manifest).source.identity if manifest.exists() else None
    except (ValueError, OutputError):  # damaged: said by what begins there
        return None


def remove_leftover(output: Path) -> None:
    """Remove the journal of a conversion that was killed after its last file was in place."""
    folder = output / FOLDER
    if folder.exists():
        journal = Journal(output)
        with contextlib.suppress(OutputError):  # its process is still at it
            journal._take_lock()
            journal.remove()


def check_output_folder(output: Path) -> None:
    """Raise OutputError if `output` exists, is not empty, and holds no conversion of m3quant."""
    if output.is_file():
        raise OutputError(f"{output} is a file: give a folder for the output.")
    if not output.exists() or (output / FOLDER / JOB).exists() or (output / MANIFEST).exists():
        return
    names = sorted(p.name for p in output.iterdir() if p.name != FOLDER)
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise OutputError(
            f"{output} is not empty ({shown}) and holds no m3quant conversion: choose another folder, or empty this one."
        )


def unfinished(output: Path) -> str | None:
    """The sentence for a folder in which a conversion was begun and its last files, manifest and config.json, are missing; else None."""
    if not (output / FOLDER).exists() or all((output / name).exists() for name in (MANIFEST, "config.json")):
        return None
    return f"{output} is an unfinished conversion: run the same convert command again to finish it."


def check_apart(source: Path, output: Path) -> None:
    """Raise OutputError if one folder is inside the other."""
    src, dst = source.resolve(), output.resolve()
    if src == dst or src in dst.parents or dst in src.parents:
        raise OutputError(
            f"the output {output} and the source {source} lie inside one another: choose an output folder apart from the source."
        )


def _differences(begun: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, value then, value now, wherever they differ; of values that are objects, in JSON or not, their entries."""
    for key in sorted({*begun, *facts}):
        was, now = (_plain(values.get(key)) for values in (begun, facts))
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            for inner, before, after in _differences(was, now):
                yield f"{key}.{inner}", before, after
        elif was != now:
            yield key, was, now


def _plain(value: Any) -> Any:
    """An object for its JSON text, anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) and value.startswith("{") else value
    except ValueError:
        return value


def refuse_other_facts(
    output: Path,
    begun: Mapping[str, Any],
    facts: Mapping[str, Any],
    other: Mapping[str, Sequence[str]],
    finished: bool = False,
) -> None:
    """Raise OutputError naming the facts in which `begun` and `facts` differ.

    other: label of a checkpoint -> what shows that it is another one; a fact of that name is its fingerprint. finished:
    nothing is left to continue.
    """
    if not any(other.values()) and all(begun.get(key) == facts.get(key) for key in {*begun, *facts}):
        return
    differing = {key: both for key, *both in _differences(begun, facts) if key != "fingerprint" and key not in other}
    if any(key.startswith("recipe.") for key in differing):
        # Another recipe; what only one of the two records (calibration, device, ...) follows from it.
        differing = {key: both for key, both in differing.items() if None not in both}
    reasons = [
        f"another {label}" + (f": {_several(told)}" if told else "")
        for label, told in other.items()
        if told or begun.get(label) != facts.get(label)
    ]
    reasons += [f"{key} was {was!r}, now {now!r}" for key, (was, now) in differing.items()]
    told = "; ".join(reasons) or "another plan"
    if finished:
        raise OutputError(f"{output} is complete and was made with other settings ({told}): choose another folder.")
    raise OutputError(
        f"{output} was begun with other settings ({told}): repeat the first command to continue it, "
        "or choose another folder."
    )


def _several(sentences: Sequence[str]) -> str:
    more = len(sentences) - _SHOWN
    return ", ".join([*sentences[:_SHOWN], *([f"{more} more"] if more > 0 else [])])
