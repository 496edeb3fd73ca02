"""A source or a converted folder read as dense tensors under the original names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CONFIG_NAME, Checkpoint
from ..errors import CheckpointError
from ..families import family_of
from ..planning.integer_kinds import is_integer
from ..planning.source_layouts import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_TENSOR,
    MXFP4,
    MXFP8,
    NVFP4,
    NVFP4_PACKED,
    PLAIN,
    SourceTensor,
)
from ..planning.source_tensors import source_tensors
from ..planning.unit import PlannedTensor
from .dead_experts import check_dead_experts
from .dequantize import dequantize_fp8_block, dequantize_fp8_rows, dequantize_mxfp8
from .formats import decompress
from .fp4 import dequantize_mxfp4, dequantize_nvfp4
from .global_scales import GlobalScales
from .integer_source import dequantize_integers


class SourceReader:
    """Dense view of a source checkpoint: quantized weights come out as BF16, the rest as stored.

    `.config` and `.tensors` (model tensor names, scales left out) are what the calibration stream needs.
    note: what values that were looked at say beyond the plan's notes, or ''.
    Raises CheckpointError for a global scale that cannot be right, and for too few experts, before anything is read; of a
    checkpoint on the Hub scales are looked at with the weights that they belong to (`look`). looked: another process has counted the experts.
    """

    def __init__(
        self, checkpoint: Checkpoint, tensors: Mapping[str, SourceTensor] | None = None, looked: bool = False
    ) -> None:
        self.checkpoint = checkpoint
        self.tensors = dict(tensors) if tensors is not None else source_tensors(checkpoint)
        self._scales = GlobalScales(checkpoint)
        if checkpoint.local:
            self._scales.check(self.tensors.values())
        self.note = ""
        if not looked:
            family = family_of(checkpoint.config, f"{checkpoint.root}/{CONFIG_NAME}")
            self.note = check_dead_experts(checkpoint, family, self.tensors)

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    def read_many(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Dense tensors by name, read shard by shard in file order. Raises CheckpointError on NaN/Inf in a quantized weight."""
        wanted = {name: self.tensors[name] for name in names}
        self.look(wanted.values())
        raw = self.checkpoint.read_many([n for source in wanted.values() for n in source.names])
        dense = {}
        for name, source in wanted.items():
            dense[name] = densify(source, raw)
            for part in source.names:  # so that a quantized layer is not in memory twice, as stored and dense
                del raw[part]
        return dense

    def read(self, name: str) -> Tensor:
        return self.read_many([name])[name]

    def look(self, tensors: Iterable[SourceTensor]) -> None:
        """Before these are read. Raises CheckpointError for a global scale that cannot be right."""
        if not self.checkpoint.local:
            self._scales.check(tensors)


def densify(source: SourceTensor, raw: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
    """One source tensor from its raw stored parts. out: BF16 to fill, for quantized sources. Raises CheckpointError as its format's reader."""
    name, codes = source.info.name, raw[source.info.name]
    if source.kind == PLAIN:
        return codes
    assert source.scale is not None
    scale = raw[source.scale.name]
    if is_integer(source.kind):
        zeros, stated = (raw[part.name] if part else None for part in (source.zero_point, source.true_shape))
        return dequantize_integers(
            codes, scale, zeros, source.kind, source.shape, true_shape=stated, out=out, name=name
        )
    if source.kind in (NVFP4, NVFP4_PACKED):
        assert source.global_scale is not None
        whole = raw[source.global_scale.name]
        return dequantize_nvfp4(
            codes, scale, whole, torch.bfloat16, divides=source.kind == NVFP4_PACKED, out=out, name=name
        )
    return _READERS[source.kind](codes, scale, torch.bfloat16, out=out, name=name)


_READERS: dict[str, Callable[..., Tensor]] = {
    FP8_BLOCK: dequantize_fp8_block,
    FP8_CHANNEL: dequantize_fp8_rows,
    FP8_TENSOR: dequantize_fp8_rows,
    MXFP8: dequantize_mxfp8,
    MXFP4: dequantize_mxfp4,
}


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
        if not planned.scheme.quantizes:  # copied as the source stores it, or dequantized when it was written
            return densify(planned.source, raw) if planned.action == "copy" else raw[planned.name]
        shape = planned.source.shape
        return decompress(planned.parts(raw), planned.scheme, self.format, shape, name=planned.name).to(self.dtype)
