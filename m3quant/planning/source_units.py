"""A source sorted into units, with layers of one kind recognised, so that a plan works out one layer of each kind.

M2 has 47,000 weights in 62 layers, and all its layers hold the same ones: a recipe does the same to each of them. The list of a
further layer of a kind is made when somebody reads it. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any, TypeVar, overload

from ..checkpoint import Checkpoint
from ..families import Family, Role, family_of
from ..families.spec import is_index
from .headers import ConfigSource
from .source_layouts import SourceTensor
from .source_tensors import check_complete, source_tensors

T = TypeVar("T")
Placed = tuple[SourceTensor, Role]


class Deferred(Sequence[T]):
    """A sequence of known length that is made when it is first read."""

    def __init__(self, count: int, make: Callable[[], Sequence[T]]) -> None:
        self._count, self._make = count, make

    @cached_property
    def _made(self) -> Sequence[T]:
        return self._make()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        return self._made[index]

    def __iter__(self) -> Iterator[T]:
        return iter(self._made)


@dataclass(frozen=True)
class SourceUnit:
    """What a layer, or with layer None what no layer holds. like: index of the first unit of this kind, its own where it is the first."""

    layer: int | None
    like: int
    tensors: Sequence[Placed]


@dataclass(frozen=True)
class SourceUnits:
    """A checkpoint as every recipe finds it. notes: oddities of the source that do no harm, for the plan."""

    family: Family
    units: Sequence[SourceUnit]
    notes: Sequence[str] = field(default=())

    @cached_property
    def kinds(self) -> list[tuple[SourceUnit, int]]:
        """One unit of each kind, in order, and how many there are of it."""
        counts: dict[int, int] = {}
        for unit in self.units:
            counts[unit.like] = counts.get(unit.like, 0) + 1
        return [(self.units[like], count) for like, count in counts.items()]


def source_units(checkpoint: Checkpoint) -> SourceUnits:
    """Sort a checkpoint. Raises CheckpointError as `source_tensors` and `check_complete` do."""
    family = family_of(checkpoint.config, f"{checkpoint.root}/config.json")
    if isinstance(checkpoint, ConfigSource):
        return _described(checkpoint, family)
    tensors = source_tensors(checkpoint)
    notes = check_complete(checkpoint, family, tensors)
    groups = _sorted(family, tensors)
    first: dict[object, int] = {}
    likes = [first.setdefault(_kind(family, index, group), index) for index, group in enumerate(groups)]
    units = [SourceUnit(_layer(index), like, groups[index]) for index, like in enumerate(likes)]
    return SourceUnits(family, units, notes)


def _described(source: ConfigSource, family: Family) -> SourceUnits:
    """The same for a release that is known by its config.json: layers of a kind are those of one description."""
    likes = [0, *(like + 1 for like in source.layer_kinds())]
    firsts = sorted(set(likes[1:]))
    some = _sorted(family, source_tensors(source.some([family.layers[unit - 1] for unit in firsts]), whole=False))

    @cache
    def every() -> list[list[Placed]]:
        return _sorted(family, source_tensors(source))

    units = []
    for index, like in enumerate(likes):
        own = some[index] if like == index else Deferred(len(some[like]), partial(lambda at: every()[at], index))
        units.append(SourceUnit(_layer(index), like, own))
    return SourceUnits(family, units)


def _layer(index: int) -> int | None:
    return index - 1 if index else None


def _sorted(family: Family, tensors: Mapping[str, SourceTensor]) -> list[list[Placed]]:
    """The tensors of every unit in the order of their names, layer 10 after layer 9."""
    groups: list[list[Placed]] = [[] for _ in range(family.num_layers + 1)]
    for name in sorted(tensors, key=_natural):
        role = family.role(name)
        groups[0 if role.layer is None else role.layer + 1].append((tensors[name], role))
    return groups


def _natural(name: str) -> list[Any]:
    """Sort key that puts layer 10 after layer 9."""
    return [(0, int(part), "") if is_index(part) else (1, 0, part) for part in name.split(".")]


def _kind(family: Family, index: int, group: Iterable[Placed]) -> object:
    """Equal for units whose tensors have the same names but for the layer's number, in as many characters, and are stored alike."""
    if not index:
        return index
    skipped = len(family.layer_prefix(index - 1))
    stored = tuple(
        (source.kind, source.dense_shape, *((part.name[skipped:], part.dtype, part.shape) for part in source.stored))
        for source, _ in group
    )
    return skipped, stored
