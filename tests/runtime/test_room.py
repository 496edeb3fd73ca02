"""A node's room for weights: exact against the memory model, for one GPU, tensor parallelism and pipeline stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from m3quant.checkpoint import Checkpoint
from m3quant.errors import DoesNotFit, NodeError
from m3quant.planning.fit import Fitting
from m3quant.runtime.fit import Ask, assess
from m3quant.runtime.hardware import GIB, Gpu, Node
from m3quant.runtime.model import open_subject
from m3quant.runtime.room import check_context, does_not_hold, nearest_node, node_rooms, unsplittable
from tests.support.paths import FIXTURES

CANDIDATES = {
    "routed_experts": ("int2-g128-asym", "int3-g128-asym", "int4-g32"),
    "attention": ("int4-g128", "int8-g128"),
}
ASK = Ask(context=2048, concurrency=3, kv_dtype="fp8", utilization=0.9)


def node_with(room: int, fitting: Fitting, name: str, count: int = 1, ask: Ask = ASK) -> Node:
    """A node on which the layers' least choices leave about `room` bytes per GPU."""
    subject = open_subject(str(FIXTURES / name))
    probe = Node(count, Gpu("probe", 64 * GIB, 0.0, "made up"))
    rooms = node_rooms(subject, probe, ask, fitting.recipe(fitting.least), fitting.choices)
    spare = min(r.budget - sum(min(rooms.costs[layer]) for layer in r.layers) for r in rooms.rooms)
    total = probe.gpu.total_bytes - round((spare - room) / ask.utilization)
    return Node(count, replace(probe.gpu, total_bytes=total))


@pytest.mark.parametrize("name", ["tiny-m2", "tiny-m3"])
@pytest.mark.parametrize("split", [{}, {"tp": 2}, {"pp": 2}], ids=str)
def test_what_is_chosen_fits_and_no_single_step_more_does(name: str, split: dict[str, int]) -> None:
    subject, fitting = (
        open_subject(str(FIXTURES / name)),
        Fitting(Checkpoint.open(FIXTURES / name), {}, candidates=CANDIDATES),
    )
    count = 2 if split else 1
    ask = replace(ASK, **split)
    node = node_with(150_000 // count, fitting, name, count, ask)
    least = fitting.recipe(fitting.least)
    rooms = node_rooms(subject, node, ask, least, fitting.choices)
    assert assess(subject.converted(least), node, ask).fits
    # Every choice of a layer with the least of the others: the room says exactly what the memory model says.
    seen = set()
    for room in rooms.rooms:
        spare = room.budget - sum(min(rooms.costs[layer]) for layer in room.layers)
        for layer in room.layers:
            for i, cost in enumerate(rooms.costs[layer]):
                chosen = list(fitting.least)
                chosen[layer] = i
                holds = cost - min(rooms.costs[layer]) <= spare
                verdict = assess(subject.converted(fitting.recipe(chosen)), node, ask)
                assert verdict.fits == holds, (layer, fitting.schemes(chosen)[layer], verdict.why_not)
                seen.add(holds)
    assert seen == {True, False}
    found = fitting.within_rooms(rooms.rooms, rooms.costs)
    assert found is not None and assess(subject.converted(fitting.recipe(found)), node, ask).fits


def test_a_node_that_is_too_small_is_refused_with_the_bytes_and_the_nearest_one() -> None:
    name = "tiny-m3"
    subject, fitting = (
        open_subject(str(FIXTURES / name)),
        Fitting(Checkpoint.open(FIXTURES / name), {}, candidates=CANDIDATES),
    )
    node, least = node_with(-12_345, fitting, name), fitting.recipe(fitting.least)
    rooms = node_rooms(subject, node, ASK, least, fitting.choices)
    assert fitting.within_rooms(rooms.rooms, rooms.costs) is None
    error = does_not_hold(subject, rooms, ASK, least, {})
    assert isinstance(error, DoesNotFit) and "3 x 2,048 tokens" in str(error) and "1xH200" in str(error)
    missing = int(str(error).split(": ")[1].split(" bytes")[0].replace(",", ""))
    assert abs(missing - 12_345) <= 2  # the node's bytes times its utilization are rounded
    assert nearest_node(subject, ASK, least) == "1xH200" and str(error).endswith("is 1xH200.")
    refused = {("attention", "int4"): "too old", ("routed_experts", "int2"): "too old", ("lm_head", "int4"): "too wide"}
    whole = str(does_not_hold(subject, rooms, ASK, least, refused))
    assert (
        whole == f"{error} Not tried: attention int4, routed_experts int2: too old. Not tried: lm_head int4: too wide."
    )


def test_a_context_beyond_config_json_is_refused() -> None:
    subject = open_subject(str(FIXTURES / "tiny-m3"))
    check_context(subject, Ask(context=8192))
    with pytest.raises(NodeError, match=r"--context 8,193: config\.json allows 8,192 tokens"):
        check_context(subject, Ask(context=8193))


def test_schemes_that_ranks_cannot_share_are_left_out() -> None:
    """256 columns of w2 over 4 ranks are 64 each: half a group of 128, two of 32."""
    name = "tiny-m2"
    subject, fitting = (
        open_subject(str(FIXTURES / name)),
        Fitting(Checkpoint.open(FIXTURES / name), {}, candidates=CANDIDATES),
    )
    first = assess(
        subject.converted(fitting.recipe(fitting.least)), Node(4, Gpu("x", 64 * GIB, 0.0, "")), replace(ASK, tp=4)
    )
    refused = unsplittable(subject, first, fitting.choices.by_role)
    if first.setup.split.expert_parallel:
        assert ("routed_experts", "int2-g128-asym") not in refused
    assert ("attention", "int8-g128") in refused
    with pytest.raises(Exception, match="no candidate scheme of attention is left"):
        fitting.refuse(refused)
