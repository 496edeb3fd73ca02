"""Reference kernels for quantized linears: dequantize once, multiply in the activations' dtype, FP8 inputs rounded by vLLM.

vLLM picks a kernel from lists by platform. Ours go first in the CPU's lists, so the quantization method, its parameters and
their loaders stay vLLM's own.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.kernels.linear as kernels
from torch.nn.functional import linear
from vllm.platforms import PlatformEnum

from . import dequantize
from .activations import rounded


def _multiply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    weight = layer.reference_weight
    return linear(x, weight.to(x.dtype), bias)


class ReferenceIntLinear(kernels.MPLinearKernel):  # type: ignore[misc]
    """Integer weights: compressed-tensors pack-quantized, and AutoAWQ after vLLM's own conversion to the standard order."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        if not 2 <= config.weight_type.size_bits <= 8:
            return False, f"the reference kernel unpacks 2 to 8 bits, not {config.weight_type}"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        words, scale, zero = self._get_weight_params(layer)
        bits = self.config.weight_type.size_bits
        codes = dequantize.unpack(words.data, words.packed_dim, bits)
        if words.input_dim == 0:
            codes = codes.T
        scales = scale.data if scale.output_dim == 0 else scale.data.T
        shift: torch.Tensor | int = 2 ** (bits - 1)  # the code of zero where the file has no zero points
        if self.config.zero_points:
            assert zero is not None
            shift = dequantize.unpack(zero.data, zero.packed_dim, bits)
            shift = shift if zero.output_dim == 0 else shift.T
        layer.reference_weight = dequantize.integer(codes, scales, shift)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return _multiply(layer, x, bias)


class ReferenceFp8Channel(kernels.FP8ScaledMMLinearKernel):  # type: ignore[misc]
    """FP8 with one scale per output row; the method hands over the weight as [K, N]."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        if not config.weight_quant_key.scale.group_shape.is_per_channel():
            return False, "the reference kernel reads one scale per row"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.reference_weight = dequantize.fp8(layer.weight.data.T, layer.weight_scale.data)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return _multiply(layer, rounded(x, self.quant_fp8), bias)

    def apply_scaled_mm(self, **_: Any) -> torch.Tensor:
        raise NotImplementedError("apply_weights does not come here")


class ReferenceFp8Block(kernels.Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]
    """FP8 in 128x128 blocks, from compressed-tensors (`weight_scale`) or quant_method fp8 (`weight_scale_inv`)."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.reference_weight = dequantize.fp8(layer.weight.data, self._get_layer_params(layer).block_scale.data)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        return _multiply(layer, rounded(x, self.quant_fp8), bias)

    def apply_block_scaled_mm(self, *_: Any, **__: Any) -> torch.Tensor:
        raise NotImplementedError("apply_weights does not come here")


def install() -> None:
    kernels._POSSIBLE_KERNELS[PlatformEnum.CPU].insert(0, ReferenceIntLinear)
    kernels._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU].insert(0, ReferenceFp8Channel)
    kernels._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].insert(0, ReferenceFp8Block)
    # The activation dtypes a config admits describe its GPU kernels; in float32 the tests can ask for close agreement.
    from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    for config in (CompressedTensorsConfig, Fp8Config, AutoAWQConfig):
        config.get_supported_act_dtypes = classmethod(lambda cls: dtypes)
