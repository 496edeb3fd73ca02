"""Which shards of a checkpoint that is elsewhere lie on the disk when: computed beforehand, from the order of work alone.

Work is a sequence of steps (a layer each, mostly), each of which reads some shards. A shard stays from the first step that
reads it to the last; where `budget` has no room for that, it leaves after one step and is fetched again for a later one, the
stay whose next reader is furthest away first. Fetching follows the order of the stays, as far ahead as the budget has room.

A shard that lies idle for long takes that room: the head of a model is often read at the beginning and again after the last layer.
So it leaves, too, where the steps that are in work together would not fit beside it, as long as little is fetched twice by that.

That cannot wait for itself: whatever lies on the disk while step i is the earliest unfinished one, and something that step i
reads is still to be fetched, has a stay that covers step i, and all of those together fit.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import OptionError
from ..running.words import human_bytes

# Steps in work at a time after the earliest: while a layer is written, the next is quantized and the one after it is read.
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
    """What is fetched in which order, and what it takes. stays: in the order of fetching; sizes: shard -> bytes; ahead: as AHEAD."""

    steps: tuple[Step, ...]
    stays: tuple[Stay, ...]
    sizes: Mapping[str, int]
    budget: int | None
    ahead: int = AHEAD

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
        stays, most = _whole_stays(self.steps), 0
        spare = AGAIN_SHARE * sum(self.sizes[stay.shard] for stay in stays)

        def look(number: int, there: Collection[Stay]) -> list[Stay]:
            nonlocal most
            together, idle = _together(there, self.steps, self.sizes, number, self.ahead)
            may_leave = any(self.sizes[stay.shard] <= spare for stay in idle)
            most = max(most, together if may_leave else 0, _total((stay.shard for stay in there), self.sizes))
            return []

        _sweep(stays, self.steps, look)
        return most

    @cached_property
    def peak(self) -> int:
        """Most bytes on the disk at a time: those of a network that is never waited for."""
        most = on_disk = begun = 0
        until: dict[str, int] = {}  # the last step of each shard's latest stay
        for number, step in enumerate(self.steps):
            while begun < len(self.stays) and self._has_room(on_disk, self.stays[begun], until, number):
                stay = self.stays[begun]
                until[stay.shard] = stay.last
                on_disk += self.sizes[stay.shard]
                begun += 1
            most = max(most, on_disk)
            on_disk -= sum(self.sizes[shard] for shard in step.shards if until[shard] == number)
        return most

    def _has_room(self, on_disk: int, stay: Stay, until: Mapping[str, int], number: int) -> bool:
        again = until.get(stay.shard, -1) >= number
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


def plan_shards(steps: Iterable[Step], sizes: Mapping[str, int], budget: int | None, ahead: int = AHEAD) -> ShardPlan:
    """The stays for these steps within `budget` bytes (None: no bound). ahead: as AHEAD. Raises OptionError where no order fits, with the
    least."""
    ordered = tuple(steps)
    stays = _whole_stays(ordered)
    plan = ShardPlan(ordered, tuple(stays), sizes, budget, ahead)
    if budget is None:
        return plan
    if budget < plan.least:
        raise OptionError(too_small(budget, plan.least))
    uses = _uses(ordered)

    def in_the_way(following: int, left: float) -> Leaving:
        """Idle shards beside which a step and the `following` next do not fit, as far as `left` bytes may be fetched again."""

        def leave(number: int, there: Collection[Stay]) -> Iterator[Stay]:
            nonlocal left
            together, idle = _together(there, ordered, sizes, number, following)
            for stay in _last_wanted_first(idle, uses, number) if together > budget else ():
                if together <= budget:
                    return
                size = sizes[stay.shard]
                if size <= left:
                    together, left = together - size, left - size
                    yield stay

        return leave

    stays = _sweep(stays, ordered, in_the_way(0, math.inf))  # what must leave, whatever that costs
    stays = _sweep(stays, ordered, in_the_way(ahead, AGAIN_SHARE * sum(sizes[shard] for shard in uses)))
    stays.sort(key=lambda s: (s.first, s.shard))
    return ShardPlan(ordered, tuple(stays), sizes, budget, ahead)


# Which of the stays that cover a step leave before it, of those whose shard it does not read.
Leaving = Callable[[int, Collection[Stay]], Iterable[Stay]]


def _sweep(stays: Iterable[Stay], steps: Sequence[Step], leaving: Leaving) -> list[Stay]:
    """The stays after each step in turn was asked what leaves: such a stay ends with the reader before, and begins anew with the next."""
    uses, begins = _uses(steps), defaultdict[int, list[Stay]](list)
    for stay in stays:
        begins[stay.first].append(stay)
    out: list[Stay] = []
    there: dict[str, Stay] = {}
    for number, step in enumerate(steps):
        there.update((stay.shard, stay) for stay in begins.pop(number, ()))
        for stay in list(leaving(number, there.values())):
            used = uses[stay.shard]
            after = bisect_left(used, number)
            out.append(Stay(stay.shard, stay.first, used[after - 1]))
            begins[used[after]].append(Stay(stay.shard, used[after], stay.last))
            del there[stay.shard]
        out += [there.pop(shard) for shard in step.shards if there[shard].last == number]
    return out


def _together(
    there: Iterable[Stay], steps: Sequence[Step], sizes: Mapping[str, int], number: int, ahead: int
) -> tuple[int, list[Stay]]:
    """Bytes of what lies idle during this step and of all that this one and the next `ahead` read; and the idle ones."""
    reads = frozenset[str]().union(*(step.shards for step in steps[number : number + 1 + ahead]))
    idle = [stay for stay in there if stay.shard not in reads]
    return _total(reads, sizes) + _total((stay.shard for stay in idle), sizes), idle


def _last_wanted_first(idle: Iterable[Stay], uses: Mapping[str, Sequence[int]], number: int) -> list[Stay]:
    """Those whose next reader is furthest away first."""

    def next_use(stay: Stay) -> tuple[int, str]:
        used = uses[stay.shard]
        return used[bisect_left(used, number)], stay.shard

    return sorted(idle, key=next_use, reverse=True)


def too_small(budget: int, least: int) -> str:
    """The sentence about a budget below the least."""
    return (
        f"{human_bytes(budget)} for shards are too few for those that one layer needs together: "
        f"--cache-disk must be at least {least:,} bytes ({human_bytes(least)})."
    )


def _uses(steps: Sequence[Step]) -> dict[str, list[int]]:
    """Which steps read each shard, in order."""
    uses: dict[str, list[int]] = {}
    for number, step in enumerate(steps):
        for shard in sorted(step.shards):
            uses.setdefault(shard, []).append(number)
    return uses


def _whole_stays(steps: Sequence[Step]) -> list[Stay]:
    """Every shard from its first reader to its last."""
    return [Stay(shard, used[0], used[-1]) for shard, used in _uses(steps).items()]


def _total(shards: Iterable[str], sizes: Mapping[str, int]) -> int:
    return sum(sizes[shard] for shard in shards)
