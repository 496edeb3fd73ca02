"""The steps of a conversion that reads its source from the Hub or an object store, and the shards that each step reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..checkpoint.shard_plan import AHEAD, ShardPlan, Step, plan_shards
from ..families import Family
from ..running.words import duration, human_bytes
from .plan import Plan
from .source_layouts import SourceTensor
from .unit import Unit

EMBEDDINGS, HEAD = "embeddings", "head"
UNIT, REPLAY = "unit", "replay"


@dataclass(frozen=True)
class Progressed:
    """How far a conversion is. done: finished units; boundary: the unit before which hidden states were saved, 1 at the beginning."""

    done: Collection[int] = ()
    boundary: int = 1


def conversion_steps(plan: Plan, so_far: Progressed | None = None) -> list[Step]:
    """What is still to be done of `plan`, in order. Keys: ("unit", index), ("replay", index), EMBEDDINGS and HEAD."""
    so_far = so_far or Progressed()
    sources = plan.sources
    todo = [unit for unit in plan.units if unit.index not in so_far.done]
    if not plan.recipe.calibrated:
        return [_of_unit(UNIT, unit) for unit in todo]
    layers = [unit for unit in todo if unit.layer is not None]
    steps = [_of_unit(UNIT, unit) for unit in todo if unit.layer is None]
    if so_far.boundary == 1:
        steps.append(Step(EMBEDDINGS, shards_of([sources[plan.family.embedding_name]])))
    until = layers[0].index if layers else len(plan.units)
    steps += [_of_unit(REPLAY, unit) for unit in plan.units[so_far.boundary : until]]
    steps += [_of_unit(UNIT, unit) for unit in layers]
    return [*steps, _head(plan)]


def layer_steps(plan: Plan, done: int) -> list[Step]:
    """A pass through the model, of which `done` layers lie behind: embeddings, every layer that is left, head."""
    embeddings = Step(EMBEDDINGS, shards_of([plan.sources[plan.family.embedding_name]]))
    layers = [_of_unit(UNIT, unit) for unit in plan.units[1 + done :]]
    return [embeddings, *layers, _head(plan)]


def unit_steps(plan: Plan) -> list[Step]:
    """Every unit once, in order, whatever the recipe."""
    return [_of_unit(UNIT, unit) for unit in plan.units]


def _head(plan: Plan) -> Step:
    return Step(HEAD, shards_of(plan.sources[name] for name in head_names(plan.family)))


def head_names(family: Family) -> tuple[str, str]:
    """The tensors that make logits of the last hidden states."""
    return family.final_norm_name, family.embedding_name if family.tied else family.head_name


def shards_of(tensors: Iterable[SourceTensor]) -> frozenset[str]:
    return frozenset(part.shard for tensor in tensors for part in tensor.stored)


def _of_unit(kind: str, unit: Unit) -> Step:
    return Step((kind, unit.index), shards_of(tensor.source for tensor in unit.tensors))


def ahead_of(plan: Plan) -> int:
    """Layers that are in work at a time after the first. Searching a layer takes so long that the one before is written at its beginning."""
    return 1 if plan.recipe.calibrated else AHEAD


def conversion_shards(plan: Plan, budget: int | None, so_far: Progressed | None = None) -> ShardPlan:
    """What a conversion fetches. Raises OptionError for a budget that is too small."""
    return plan_shards(conversion_steps(plan, so_far), plan.checkpoint.shard_sizes, budget, ahead_of(plan))


def streaming_lines(shards: ShardPlan, kind: str, network: float | None) -> list[str]:
    """The same for a person. kind: of store (`RemoteStore.kind`); network: bytes per second, None if not said."""
    count = len({stay.shard for stay in shards.stays})
    twice = shards.fetch_bytes - sum(shards.sizes[s] for s in {stay.shard for stay in shards.stays})
    again = f", {human_bytes(twice)} of them a second time because of the disk limit" if twice else ""
    time = f"; at {human_bytes(network)}/s {duration(shards.fetch_bytes / network)}" if network else ""
    bound = f"with --cache-disk {human_bytes(shards.budget)} at most" if shards.budget else "without --cache-disk up to"
    return [
        f"from {kind}: {shards.fetch_bytes:,} bytes ({human_bytes(shards.fetch_bytes)}) to fetch in {count} shards{again}{time}",
        f"disk for shards: {bound} {human_bytes(shards.peak)} at a time; at least {shards.least:,} bytes ({human_bytes(shards.least)}), "
        f"with {human_bytes(shards.least_once)} nothing is fetched twice",
    ]
