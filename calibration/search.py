"""What the attention and the feed-forward search share: losses, the choice between candidates, and a block's result."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from m3quant.calibration.folds import FoldGroup
from m3quant.calibration.ranks import ALONE, Ranks
from m3quant.errors import CalibrationError
from m3quant.quant.integer import FINITE_REMEDY

_ELEMENTS = 1 << 24  # differences formed at once, so that a loss in float64 needs no second copy of the output


@dataclass
class BlockResult:
    """What to store for one block (attention or feed-forward), by tensor name relative to the layer.

    column [K] and row [N] float32: a weight is stored as source * column / row. norms: norms to store in their own
    dtype. shrink [N, G] float32: range factors of integer-quantized weights; absent means 1. log: JSON-able.
    """

    column: dict[str, torch.Tensor] = field(default_factory=dict)
    row: dict[str, torch.Tensor] = field(default_factory=dict)
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    shrink: dict[str, torch.Tensor] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)

    def fold(self, group: FoldGroup, norm: torch.Tensor, effective: torch.Tensor) -> None:
        """Store this norm, and multiply every reader's columns by the scale that took effect."""
        self.norms[group.norm] = norm.cpu()
        for name in (*group.readers, *group.compensated):
            self.column[name] = effective.cpu()


def rows_in_float64(parts: Iterable[torch.Tensor]) -> float:
    """Sum of squares of float32 parts, accumulated in float64."""
    return sum(float(part.double().square().sum()) for part in parts)


def squared_error(output: torch.Tensor, reference: torch.Tensor, where: str) -> float:
    """Sum of (output - reference)^2 in float64; both of one shape. Raises CalibrationError if it is not finite."""
    step = max(1, _ELEMENTS // max(1, reference[0].numel())) if len(reference) else 1
    pairs = zip(torch.split(output, step), torch.split(reference, step), strict=True)
    loss = rows_in_float64(a.float() - b.float() for a, b in pairs)
    if not math.isfinite(loss):
        raise CalibrationError(
            f"{where}: the output with rounded weights is not finite; look for extreme weights in this layer, "
            "or keep it unquantized."
        )
    return loss


def energy(output: torch.Tensor) -> float:
    """Sum of squares, never zero, so that errors can be given relative to it."""
    step = max(1, _ELEMENTS // max(1, output[0].numel())) if len(output) else 1
    return max(rows_in_float64(torch.split(output, step)), torch.finfo(torch.float64).tiny)


def best_ratio(
    group: str,
    options: Iterable[tuple[float, torch.Tensor, torch.Tensor]],
    loss: Callable[[torch.Tensor], float],
    identity: torch.Tensor,
    ranks: Ranks = ALONE,
) -> tuple[torch.Tensor | None, torch.Tensor, dict[str, Any]]:
    """Try identity and every (ratio, norm to store, effective scale); the first of the lowest losses wins.

    Returns the winner's norm (None for identity), its effective scale, and the log entry; ratio None means identity.
    ranks: processes among which the candidates are divided.
    """
    tried = list(options)
    identity_loss, *values = ranks.map(loss, [identity, *(effective for _, _, effective in tried)])
    best: tuple[float | None, torch.Tensor | None, torch.Tensor, float] = (None, None, identity, identity_loss)
    losses = []
    for (ratio, norm, effective), value in zip(tried, values, strict=True):
        losses.append([ratio, value])
        if value < best[3]:
            best = (ratio, norm, effective, value)
    log = {"group": group, "ratio": best[0], "identity_loss": identity_loss, "chosen_loss": best[3], "losses": losses}
    return best[1], best[2], log


def choose(errors: Mapping[str, float]) -> str:
    """The variant with the lowest error; on a tie the earlier, simpler one."""
    return min(errors, key=lambda name: errors[name])


def require_finite(tensor: torch.Tensor, layer: int, name: str) -> None:
    """Raises CalibrationError naming layer and activation if a value is NaN or infinite."""
    if found := _not_finite(tensor):
        raise CalibrationError(
            f"layer {layer}: {name} holds {found} values, although the layer's weights are finite: the layers before it overflow on "
            "this text; m3quant eval of the source names the first that does."
        )


def require_finite_weight(tensor: torch.Tensor, layer: int, name: str) -> None:
    """Raises CalibrationError naming layer and weight if a value is NaN or infinite."""
    if found := _not_finite(tensor):
        raise CalibrationError(f"layer {layer}: {name} holds {found} values, which no recipe mends: {FINITE_REMEDY}.")


def _not_finite(tensor: torch.Tensor) -> str:
    """'3 NaN or Inf of 8', or nothing."""
    if not tensor.is_floating_point() or not tensor.numel() or bool(torch.isfinite(tensor).all()):
        return ""
    return f"{int((~torch.isfinite(tensor)).sum())} NaN or Inf of {tensor.numel()}"


def range_log(shrinks: Iterable[torch.Tensor], before: float, after: float) -> dict[str, float]:
    """Mean magnitude of the range factors over all groups, the share of negative scales, and the part of the weighted
    rounding error that the search removed.
    """
    parts = list(shrinks)
    total, negative, count = 0.0, 0, sum(part.numel() for part in parts)
    if parts:
        # Stacked, so that a GPU is waited for once and not once a weight.
        total = sum(torch.stack([part.abs().sum(dtype=torch.float64) for part in parts]).tolist())
        negative = int(torch.stack([(part < 0).sum() for part in parts]).sum())
    return {
        "mean_shrink": total / count if count else 1.0,
        "negative_share": negative / count if count else 0.0,
        "gain": 1 - after / before if before else 0.0,
    }
