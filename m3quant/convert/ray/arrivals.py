"""Units of a source on the Hub or in an object store, each once its shards are here, for the workers of a Ray cluster.

The driver alone fetches, into the output's folder, which all nodes see: a shard is fetched once for the whole cluster, and no
other node asks the Hub or needs a token. A unit's shards stay until it is done, however often its worker is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from ...planning.plan import Plan
from ...planning.streaming import shards_of
from ...planning.unit import Unit


class Arrivals:
    """Units in order, each from when it can be read; of a folder all at once. Made by `arrivals`."""

    def __init__(self, plan: Plan, units: Iterable[Unit]) -> None:
        self._plan, self._units = plan, list(units)
        self._left = len(self._units)  # not taken yet
        self._here: list[Unit] = []
        self._held: dict[int, ExitStack] = {}
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    @property
    def left(self) -> bool:
        """Whether there are units that have not been taken."""
        return self._left > 0

    def take(self, seconds: float) -> list[Unit]:
        """Units that have come since the last time; waits so long for the first. Raises what ended the fetching."""
        with self._changed:
            if self._left and not self._here and self._error is None:
                self._changed.wait(seconds)
            if self._error is not None:
                raise self._error
            here, self._here = self._here, []
            self._left -= len(here)
            return here

    def release(self, unit: Unit) -> None:
        """Nobody reads this unit's shards any more."""
        self._held.pop(unit.index).close()

    def release_all(self) -> None:
        for held in self._held.values():
            held.close()
        self._held.clear()

    def bring(self) -> None:
        """On a thread of its own: every unit waits here for its shards while others are at work.

        It does so in the order of the steps, so that the earliest unfinished unit has its shards, and never waits for a later one's
        room (`shard_plan`).
        """
        try:
            for unit in self._units:
                held = ExitStack()
                if (store := self._plan.checkpoint.remote) is not None and store.cache is not None:
                    held.enter_context(store.cache.reading(shards_of(tensor.source for tensor in unit.tensors)))
                with self._changed:
                    self._held[unit.index] = held
                    self._here.append(unit)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()


@contextmanager
def arrivals(plan: Plan, units: Iterable[Unit]) -> Iterator[Arrivals]:
    """Units as they come, while the block runs. After an error in it nobody waits for shards any more."""
    found = Arrivals(plan, units)
    bringing = threading.Thread(target=found.bring, name="arrivals", daemon=True)
    bringing.start()
    try:
        with plan.checkpoint.abandoned_on_error():
            yield found
    finally:
        bringing.join()
        found.release_all()
