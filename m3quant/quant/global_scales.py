"""Global scales of a source's NVFP4 weights, checked before anything is converted: an invalid factor, or one of the other convention.

ModelOpt's scale_2 is amax / 2688 and multiplies; compressed-tensors' is 2688 / amax and divides (2688 = 6 * 448, the largest code times the
largest group scale). Under the wrong convention, weights become (2688 / amax)^2 times too large, seven million at an amax of 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from ..checkpoint import Checkpoint
from ..checkpoint.reader import bytes_view, torch_dtype
from ..errors import CheckpointError
from ..planning.source_layouts import NVFP4_PACKED, SourceTensor
from .fp4 import group_scales, unpack

# Median magnitudes of weights that no model has. Of M2 and M3 they are near 0.01.
MOST, LEAST = 8.0, 1e-9
SAMPLED_ROWS = 64
_EXPERT = re.compile(r"\.experts\.\d+\.")


class GlobalScales:
    """The check of one checkpoint's global scales. Each is looked at once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._sampled: dict[str, float] = {}
        self._seen: set[str] = set()

    def check(self, tensors: Iterable[SourceTensor]) -> None:
        """Raise CheckpointError, with the tensor and both readings, for a global scale that cannot be the one of its name.

        Reads the global scale of each of `tensors` that has one, and a few rows of one expert of each layer and projection.
        """
        wanted = [t for t in tensors if t.global_scale is not None and t.name not in self._seen]
        if not wanted:
            return
        factors = torch.empty(len(wanted), dtype=torch.float32)
        self.checkpoint.peek(
            (source.global_scale, 0, bytes_view(factors[i : i + 1]))
            for i, source in enumerate(wanted)
            if source.global_scale
        )
        for source, factor in zip(wanted, factors, strict=True):
            one = torch.ones(())
            group_scales(
                one, factor, divides=source.kind == NVFP4_PACKED, name=f"'{source.info.name}' of {source.info.shard}"
            )
            alike = _EXPERT.sub(".experts.*.", source.name)
            if alike not in self._sampled:
                self._sampled[alike] = _median(self.checkpoint, source)
            _check_direction(source, float(factor), self._sampled[alike])
            self._seen.add(source.name)


def _median(checkpoint: Checkpoint, source: SourceTensor) -> float:
    """Median magnitude of code * group scale in the first rows, zeros left out; NaN where there is nothing else."""
    assert source.scale is not None
    rows = min(SAMPLED_ROWS, source.shape[0])
    parts = [torch.empty((rows, info.shape[1]), dtype=torch_dtype(info.dtype)) for info in (source.info, source.scale)]
    checkpoint.peek((info, 0, bytes_view(part)) for info, part in zip((source.info, source.scale), parts, strict=True))
    wide = parts[1].float().abs().repeat_interleave(source.shape[1] // source.scale.shape[1], 1)
    values = unpack(parts[0]).abs() * wide
    return float(values[values > 0].median()) if bool((values > 0).any()) else float("nan")


def _check_direction(source: SourceTensor, factor: float, sample: float) -> None:
    divides = source.kind == NVFP4_PACKED
    meant, other = (sample / factor, sample * factor) if divides else (sample * factor, sample / factor)
    if meant > MOST or (meant < LEAST <= other <= MOST):
        leaf = source.global_scale.name.rpartition(".")[2] if source.global_scale else ""
        raise CheckpointError(
            f"{source.info.shard}: the global scale of '{source.info.name}' is {factor:.6g}. By its name, {leaf}, it "
            f"{'divides' if divides else 'multiplies'}, and the weights would have a median magnitude of {meant:.3g}; if it "
            f"{'multiplied' if divides else 'divided'} they would have {other:.3g}. Whoever wrote it meant the other way, or it is damaged: take "
            "the weights from the original release, or write them under the names of the other layout."
        )
