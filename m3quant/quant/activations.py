"""Activations as an engine computes with them: E4M3 under scales that it finds while it runs.

    scale = max(max|x| / 448, floor)        code = e4m3(clamp(x / scale, -448, 448))        x' = code * scale

One scale per token (vLLM's `scaled_fp8_quant` with `use_per_token_if_dynamic`, csrc/quantization/w8a8/fp8; floor
1 / (448 * 512)), or one per token and run of channels (`per_token_group_quant_fp8`; floor 1e-10 / 448). vLLM's plain
forms of both are `QuantFP8.forward_native`. With DeepGEMM vLLM rounds the scales of runs up to powers of two; that
depends on the machine and is not done here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..schemes import Activations
from .fp8 import E4M3_MAX

_TOKEN_FLOOR = 1.0 / (E4M3_MAX * 512.0)
_GROUP_FLOOR = 1e-10 / E4M3_MAX
_ELEMENTS = 1 << 22  # rounded at once: each takes about 16 bytes of scratch


def round_activations(x: Tensor, activations: Activations | None) -> Tensor:
    """x [..., K] as a product under `activations` reads it, in x's dtype; x itself for None.

    float64 stays float64, other dtypes are rounded in float32. In BF16 the result is rounded to BF16 once more, as
    dequantized weights are. A row (or run) that holds NaN or Inf comes out with NaN. The last run may be shorter.
    """
    if activations is None:
        return x
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows)
    step = max(1, _ELEMENTS // max(1, x.shape[-1]))
    for start in range(0, len(rows), step):
        out[start : start + step] = _rows(rows[start : start + step], activations.group_size)
    return out.view(x.shape)


def round_cached(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Keys or values as an FP8 cache gives them back, e4m3(clamp(x / scale)) * scale, in x's dtype.

    scale: one number, or one that broadcasts over x (per head). vLLM's cache saturates at 448 times the scale
    (csrc/quantization/w8a8/fp8/nvidia/quant_utils.cuh, `__NV_SATFINITE`); NaN stays NaN.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return (_codes(wide / scale) * scale).to(x.dtype)


def _rows(x: Tensor, size: int | None) -> Tensor:
    """Rows [n, K] rounded, float64 or float32; size: channels of a run, None for the whole row."""
    wide = x if x.dtype == torch.float64 else x.float()
    if size is None:
        return _rounded(wide, _TOKEN_FLOOR)
    padded = F.pad(wide, (0, -wide.shape[-1] % size))
    return _rounded(torch.unflatten(padded, -1, (-1, size)), _GROUP_FLOOR).flatten(-2)[:, : x.shape[-1]]


def _rounded(x: Tensor, floor: float) -> Tensor:
    # A tensor divisor: CUDA turns division by a Python number into a product with its reciprocal, one bit off the CPU's.
    largest = x.abs().amax(-1, keepdim=True)
    scale = (largest / torch.full((), E4M3_MAX, dtype=x.dtype, device=x.device)).clamp_min(floor)
    return _codes(x / scale).mul_(scale)


def _codes(x: Tensor) -> Tensor:
    """x rounded to E4M3 with saturation, in x's dtype."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)
