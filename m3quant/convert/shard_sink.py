"""Where finished shards go beyond the disk: what a conversion asks of an upload that runs beside it (`publish.shard_uploads`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..artifact.journal import Journal
    from ..planning.plan import Plan
    from ..running.stopping import StopFlag


class ShardSink(Protocol):
    """Takes finished shards on threads of its own, and may remove the files of those that `artifact.uploads` lists as dropped.

    checks: what every shard passes before it is sent, in words, for the manifest. held: finished shards that are on the disk at most, None
    where none leave it.
    """

    @property
    def checks(self) -> list[str]: ...

    @property
    def held(self) -> int | None: ...

    def begin(self, plan: Plan, output: Path, stop: StopFlag) -> Mapping[str, str]:
        """Before a conversion begins or goes on: of each shard that is elsewhere alone what is wrong with it there, or "".

        A failure of a thread reaches `stop`.
        """
        ...

    def finished(self, record: Mapping[str, Any], needed_from: int) -> None:
        """The journal has the record of this shard; those of units from `needed_from` on must stay here for now.

        Waits while too many are on their way. Raises what `stop` does.
        """
        ...

    def wait(self) -> None:
        """Return when everything that was finished has arrived. Raises what `stop` does."""
        ...

    def close(self) -> None:
        """End the threads after what they are at, without waiting; raises nothing."""
        ...


def feed(sink: ShardSink, plan: Plan, journal: Journal) -> None:
    """Hand over every shard that is finished, and each that will be."""

    told_before = journal.finished

    def finished(unit: int) -> None:
        # A calibrated run that goes on passes its hidden states again through the layers after the last saved ones.
        needed_from = journal.last_boundary() if plan.recipe.calibrated else len(plan.units)
        sink.finished(journal.records[unit], needed_from)

    def both(unit: int) -> None:
        told_before(unit)
        finished(unit)

    for unit in sorted(journal.records):
        finished(unit)
    journal.finished = both
