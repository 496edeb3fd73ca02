"""Routed experts of a quantized source on a GPU: their codes and scales in one piece of memory, and from there into the BF16 stacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, groupby

import torch
from torch import Tensor

from ..checkpoint.header import TensorInfo
from ..checkpoint.reader import torch_dtype
from ..planning.batches import aligned
from ..planning.integer_kinds import is_integer
from ..planning.source_layouts import SourceTensor
from ..quant.reading import densify
from .gpu_stage import LAUNCH, why_plain

Expert = tuple[str, int, SourceTensor]  # stack ("w1", "w3" or "w2"), number, what is stored


class StoredExperts:
    """Quantized experts of one layer as the source stores them. Memory is taken at once; `targets` are to be filled before `dense_into`."""

    def __init__(self, experts: list[Expert], device: torch.device) -> None:
        self.device = device
        self._experts = sorted(experts, key=lambda expert: (expert[0], _alike(expert)))
        self._starts: list[tuple[int, ...]] = []  # of each one's parts
        end = 0
        for _, _, source in self._experts:
            ends = list(accumulate((aligned(info.nbytes) for info in source.parts), initial=end))
            self._starts.append(tuple(ends[:-1]))
            end = ends[-1]
        self._memory = torch.empty(end, dtype=torch.uint8, device=device)

    def targets(self) -> Iterator[tuple[TensorInfo, Tensor]]:
        """Every stored tensor and where its bytes belong."""
        for number, (_, _, source) in enumerate(self._experts):
            yield from zip(source.parts, self._views(number).values(), strict=True)

    def dense_into(self, stacks: Mapping[str, Tensor]) -> None:
        """Fill the experts' places in `stacks`, BF16 [E, N, K]. Raises CheckpointError on NaN, or a product beyond BF16."""
        if why_plain(self.device) is not None:
            for number, (which, expert, source) in enumerate(self._experts):
                densify(source, self._views(number), stacks[which][expert])
            return
        from ..quant.gpu_source import dense_group

        flags = torch.zeros(len(self._experts), dtype=torch.int32, device=self.device)
        for (which, _), group in groupby(
            range(len(self._experts)), key=lambda n: (self._experts[n][0], _alike(self._experts[n]))
        ):
            numbers, stack = list(group), stacks[which]
            if is_integer(self._experts[numbers[0]][2].kind):
                for n in numbers:
                    densify(self._experts[n][2], self._views(n), stack[self._experts[n][1]])
                continue
            rows = [(*self._starts[n], self._experts[n][1] * stack[0].nbytes) for n in numbers]
            own = flags[numbers[0] : numbers[-1] + 1]
            with LAUNCH:
                out = stack.view(torch.uint8).view(-1)
                dense_group(
                    self._memory, out, torch.tensor(rows, device=self.device), own, self._experts[numbers[0]][2]
                )
        for number in flags.nonzero().flatten().tolist():
            source = self._experts[number][2]
            densify(source, {name: part.cpu() for name, part in self._views(number).items()})
            raise AssertionError(f"{source.info.name} was refused on the GPU alone")

    def _views(self, number: int) -> dict[str, Tensor]:
        views = {}
        for info, start in zip(self._experts[number][2].parts, self._starts[number], strict=True):
            piece = self._memory[start : start + info.nbytes]
            views[info.name] = piece.view(torch_dtype(info.dtype)).view(info.shape)
        return views


def _alike(expert: Expert) -> tuple[str, str, tuple[int, ...]]:
    """What is common to one launch, in addition to the stack."""
    source = expert[2]
    return source.kind, source.scale.dtype if source.scale else "", source.shape
