"""Which shards lie on the disk when: bounds held for random work, and the figures of small cases."""

from __future__ import annotations

import random

import pytest

from m3quant.checkpoint.shard_plan import ShardPlan, Step, plan_shards
from m3quant.errors import OptionError


def steps(*shards: str) -> list[Step]:
    return [Step(number, frozenset(names.split())) for number, names in enumerate(shards)]


SIZES = {"a": 10, "b": 20, "c": 30, "d": 40}


def shown(plan: ShardPlan) -> list[tuple[str, int, int]]:
    return [(stay.shard, stay.first, stay.last) for stay in plan.stays]


def test_a_shard_stays_until_its_last_reader() -> None:
    plan = plan_shards(steps("a b", "b", "b c", "d"), SIZES, 100)
    assert shown(plan) == [("a", 0, 0), ("b", 0, 2), ("c", 2, 2), ("d", 3, 3)]
    assert (plan.fetch_bytes, plan.least, plan.least_once, plan.peak) == (100, 50, 50, 100)
    assert plan_shards(steps("a b", "b", "b c", "d"), SIZES, 50).peak == 50
    facts = plan.to_json(50)
    assert (facts["fetch_seconds"], facts["fetched_twice_bytes"], facts["shards"]) == (2.0, 0, 4)


def test_for_want_of_disk_the_shard_that_is_wanted_last_is_fetched_twice() -> None:
    work = steps("a b", "c", "b", "d", "a")
    assert plan_shards(work, SIZES, 60).fetch_bytes == 100
    tight = plan_shards(work, SIZES, 50)
    assert shown(tight) == [("a", 0, 0), ("b", 0, 2), ("c", 1, 1), ("d", 3, 3), ("a", 4, 4)]
    assert tight.fetch_bytes == 110 and tight.least == 40 and tight.least_once == 60
    assert plan_shards(work, SIZES, 40).fetch_bytes == 130
    with pytest.raises(OptionError, match=r"at least 40 bytes \(40 B\)"):
        plan_shards(work, SIZES, 39)


def model(layers: int) -> tuple[list[Step], dict[str, int]]:
    """A layer in three quarters of a shard, the head in the first shard, which is read before the layers and after them."""
    reads = [f"s{3 * layer // 4:03}" + f" s{(3 * layer + 2) // 4:03}" for layer in range(layers)]
    work = steps("s000", *reads, "s000")
    return work, {shard: 100 for step in work for shard in step.shards}


def test_a_shard_that_lies_idle_leaves_room_for_the_layers_in_work() -> None:
    work, sizes = model(64)
    plan = plan_shards(work, sizes, 350)
    assert [stay for stay in shown(plan) if stay[0] == "s000"] == [("s000", 0, 2), ("s000", 65, 65)]
    assert plan.fetch_bytes == sum(sizes.values()) + 100
    assert plan.least_once == 400 and plan_shards(work, sizes, 400).fetch_bytes == sum(sizes.values())


@pytest.mark.parametrize(("ahead", "room"), [(2, 400), (1, 300)])
def test_a_shard_that_lies_idle_stays_beside_the_layers_in_work(ahead: int, room: int) -> None:
    work = steps("head", *[f"s{layer:03}" for layer in range(64)], "head")
    sizes = {shard: 100 for step in work for shard in step.shards}
    plan = plan_shards(work, sizes, room, ahead)
    assert ("head", 0, 65) in shown(plan) and plan.fetch_bytes == sum(sizes.values())
    assert plan.least_once == plan.peak == room
    assert plan_shards(work, sizes, room - 1, ahead).fetch_bytes == sum(sizes.values()) + 100


def test_of_a_small_model_no_large_part_is_fetched_twice_for_room() -> None:
    work, sizes = model(32)  # a shard is more than 3 % of it
    plan = plan_shards(work, sizes, 350)
    assert plan.fetch_bytes == sum(sizes.values()) and plan.least_once == 300
    assert ("s000", 0, 33) in shown(plan)


def test_no_work_takes_nothing() -> None:
    plan = plan_shards([], SIZES, 0)
    assert (plan.fetch_bytes, plan.least, plan.peak, plan.stays) == (0, 0, 0, ())


def test_random_work_is_within_its_budget_and_fetches_no_more_than_each_step_anew() -> None:
    chance = random.Random(3)
    for _ in range(300):
        sizes = {f"s{i}": chance.randint(1, 50) for i in range(chance.randint(1, 9))}
        work = [
            Step(n, frozenset(chance.sample(sorted(sizes), chance.randint(0, min(3, len(sizes))))))
            for n in range(chance.randint(1, 12))
        ]
        free = plan_shards(work, sizes, None)
        budget = chance.randint(free.least, free.least_once + 40)
        plan = plan_shards(work, sizes, budget)
        for number, step in enumerate(work):
            there = [stay for stay in plan.stays if stay.first <= number <= stay.last]
            assert len({stay.shard for stay in there}) == len(there)
            assert step.shards <= {stay.shard for stay in there}
            assert sum(sizes[stay.shard] for stay in there) <= budget
        assert all(s.shard in work[s.first].shards and s.shard in work[s.last].shards for s in plan.stays)
        assert [s.first for s in plan.stays] == sorted(s.first for s in plan.stays)
        assert free.fetch_bytes <= plan.fetch_bytes <= sum(sizes[s] for step in work for s in step.shards)
        assert plan.least <= plan.peak <= budget
        assert (plan.fetch_bytes == free.fetch_bytes) == (budget >= free.least_once)


def test_the_least_budget_that_fetches_once_counts_no_shard_that_is_too_large_to_leave() -> None:
    sizes = {f"s{number:02}": 4 for number in range(40)} | {"large": 30, "small": 2}
    work = steps("large", "small", *(f"s{n:02} s{n + 1:02}" for n in range(38)), "s39 small", "large")
    once = plan_shards(work, sizes, None).least_once
    # What lies idle, and the three steps: beside the large one alone nothing would be done about it.
    assert once == 30 + 2 + 4 * 4
    plan = plan_shards(work, sizes, once - 1)
    assert plan.fetch_bytes == sum(sizes.values()) + 2 and ("large", 0, len(work) - 1) in shown(plan)
    assert plan_shards(work, sizes, once).fetch_bytes == sum(sizes.values())
