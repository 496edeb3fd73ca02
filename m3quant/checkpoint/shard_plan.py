"""Which shards of a checkpoint that is elsewhere lie on the disk when: computed beforehand, from the order of work alone.

Work is a sequence of steps (a layer each, mostly), each of which reads some shards. A shard stays from the first step that
reads it to the last; where `budget` has no room for that, it leaves after one step and is fetched again for a later one, the
stay whose next reader is furthest away first. Fetching follows the order of the stays, as far ahead as the budget has room.

A shard that lies idle for long takes that room: the head of a model is often read at the beginning, and its shard again for the last layer.
So it leaves, too, where the steps that are in work together would not fit beside it, as long as little is fetched twice by that.

That cannot wait for itself: whatever lies on the disk while step i is the earliest unfinished one, and something that step i
reads is still to be fetched, has a stay that covers step i, and all of those together fit.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import OptionError
from ..running.words import human_bytes

# While a layer is written, the next is quantized and the one after it is read.
AHEAD = 2
# Of all bytes, those that may be fetched again to make room for steps in work together. They cost the network's time once; without the room
# each layer waits for its shards.
AGAIN_SHARE = 0.03


@dataclass(frozen=True)
class Step:
    """Some work that reads whole shards, by name. key: what the worker calls it when it is done."""

    key: Hashable
    shards: frozenset[str]


@dataclass(frozen=True)
class Stay:
    """A shard on the disk, fetched for step `first` and removed after step `last` (numbers of steps)."""

    shard: str
    first: int
    last: int


@dataclass(frozen=True)
class ShardPlan:
    """What is fetched in which order, and what it takes. stays: in the order of fetching; sizes: shard -> bytes."""

    steps: tuple[Step, ...]
    stays: tuple[Stay, ...]
    sizes: Mapping[str, int]
    budget: int | None

    @cached_property
    def fetch_bytes(self) -> int:
        """Bytes that come over the network, shards that are fetched twice counted twice."""
        return sum(self.sizes[stay.shard] for stay in self.stays)

    @cached_property
    def least(self) -> int:
        """The smallest budget that any order of fetching could do with: the shards of the step that reads most."""
        return max((_total(step.shards, self.sizes) for step in self.steps), default=0)

    @cached_property
    def least_once(self) -> int:
        """The smallest budget with which no shard is fetched twice."""
        stays = _whole_stays(self.steps)
        without_room = max(_occupied(stays, self.sizes, len(self.steps)), default=0)
        if plan_shards(self.steps, self.sizes, max(without_room, self.least)).fetch_bytes == sum(
            map(self._size, stays)
        ):
            return without_room
        return max(_together(stays, self.steps, self.sizes, number)[0] for number in range(len(self.steps)))

    def _size(self, stay: Stay) -> int:
        return self.sizes[stay.shard]

    @cached_property
    def peak(self) -> int:
        """Most bytes on the disk at a time: those of a network that is never waited for."""
        most = on_disk = begun = 0
        for number in range(len(self.steps)):
            while begun < len(self.stays) and self._has_room(on_disk, self.stays[begun], number):
                on_disk += self.sizes[self.stays[begun].shard]
                begun += 1
            most = max(most, on_disk)
            on_disk -= sum(self.sizes[stay.shard] for stay in self.stays if stay.last == number)
        return most

    def _has_room(self, on_disk: int, stay: Stay, number: int) -> bool:
        again = any(s.shard == stay.shard and number <= s.last < stay.first for s in self.stays)
        return not again and (self.budget is None or on_disk + self.sizes[stay.shard] <= self.budget)

    def to_json(self, network: float | None = None) -> dict[str, Any]:
        """network: bytes per second, None if not said."""
        return {
            "shards": len({stay.shard for stay in self.stays}),
            "fetch_bytes": self.fetch_bytes,
            "fetched_twice_bytes": self.fetch_bytes - sum(self.sizes[s] for s in {stay.shard for stay in self.stays}),
            "cache_disk": self.budget,
            "least_disk": self.least,
            "least_disk_fetching_once": self.least_once,
            "peak_disk": self.peak,
            "network_bytes_per_second": network,
            "fetch_seconds": self.fetch_bytes / network if network else None,
        }


def plan_shards(steps: Iterable[Step], sizes: Mapping[str, int], budget: int | None) -> ShardPlan:
    """The stays for these steps within `budget` bytes (None: no bound). Raises OptionError where no order fits, with the least."""
    ordered = tuple(steps)
    stays = _whole_stays(ordered)
    plan = ShardPlan(ordered, tuple(stays), sizes, budget)
    if budget is None:
        return plan
    if budget < plan.least:
        raise OptionError(too_small(budget, plan.least))
    for number in range(len(ordered)):
        occupied = _occupied(stays, sizes, len(ordered))[number]
        while occupied > budget:
            idle = [s for s in stays if s.first < number <= s.last and s.shard not in ordered[number].shards]
            occupied -= sizes[_leave(stays, idle, ordered, number)]
    _make_room(stays, ordered, sizes, budget)
    stays.sort(key=lambda s: (s.first, s.shard))
    return ShardPlan(ordered, tuple(stays), sizes, budget)


def _make_room(stays: list[Stay], steps: Sequence[Step], sizes: Mapping[str, int], budget: int) -> None:
    """Have idle shards leave where the steps in work together do not fit beside them."""
    left = AGAIN_SHARE * sum(sizes[shard] for shard in {stay.shard for stay in stays})
    for number in range(len(steps)):
        while True:
            together, idle = _together(stays, steps, sizes, number)
            idle = [stay for stay in idle if sizes[stay.shard] <= left]
            if together <= budget or not idle:
                break
            left -= sizes[_leave(stays, idle, steps, number)]


def _together(
    stays: Iterable[Stay], steps: Sequence[Step], sizes: Mapping[str, int], number: int
) -> tuple[int, list[Stay]]:
    """Bytes of what lies idle during this step and of all that this one and the next AHEAD read; and the idle ones."""
    reads = frozenset[str]().union(*(step.shards for step in steps[number : number + 1 + AHEAD]))
    idle = [s for s in stays if s.first < number <= s.last and s.shard not in reads]
    return _total(reads, sizes) + _total((stay.shard for stay in idle), sizes), idle


def _leave(stays: list[Stay], idle: Sequence[Stay], steps: Sequence[Step], number: int) -> str:
    """Split the stay of `idle` that is read again last: it leaves before this step. Its shard."""
    stay = max(idle, key=lambda s: (_next_use(steps, s.shard, number), s.shard))
    used = [n for n in range(stay.first, stay.last + 1) if stay.shard in steps[n].shards]
    before, after = [n for n in used if n < number], [n for n in used if n > number]
    stays.remove(stay)
    stays += [Stay(stay.shard, stay.first, before[-1]), Stay(stay.shard, after[0], stay.last)]
    return stay.shard


def too_small(budget: int, least: int) -> str:
    """The sentence about a budget below the least."""
    return (
        f"{human_bytes(budget)} for shards are too few for those that one layer needs together: "
        f"--cache-disk must be at least {least:,} bytes ({human_bytes(least)})."
    )


def _whole_stays(steps: Sequence[Step]) -> list[Stay]:
    """Every shard from its first reader to its last."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for number, step in enumerate(steps):
        for shard in sorted(step.shards):
            first.setdefault(shard, number)
            last[shard] = number
    return [Stay(shard, first[shard], last[shard]) for shard in first]


def _occupied(stays: Iterable[Stay], sizes: Mapping[str, int], steps: int) -> list[int]:
    """Bytes of the stays that cover each step."""
    change = [0] * (steps + 1)
    for stay in stays:
        change[stay.first] += sizes[stay.shard]
        change[stay.last + 1] -= sizes[stay.shard]
    out, total = [], 0
    for amount in change[:steps]:
        total += amount
        out.append(total)
    return out


def _next_use(steps: Sequence[Step], shard: str, number: int) -> int:
    return next(n for n in range(number + 1, len(steps)) if shard in steps[n].shards)


def _total(shards: Iterable[str], sizes: Mapping[str, int]) -> int:
    return sum(sizes[shard] for shard in shards)
