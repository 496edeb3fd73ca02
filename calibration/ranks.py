"""Several processes that calibrate one layer together and stay in step: every rank runs the same program and knows the same numbers.

Work is cut into items that do not depend on the number of ranks (a micro-batch of windows, a candidate ratio, a chunk of
experts). Each item is computed by one rank and its result handed to all, and sums run over items in their own order; so the
numbers, and the bytes written from them, are those of a single process on the same kind of device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ranks:
    """This process among `size`. The default is a process alone, for which every method is the identity."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)

    @property
    def first(self) -> bool:
        """Whether this rank writes: shards, journal and boundaries are rank 0's alone."""
        return self.rank == 0

    def owner(self, item: int) -> int:
        return item % self.size

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """[function(item) for item in items], each computed by one rank; small picklable results (numbers)."""
        listed: Sequence[Item] = list(items)
        mine = {i: function(listed[i]) for i in range(self.rank, len(listed), self.size)}
        if self.size == 1:
            return list(mine.values())
        parts: list[dict[int, Result]] = [{} for _ in range(self.size)]
        dist.all_gather_object(parts, mine)
        merged = {i: result for part in parts for i, result in part.items()}
        return [merged[i] for i in range(len(listed))]

    def share(self, tensor: torch.Tensor, owner: int) -> torch.Tensor:
        """The owner's `tensor`, on every rank. The others pass one of the same shape and dtype, which is overwritten."""
        if self.size > 1:
            contiguous = tensor.contiguous()
            dist.broadcast(_as_bytes(contiguous), owner)
            if contiguous is not tensor:
                tensor.copy_(contiguous)
        return tensor

    def share_object(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    # gloo does not know every dtype (bfloat16, float8): bytes travel the same everywhere.
    return tensor.view(-1).view(torch.uint8)


ALONE = Ranks()
