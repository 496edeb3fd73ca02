"""What a product under dynamic FP8 activations reads, by vLLM's own quantizer (`QuantFP8`, in its plain form on a CPU).

With M3QUANT_CPU_ENGINE_ACTIVATIONS=exact nothing is rounded, so that weights can be compared to the last digits.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape


def rounded(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """x [.., K] as `quantizer` makes codes and scales of it, put together again in x's dtype."""
    if os.environ.get("M3QUANT_CPU_ENGINE_ACTIVATIONS") == "exact":
        return x
    rows = x.reshape(-1, x.shape[-1])
    codes, scale = quantizer.forward_native(rows)
    runs = codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale.float().unsqueeze(-1)
    return runs.flatten(-2).to(x.dtype).view(x.shape)


def expert_quantizer(method: Any) -> Any:
    """The quantizer of an FP8 method's experts: per token, or per token and 128 channels where its weights have blocks.

    vLLM's fused experts quantize in a kernel (fused_moe/utils.py `_fp8_quantize`) that a CPU build does not have.
    """
    if method.weight_block_size is not None:
        return QuantFP8(static=False, group_shape=GroupShape(1, method.weight_block_size[1]), use_ue8m0=False)
    return QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
