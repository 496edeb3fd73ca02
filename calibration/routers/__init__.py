"""Routers: what a gate's logits say of every expert. One file per kind, chosen by the name in `MoeSpec.router`.

A kind's module has `scores(logits [T, E]) -> [T, E]`, non-negative, in the logits' dtype (float32 or float64). What is
common to all kinds (the bias in the choice, top-k, normalising, scaling) is `ops.route`.
"""

from collections.abc import Callable
from importlib import import_module

import torch

from m3quant.errors import CheckpointError

KINDS = ("sigmoid", "softmax")


def scores_of(kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The `scores` of a kind. Raises CheckpointError for one that has no file here."""
    if kind not in KINDS:
        raise CheckpointError(
            f"no router is called '{kind}': write calibration/routers/{kind}.py and add it to KINDS there."
        )
    scores: Callable[[torch.Tensor], torch.Tensor] = import_module(f"{__name__}.{kind}").scores
    return scores
