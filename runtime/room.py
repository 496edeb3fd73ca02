"""How many bytes of weights a node can hold in addition to the requested KV cache, and what each layer's choices take of them.

Both are for one rank: tensor parallelism repeats some tensors on every rank, so a smaller checkpoint is not
always a smaller rank. The memory model is at its high end, as for every result of `fit`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..engines import engine_named
from ..engines.device import GIB
from ..errors import DoesNotFit, NodeError
from ..planning.choices import Choices
from ..planning.fit import Room
from ..recipe.recipe import Recipe, build_recipe
from ..schemes import parse_scheme
from .fit import Ask, Fit, assess
from .hardware import STANDARD_NODES, Node, parse_node
from .model import Subject
from .weights import Group, as_kept, converted_groups, rank_weights, split_problem, stage_of_layers


@dataclass(frozen=True)
class NodeRooms:
    """least: the verdict on the smallest recipe, whose split and setup count for all. rooms: one a pipeline stage."""

    least: Fit
    rooms: Sequence[Room]
    costs: Sequence[Sequence[int]]


def check_context(subject: Subject, ask: Ask) -> None:
    """Raise NodeError for a context that config.json does not allow on any node."""
    most = subject.stored.max_positions
    if ask.context is not None and most and ask.context > most:
        raise NodeError(
            f"--context {ask.context:,}: config.json allows {most:,} tokens (max_position_embeddings); ask for at most that."
        )


def unsplittable(subject: Subject, least: Fit, candidates: Mapping[str, Iterable[str]]) -> dict[tuple[str, str], str]:
    """(role, scheme) -> why the ranks of the split cannot share the role's weights in this scheme."""
    found = {}
    for role, names in candidates.items():
        own = [g for g in subject.source_groups if _role(g) == role]
        for name in names:
            groups = converted_groups(own, _recipe({role: name}))
            if problem := split_problem(groups, least.setup.split, subject.family):
                found[role, name] = problem
    return found


def unread(subject: Subject, ask: Ask, candidates: Mapping[str, Iterable[str]]) -> dict[tuple[str, str], str]:
    """(role, scheme) -> why the engine's release that was asked for does not read the scheme."""
    engine = engine_named(ask.engine)
    refusals = {
        (role, name): engine.release_refusal(subject.family, [parse_scheme(name)], ask.release)
        for role, names in candidates.items()
        for name in names
    }
    return {item: why for item, why in refusals.items() if why}


def node_rooms(subject: Subject, node: Node, ask: Ask, least: Recipe, choices: Choices) -> NodeRooms:
    """The room for layers on a node where the cache holds ask.concurrency requests of ask.context tokens.

    least: the recipe of the smallest output. Raises NodeError for a request that makes no sense on any node.
    """
    assert ask.context is not None
    fit = assess(subject.converted(least), node, ask)
    setup, geometry = fit.setup, subject.family.kv_geometry
    sizes = _role_sizes(subject, fit, choices)
    costs = [
        [sum(sizes[layer, role, scheme] for role, scheme in choice.schemes.items()) for choice in own]
        for layer, own in enumerate(choices.layers)
    ]
    blocks = 1 + ask.concurrency * math.ceil(ask.context / setup.block_size)  # one block holds nothing
    rooms = []
    for rank, layers in zip(fit.prediction.ranks, stage_of_layers(geometry.layers, setup.split.pp), strict=True):
        own = sum(
            sizes[layer, role, least.scheme(role, layer).name] for layer in layers for role in choices.candidates[layer]
        )
        cache = blocks * setup.block_size * rank.bytes_per_token
        rooms.append(Room(layers, rank.kv_bytes(rank.overhead.high) - cache + own))
    return NodeRooms(fit, rooms, costs)


def _role_sizes(subject: Subject, fit: Fit, choices: Choices) -> dict[tuple[int, str, str], int]:
    """(layer, role, scheme) -> bytes on one rank of the layer's stage."""
    geometry = subject.family.kv_geometry
    groups: dict[tuple[int, str], list[Group]] = {}
    for group in subject.source_groups:
        if group.layer is not None and (role := _role(group)) is not None:
            groups.setdefault((group.layer, role), []).append(group)
    sizes = {}
    for layer, candidates in enumerate(choices.candidates):
        for role, names in candidates.items():
            for name in names:
                converted = converted_groups(groups[layer, role], _recipe({role: name}))
                kept = as_kept(converted, fit.setup.memory)
                stages = rank_weights(kept, fit.setup.split, geometry.kv_heads, geometry.layers)
                sizes[layer, role, name] = sum(sum(stage.values()) for stage in stages)
    return sizes


def _role(group: Group) -> str | None:
    return "attention" if group.role == "indexer" else group.role


def _recipe(schemes: Mapping[str, str]) -> Recipe:
    return build_recipe({"rounding": "feedback", "schemes": dict(schemes)})


def nearest_node(subject: Subject, ask: Ask, least: Recipe, beyond: Node | None = None) -> str:
    """The first standard node that holds the smallest recipe as asked, larger than `beyond`; '' if none does."""
    model = subject.converted(least)
    for name in STANDARD_NODES:
        node = parse_node(name)
        if beyond and node.count * node.gpu.total_bytes <= beyond.count * beyond.gpu.total_bytes:
            continue
        if assess(model, node, ask).fits:
            return name
    return ""


def does_not_hold(
    subject: Subject, found: NodeRooms, ask: Ask, least: Recipe, refused: Mapping[tuple[str, str], str]
) -> DoesNotFit:
    """The refusal of a node on which even the smallest recipe leaves too little. refused: (role, scheme) -> why it was not tried."""
    fit = found.least
    short = max(sum(min(found.costs[layer]) for layer in room.layers) - room.budget for room in found.rooms)
    near = nearest_node(subject, ask, least, fit.node)
    where = f"the nearest standard node that does is {near}" if near else "no standard node does"
    return DoesNotFit(
        f"{fit.node.name} does not hold the smallest recipe with {ask.concurrency} x {ask.context:,} tokens of cache: "
        f"{short:,} bytes ({short / GIB:.2f} GiB) a GPU are missing; {where}.{_not_tried(refused)}"
    )


def _not_tried(refused: Mapping[tuple[str, str], str]) -> str:
    """Schemes by reason: a smaller one may be among them."""
    by_reason = dict[str, list[str]]()
    for (role, scheme), why in refused.items():
        by_reason.setdefault(why, []).append(f"{role} {scheme}")
    return "".join(f" Not tried: {', '.join(schemes)}: {why}." for why, schemes in by_reason.items())
