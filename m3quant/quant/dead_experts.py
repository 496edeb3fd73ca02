"""Experts that a pruned checkpoint has switched off: their correction bias is -inf, so that they are never among the top k.

The bias is only added to the scores that the choice is made of (facts of M2 and M3: the weights are the plain scores), and -inf plus a score is
-inf. That is exact as long as every token still has k others to choose.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.reader import bytes_view, torch_dtype
from ..errors import CheckpointError
from ..families import Family
from ..planning.source_layouts import PLAIN, SourceTensor

_FLOATS = ("F32", "BF16", "F16")


def without_dead(bias: Tensor) -> Tensor:
    """A routing bias with the -inf of experts that are switched off replaced by 0, for checks of the others."""
    return bias.masked_fill(bias == -torch.inf, 0.0)


def check_dead_experts(checkpoint: Checkpoint, family: Family, tensors: Mapping[str, SourceTensor]) -> str:
    """One sentence on the experts that are switched off, '' without any. Raises CheckpointError where fewer than top k are left.

    Reads every routing bias, of a checkpoint on the Hub too.
    """
    biases: dict[int, tuple[SourceTensor, Tensor]] = {}
    for spec in family.layers:
        if spec.moe is None or not spec.moe.use_bias:
            continue
        source = tensors.get(f"{family.layer_prefix(spec.index)}{spec.moe.bias_name}")
        if source is not None and source.kind == PLAIN and source.info.dtype in _FLOATS:
            biases[spec.index] = source, torch.empty(source.shape, dtype=torch_dtype(source.info.dtype))
    checkpoint.peek((source.info, 0, bytes_view(bias)) for source, bias in biases.values())
    dead: dict[int, int] = {}
    for layer, (source, bias) in biases.items():
        off, moe = int((bias == -torch.inf).sum()), family.layer(layer).moe
        if off and moe is not None and bias.numel() - off < moe.top_k:
            raise CheckpointError(
                f"{source.info.shard}: '{source.name}' is -inf for {off} of {bias.numel()} experts, and every token needs {moe.top_k}: restore "
                "the bias, or lower num_experts_per_tok as the checkpoint's authors did."
            )
        if off:
            dead[layer] = off
    if not dead:
        return ""
    return (
        f"{sum(dead.values())} experts in {len(dead)} layers are switched off by a routing bias of -inf (layer {min(dead)}: {dead[min(dead)]}): no "
        "token reaches them, and they are converted and stored all the same"
    )
