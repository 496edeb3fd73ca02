"""Weights as the model means them: a source or a converted folder read as dense tensors under the original names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..planning.plan import PlannedTensor
from ..planning.source_format import FP8_BLOCK, PLAIN
from ..planning.source_tensors import SourceTensor, source_tensors
from .dequantize import dequantize_fp8_block, dequantize_mxfp8
from .formats import decompress


class SourceReader:
    """Dense view of a source checkpoint: FP8 weights come out as BF16, the rest as stored.

    `.config` and `.tensors` (model tensor names, scales left out) are what the calibration stream needs.
    """

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, SourceTensor] | None = None) -> None:
        self.checkpoint = checkpoint
        self.tensors = dict(tensors) if tensors is not None else source_tensors(checkpoint)

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    def read_many(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Dense tensors by name, read shard by shard in file order. Raises CheckpointError on NaN/Inf in an FP8 weight."""
        wanted = {name: self.tensors[name] for name in names}
        raw = self.checkpoint.read_many([n for source in wanted.values() for n in source.names])
        dense = {}
        for name, source in wanted.items():
            dense[name] = densify(source, raw)
            for part in source.names:  # so that an FP8 layer is not in memory twice, as stored and dense
                del raw[part]
        return dense

    def read(self, name: str) -> Tensor:
        return self.read_many([name])[name]


def densify(source: SourceTensor, raw: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
    """One source tensor from its raw stored parts. out: BF16 to fill, for FP8 sources."""
    name = source.info.name
    if source.kind == PLAIN:
        return raw[name]
    assert source.scale is not None
    scale = raw[source.scale.name]
    if source.kind == FP8_BLOCK:
        return dequantize_fp8_block(raw[name], scale, torch.bfloat16, out=out, name=name)
    return dequantize_mxfp8(raw[name], scale, torch.bfloat16, out=out, name=name)


class ConvertedReader:
    """Dense view of a folder that m3quant wrote: quantized weights come out dequantized, as an engine computes with them.

    tensors: original name -> the plan's record of it. dtype: of dequantized weights (float32 is exact).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, PlannedTensor],
        fmt: str,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.checkpoint, self.tensors, self.format, self.dtype = checkpoint, dict(tensors), fmt, dtype

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    def read_many(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Dense tensors by original name. Raises CheckpointError where a stored part is missing."""
        wanted = {name: self.tensors[name] for name in names}
        stored = [o.name for planned in wanted.values() for o in planned.outputs]
        if missing := [n for n in stored if n not in self.checkpoint.tensors]:
            raise CheckpointError(f"{self.checkpoint.root} lacks '{missing[0]}': convert it again.")
        raw = self.checkpoint.read_many(stored)
        return {name: self._dense(planned, raw) for name, planned in wanted.items()}

    def _dense(self, planned: PlannedTensor, raw: Mapping[str, Tensor]) -> Tensor:
        if not planned.scheme.quantizes:
            return raw[planned.name]
        shape = planned.source.info.shape
        return decompress(planned.parts(raw), planned.scheme, self.format, shape, name=planned.name).to(self.dtype)
