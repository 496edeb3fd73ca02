"""AWQ's candidate scales: per input channel, from the mean magnitudes of activations and weights.

AutoAWQ's formula (`awq/quantize/quantizer.py`), for a ratio r:  s = x_mean^r / (w_mean^(1-r) + 1e-4), at least 1e-4,
divided by sqrt(max * min); without duo scaling s = x_mean^r (llm-awq). A channel with large activations gets a large
s: its weights are multiplied by s before rounding and the activation divided by it, so it loses less.
"""

from collections.abc import Iterable

import torch

from m3quant.schemes import Scheme

_FLOOR = 1e-4


def ratios(n_grid: int) -> list[float]:
    """n_grid ratios from 0 to 1, both ends included (AutoAWQ stops at 0.95)."""
    return [i / max(n_grid - 1, 1) for i in range(n_grid)]


def candidate(x_mean: torch.Tensor, w_mean: torch.Tensor, ratio: float, duo: bool = True) -> torch.Tensor:
    """The scale of one ratio. x_mean, w_mean: [..., K], non-negative -> [..., K] float32, positive and finite."""
    scale = x_mean.float().pow(ratio)
    if duo:
        scale = scale / (w_mean.float().pow(1 - ratio) + _FLOOR)
    scale = scale.clamp(min=_FLOOR)
    scale = scale / (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt()
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)


def relative_magnitude(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """|w| over the largest |w| of its group, in [0, 1], zeros for a group of zeros: [..., N, K] -> same shape."""
    groups = torch.unflatten(weight.abs(), -1, (-1, scheme.group_size or weight.shape[-1]))
    largest = groups.amax(-1, keepdim=True)
    return (groups / torch.where(largest > 0, largest, 1.0)).flatten(-2)


def weight_mean(weights: Iterable[tuple[torch.Tensor, Scheme]]) -> torch.Tensor:
    """Mean of relative_magnitude over all rows of all weights ([..., N, K] each, one K) -> [K] float32."""
    total, rows = torch.zeros(()).double(), 0
    for weight, scheme in weights:
        part = relative_magnitude(weight.float(), scheme).flatten(0, -2)
        total = total.to(part.device) + part.sum(0, dtype=torch.float64)
        rows += part.shape[0]
    return (total / rows).float()
