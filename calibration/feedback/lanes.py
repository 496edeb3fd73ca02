"""Chunks of experts side by side on one GPU.

A chunk is a chain of some thousand launches, most of which fill a part of the machine or end before the next is enqueued. A second chunk on a
stream of its own fills what is left. Each gives the numbers that it gives alone: streams share no result, and no library chooses its
algorithm by what else runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """[function(item)], on a thread and a stream each. What the current stream has enqueued comes before, what it will enqueue after.

    So tensors may pass between the streams in both directions, as long as the caller keeps those it gives.
    """
    if len(items) == 1:
        return [function(items[0])]
    own = torch.cuda.current_stream(device)
    here = own.device  # with its index: a thread begins on the first device
    streams = [_stream(here, number) for number in range(len(items))]

    @torch.no_grad()  # threads begin with gradients
    def work(item: Item, stream: torch.cuda.Stream) -> Result:
        with torch.cuda.device(here), torch.cuda.stream(stream):
            return function(item)

    for stream in streams:
        stream.wait_stream(own)
    try:
        with ThreadPoolExecutor(len(items), thread_name_prefix="chunk") as pool:
            return list(pool.map(work, items, streams))
    finally:
        for stream in streams:
            own.wait_stream(stream)


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """The same one for all layers, because memory that was freed on a stream is used again on that stream alone."""
    return torch.cuda.Stream(device)
