"""Layers that an earlier run finished, passed again by both streams, where that run saved no hidden states after them.

The streams take the same operations on the same numbers as when the layer was converted: the source's weights, and the
weights of the finished shard as an engine computes with them. So they arrive with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..calibration.boundary import Streams
from ..calibration.layers import Layer, layer_shapes
from ..calibration.ranks import Ranks
from ..calibration.stream import run_layer
from ..checkpoint.header import parse_header
from ..checkpoint.reader import read_header, read_tensors
from ..planning.plan import Plan
from ..planning.unit import PlannedTensor, Unit
from ..quant.formats import decompress


def replay_layer(
    layer: Layer, unit: Unit, plan: Plan, output: Path, streams: Streams, micro_batch: int, ranks: Ranks
) -> None:
    """Move both streams through a finished layer. layer: made of the source's weights; left with the stored ones.

    Raises CheckpointError for a shard that cannot be read.
    """
    run_layer(layer, streams.source, micro_batch, ranks=ranks)
    assert unit.layer is not None
    prefix, used = plan.family.layer_prefix(unit.layer), layer_shapes(layer.spec)
    planned = {t.name.removeprefix(prefix): t for t in unit.tensors if t.name.removeprefix(prefix) in used}
    raw = _stored(output, unit, planned)
    for name, tensor in planned.items():
        layer.set_weight(name, _dense(tensor, raw, plan.recipe.format))
    layer.round_activations({name: t.scheme for name, t in planned.items() if t.action == "quantize"})
    run_layer(layer, streams.quantized, micro_batch, ranks=ranks)


def _stored(output: Path, unit: Unit, planned: Mapping[str, PlannedTensor]) -> dict[str, torch.Tensor]:
    """Every stored tensor of these, from the unit's shard."""
    path = output / unit.shard
    _, raw, stamp = read_header(path)
    header = parse_header(raw, stamp.size, unit.shard, str(path))
    wanted = {o.name for tensor in planned.values() for o in tensor.outputs}
    infos = [info for info in header.tensors if info.name in wanted]
    return read_tensors(output, infos, {unit.shard: stamp})


def _dense(planned: PlannedTensor, raw: Mapping[str, torch.Tensor], fmt: str) -> torch.Tensor:
    """What an engine computes with: dequantized to BF16, or as stored."""
    if not planned.scheme.quantizes:
        return raw[planned.name]
    shape = planned.source.shape
    return decompress(planned.parts(raw), planned.scheme, fmt, shape, name=planned.name).to(torch.bfloat16)
