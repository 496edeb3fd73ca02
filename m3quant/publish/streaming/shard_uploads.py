"""Finished shards to the staging branch while others are made, beside the conversion; and off the disk, if that is wanted.

    checked -> sent -> committed, the Hub's checksum compared, entered in .m3quant-hub.json -> (marked as dropped -> removed)

Each of the first three has threads of its own, so that one shard is checked while others travel and another is committed. One commit a shard: a
kill costs at most the shards under way, and content that arrived is not sent again. Nothing of the branch shows on main. A failure, after
the back-off of `running.retry`, stops the conversion at its next safe point; what is finished is kept.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...artifact.uploads import UploadedShard, Uploads, read_uploads, write_uploads
from ...checkpoint import sync_folder
from ...errors import OutputError, PublishError
from ...planning.plan import Plan
from ...planning.unit import Unit
from ...running import steps
from ...running.progress import Progress
from ...running.stopping import StopFlag
from ...verify.one_shard import CHECKS, shard_problems
from ..files import PublishFile
from ..remote import Remote, RemoteFile, uses_xet
from ..scan import machine_strings, scan
from ..scan.allow import read_allowed
from ..upload import STAGING, Target, UploadRun, made
from .wanted import Wanted

# Finished shards that may be on the disk at a time, where they leave it: checked, sent, committed. The conversion waits while there are more.
HELD = 4
SENDERS = 3
CHECKERS = 2
LOOK_SECONDS = 0.2  # how often a thread that waits looks for signals


class _Stage:
    """Threads that take jobs in their order, until one fails: that goes to `stop`, and nothing more is begun."""

    def __init__(self, name: str, stop: StopFlag, threads: int = 1) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stop, self._over, self._threads = stop, False, threads
        for _ in range(threads):
            # Nothing is lost if the process ends in the middle: a job that was killed is done again.
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def put(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def end(self) -> None:
        """After the jobs under way, whatever still waits."""
        self._over = True
        for _ in range(self._threads):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._over and self._stop.failure is None:
            try:
                job()
            except Exception as error:
                if not self._over:  # then it was ended
                    self._stop.fail(error)


class _Upload:
    """The Progress of the upload alone, as a stream beside the conversion's."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.advance: Callable[[int], None] = lambda count: None

    def start(self, total_bytes: int, done_bytes: int, label: str = "") -> None:
        self.advance = self._progress.beside("upload", total_bytes - done_bytes)

    def beside(self, label: str, total_bytes: int) -> Callable[[int], None]:
        return self._progress.beside(label, total_bytes)

    def say(self, line: str) -> None:
        self._progress.say(line)


class ShardUploads:
    """A `convert.shard_sink.ShardSink`. progress: of the conversion, beside which the upload has a stream. sent: bytes that this run sent."""

    def __init__(self, wanted: Wanted, progress: Progress) -> None:
        self.wanted, self.progress = wanted, _Upload(progress)
        self.sent = 0
        self._allowed = read_allowed(wanted.asked.allow) if wanted.asked.allow else None
        self._changed = threading.Condition()
        self._open = 0  # finished shards that have not been entered yet
        self._needed_from = 0
        self._stages: list[_Stage] = []
        self._sending = ExitStack()  # until `close`

    @property
    def checks(self) -> list[str]:
        return list(CHECKS)

    @property
    def held(self) -> int | None:
        return HELD if self.wanted.drop else None

    def begin(self, plan: Plan, output: Path, stop: StopFlag) -> Mapping[str, str]:
        """As `ShardSink.begin`. Raises OutputError where the output is being published as another repo."""
        self._units: dict[str, Unit] = {unit.shard: unit for unit in plan.units}
        self._output, self._stop = output, stop
        uploads = read_uploads(output) or Uploads(repo=self.wanted.repo)
        if uploads.repo != self.wanted.repo:
            if uploads.dropped:
                raise OutputError(
                    f"{output} was begun with --publish {uploads.repo}, and {len(uploads.dropped)} shards are there alone: repeat that "
                    "command to continue it, or choose another folder."
                )
            uploads = Uploads(repo=self.wanted.repo)
        remote = Remote(self.wanted.repo, self.progress.say)
        self._run = UploadRun(remote, Target([], self.wanted.tag, replace=None), self.progress)
        self._run.begin_branch(made(remote), uploads.dropped)
        self._tree = remote.tree(STAGING)
        there = {n: s for n, s in uploads.shards.items() if self._states(PublishFile(n, output / n, s.size, s.sha256))}
        lost = [name for name in uploads.dropped if name not in there]
        self._uploads = Uploads(repo=uploads.repo, shards=there)
        write_uploads(output, self._uploads)
        for name in self._uploads.dropped:  # killed between the mark and the removal
            (output / name).unlink(missing_ok=True)
        total, done = sum(u.bytes_out for u in plan.units), sum(shard.size for shard in there.values())
        self.progress.start(total, done)
        self._sending.enter_context(remote.sending(total - done))
        self._machine = machine_strings(output)
        # Xet sends the parts of one file in parallel; plain LFS sends them one after another.
        senders = 1 if uses_xet() else SENDERS
        self._stages = [
            _Stage("check-shards", stop, CHECKERS),
            _Stage("send-shards", stop, senders),
            _Stage("commit-shards", stop),
        ]
        gone = f"was dropped after its upload and branch {STAGING} of {uploads.repo} lacks it"
        return dict.fromkeys(self._uploads.dropped, "") | dict.fromkeys(lost, gone)

    def finished(self, record: Mapping[str, Any], needed_from: int) -> None:
        self._needed_from = needed_from
        uploaded = self._uploads.shards.get(record["shard"])
        if uploaded is None or uploaded.sha256 != record["sha256"]:
            file = PublishFile(
                record["shard"], self._output / record["shard"], record["size"], record["sha256"], hashed=True
            )
            with self._changed:
                self._open += 1
            self._stages[0].put(lambda: self._check(file))
        else:  # by an earlier run, which may have needed it for going on
            self._stages[2].put(self._drop)
        if self.wanted.drop:
            self._wait_until(HELD)

    def wait(self) -> None:
        self._wait_until(0)

    def close(self) -> None:
        for stage in self._stages:
            stage.end()
        self._sending.close()

    def _wait_until(self, few: int) -> None:
        """Return when at most `few` shards are on their way."""
        with self._changed:
            if self._open > few:
                with steps.waiting("finished shards wait for their upload"):
                    while self._open > few:
                        self._stop.check()
                        self._changed.wait(LOOK_SECONDS)
        self._stop.check()

    def _check(self, file: PublishFile) -> None:
        for problem in shard_problems(self._output, self._units[file.path_in_repo]):
            raise PublishError(
                f"{file.local_path} was not sent: {problem}: it is not what was written; remove {self._output} and convert again."
            )
        for finding in scan([file], self._machine, self._allowed):
            raise PublishError(
                f"{finding}: take it out of the source before anything is sent, or give --allow FILE with the reason why it is harmless."
            )
        self._stages[1].put(lambda: self._send(file))

    def _send(self, file: PublishFile) -> None:
        operations: list[Any] = []
        if self._states(file):
            self.progress.advance(file.size)
        else:
            operations = self._run.preupload([file])
            with self._changed:
                self.sent += file.size
        self._stages[2].put(lambda: self._commit(file, operations))

    def _commit(self, file: PublishFile, operations: list[Any]) -> None:
        name, remote = file.path_in_repo, self._run.remote
        if operations:
            remote.commit(operations, STAGING, f"Stage {name}")
            self._tree |= remote.paths_of(remote.repo, STAGING, [name])
        if not self._states(file):
            there = self._tree.get(name)
            found = f"sha256 {there.sha256 or 'unknown'} and {there.size} bytes" if there else "no such file"
            raise PublishError(
                f"{remote.repo}, branch {STAGING}: the Hub has {found} for {name}, {file.sha256} and {file.size} bytes were sent. "
                "It is kept here and nothing was merged: run the same command again."
            )
        self._enter(name, UploadedShard(size=file.size, sha256=file.sha256))
        self._drop()
        with self._changed:
            self._open -= 1
            self._changed.notify_all()

    def _states(self, file: PublishFile) -> bool:
        """Whether the Hub states the file's size and sha256 on the staging branch."""
        there: RemoteFile | None = self._tree.get(file.path_in_repo)
        return there is not None and (there.size, there.sha256) == (file.size, file.sha256)

    def _drop(self) -> None:
        """Remove the files of uploaded shards that a run which goes on does not read."""
        if not self.wanted.drop:
            return
        for name, shard in list(self._uploads.shards.items()):
            unit = self._units[name]
            if shard.dropped or (unit.layer is not None and unit.index >= self._needed_from):
                continue
            self._enter(name, shard.model_copy(update={"dropped": True}))
            (self._output / name).unlink(missing_ok=True)

    def _enter(self, name: str, shard: UploadedShard) -> None:
        self._uploads.shards[name] = shard
        write_uploads(self._output, self._uploads)


def drop_published(output: Path, repo: str, shards: Mapping[str, Mapping[str, Any]]) -> None:
    """Remove the shards that are still here of an output which is whole on the Hub. shards: as the manifest lists them."""
    uploads = read_uploads(output) or Uploads(repo=repo)
    for name, facts in shards.items():
        uploads.shards[name] = UploadedShard(size=facts["size"], sha256=facts["sha256"], dropped=True)
    write_uploads(output, uploads)
    for name in shards:
        (output / name).unlink(missing_ok=True)
    sync_folder(output)
