"""Several processes that calibrate one layer together: every rank runs the same program with the same numbers.

Work is cut into items that do not depend on the number of ranks (a micro-batch of windows, a candidate ratio, a chunk of
experts). Each item is computed by one rank and its result sent to all, and sums run over items in their own order; so the
numbers, and the bytes written from them, are those of a single process on the same kind of device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class _Hole:
    """Where a tensor stood in a value whose tensors travel by themselves."""

    shape: torch.Size
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among `size`. The default is a process alone, for which nothing travels."""

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this rank writes: shards, journal and boundaries are rank 0's alone."""
        return self.rank == 0

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """[function(item) for item in items], each computed by one rank. For small picklable results, such as losses."""
        listed: Sequence[Item] = list(items)
        mine = {i: function(listed[i]) for i in range(self.rank, len(listed), self.size)}
        if self.size == 1:
            return list(mine.values())
        parts: list[dict[int, Result]] = [{} for _ in range(self.size)]
        dist.all_gather_object(parts, mine)
        merged = {i: result for part in parts for i, result in part.items()}
        return [merged[i] for i in range(len(listed))]

    def each(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """(item, function(item)) in order, `size` items computed at once, one by each rank. For results that hold tensors.

        A result is a tensor, None, a number, or a dataclass, list, tuple or dict of such; tensors arrive on `device`.
        """
        left = iter(items)
        while together := list(islice(left, self.size)):
            mine = function(together[self.rank]) if self.rank < len(together) else None
            for owner, item in enumerate(together):
                yield item, self.share(mine, owner)

    def share(self, value: Any, owner: int = 0) -> Any:
        """The owner's `value`, on every rank."""
        if self.size == 1:
            return value
        tensors: list[torch.Tensor] = []
        box = [_hollow(value, tensors) if self.rank == owner else None]
        dist.broadcast_object_list(box, owner)
        if self.rank == owner:
            for tensor in tensors:
                dist.broadcast(_as_bytes(tensor.contiguous()), owner)
            return value
        return self._filled(box[0], owner)

    def _filled(self, value: Any, owner: int) -> Any:
        if isinstance(value, _Hole):
            tensor = torch.empty(value.shape, dtype=value.dtype, device=self.device)
            dist.broadcast(_as_bytes(tensor), owner)
            return tensor
        return _rebuilt(value, lambda part: self._filled(part, owner))


def _hollow(value: Any, tensors: list[torch.Tensor]) -> Any:
    """`value` with holes for its tensors, which are appended to `tensors` in the order in which holes are filled."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Hole(value.shape, value.dtype)
    return _rebuilt(value, lambda part: _hollow(part, tensors))


def _rebuilt(value: Any, part: Callable[[Any], Any]) -> Any:
    """A dataclass, list, tuple or dict of the same kind, with `part` applied to each of its parts; anything else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(part(getattr(value, f.name)) for f in dataclasses.fields(value)))
    if isinstance(value, list | tuple):
        return type(value)(part(one) for one in value)
    if isinstance(value, dict):
        return {key: part(one) for key, one in value.items()}
    return value


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    # gloo does not know every dtype (bfloat16, float8): bytes travel the same everywhere.
    return tensor.view(-1).view(torch.uint8)


ALONE = Ranks()
