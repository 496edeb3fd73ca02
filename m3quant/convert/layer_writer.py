"""A finished layer to the disk: shard, boundary, journal record, in that order; behind the next layer's search if asked.

One thread does all of it but saving the streams, which another begins at once: the hash of the shard takes longer. The
record waits for both, so that the order of durability (see journal.py) is that of the calls. A layer is begun only when the
one before it is durable, which bounds what waits in memory to one layer's output and two streams.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ..artifact.journal import Journal
from ..calibration.boundary import Streams, drop_other
from ..planning.unit import Unit
from ..running.timing import span
from .units import UnitWriter, shard_facts


class LayerSink(Protocol):
    """Where a calibrated layer goes; LayerWriter says what each call means. background: whether `finish` returns before it has read its streams."""

    @property
    def background(self) -> bool: ...

    def begin(self, unit: Unit) -> None: ...

    def add(self, outputs: dict[str, torch.Tensor], ready: torch.cuda.Event | None = None) -> None: ...

    def finish(self, unit: Unit, record: dict[str, Any], streams: Streams | None) -> None: ...

    def wait(self) -> None: ...

    def close(self) -> None: ...


class LayerWriter:
    """Writes one layer at a time. Errors of the thread are raised by the next `begin` or by `wait`."""

    def __init__(self, output: Path, journal: Journal, background: bool) -> None:
        self.output, self.journal, self.background = output, journal, background
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write-layer") if background else None
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="save-streams") if background else None
        self._jobs: list[Future[None]] = []
        self._writer: UnitWriter | None = None

    def begin(self, unit: Unit) -> None:
        """Open the unit's shard. Waits until the unit before it is durable."""
        self.wait()
        self._writer = UnitWriter(self.output, unit)

    def add(self, outputs: dict[str, torch.Tensor], ready: torch.cuda.Event | None = None) -> None:
        """CPU tensors of the shard, in any order. ready: passed when copies from a GPU into them are done."""
        self._do(lambda: self._add(outputs, ready))

    def finish(self, unit: Unit, record: dict[str, Any], streams: Streams | None) -> None:
        """Close the shard, save the streams entering the next unit, journal `record` and the shard, drop the old ones.

        streams: None where they are not saved after this layer; older ones then stay. In the background, streams must be a
        copy that does not change.
        """
        saved: Callable[[], dict[str, str]] = dict
        if streams is not None:
            stem = self.journal.boundary(unit.index + 1)
            saved = self._saver.submit(_save, streams, stem).result if self._saver else partial(_save, streams, stem)
        self._do(lambda: self._finish(unit, record, saved))

    def wait(self) -> None:
        """Return when everything so far is durable. Raises what went wrong, the shard in progress being dropped."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()

    def close(self) -> None:
        """Let finished layers become durable and drop a layer in progress; idempotent, raises nothing of theirs."""
        for pool in (self._pool, self._saver):
            if pool is not None:
                pool.shutdown(wait=True)
        self._abort()

    def _do(self, work: Callable[[], None]) -> None:
        if self._pool is None:
            work()
        else:
            self._jobs.append(self._pool.submit(work))

    def _add(self, outputs: dict[str, torch.Tensor], ready: torch.cuda.Event | None) -> None:
        if self._writer is None:
            return  # an earlier piece failed, and its error is on the way
        try:
            if ready is not None:
                ready.synchronize()
            self._writer.add(outputs)
        except BaseException:
            self._abort()
            raise

    def _finish(self, unit: Unit, record: dict[str, Any], saved: Callable[[], dict[str, str]]) -> None:
        if self._writer is None:
            return
        try:
            shard = shard_facts(self._writer.close())
        except BaseException:
            self._abort()
            raise
        self._writer = None
        boundary = saved()
        self.journal.finish_unit(unit.index, {**shard, **record, "boundary": boundary})
        if boundary:
            drop_other(self.journal.boundary(unit.index + 1))

    def _abort(self) -> None:
        if self._writer is not None:
            self._writer.abort()
            self._writer = None


def _save(streams: Streams, stem: Path) -> dict[str, str]:
    with span("save", streams.source.nbytes + streams.quantized.nbytes):
        return streams.save(stem)


class NoWriter:
    """For a process that calibrates with others and writes nothing: its numbers are those of the one that does."""

    background = False

    def begin(self, unit: Unit) -> None: ...

    def add(self, outputs: dict[str, torch.Tensor], ready: torch.cuda.Event | None = None) -> None: ...

    def finish(self, unit: Unit, record: dict[str, Any], streams: Streams | None) -> None: ...

    def wait(self) -> None: ...

    def close(self) -> None: ...
