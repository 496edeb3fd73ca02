"""What a conversion says that it is doing."""

from __future__ import annotations

from collections.abc import Sequence

from ..artifact.journal import Journal
from ..checkpoint.streaming import reading_words
from ..planning.plan import Plan
from ..planning.unit import Unit

LOOKING = "looking at the source and at what is finished"


def layer_words(plan: Plan, unit: Unit, words: str) -> str:
    return f"layer {unit.layer} ({unit.index} of {len(plan.units) - 1}): {words}"


def arrival_words(plan: Plan, todo: Sequence[Unit]) -> str:
    """Until the first bytes of the units that are to be done have come."""
    return f"{reading_words(plan.checkpoint)} {todo[0].label}" if todo else "every shard is finished"


def finished_words(plan: Plan, journal: Journal) -> str:
    return f"{len(journal.records)} of {len(plan.units)} shards are finished"
