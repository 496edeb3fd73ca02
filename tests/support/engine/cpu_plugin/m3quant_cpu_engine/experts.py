"""Routed experts in plain torch for every quantization method, and the routing that M2 and M3 share.

Each quantized method keeps its own `create_weights` and loaders. After loading, its weights are dequantized to w13 [E, 2I, H]
(gate rows, then up rows) and w2 [E, H, I], and run as an unquantized layer does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch.nn import Parameter
from torch.nn.functional import linear, silu
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as unquantized
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.router import cpu_router
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from . import dequantize
from .activations import expert_quantizer, rounded

Dequantize = Callable[[Any, Any, str], torch.Tensor]  # (method, layer, "w13" | "w2") -> float32 [E, N, K]


class ReferenceExperts(mk.FusedMoEExpertsModular):  # type: ignore[misc]
    """act(x w1ᵀ) w2ᵀ per expert, summed with the routing weights in float32."""

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation in (MoEActivation.SILU, MoEActivation.SWIGLUOAI_UNINTERLEAVE)

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return True

    @staticmethod
    def _supports_parallel_config(config: Any) -> bool:
        return not config.use_ep

    @staticmethod
    def _supports_routing_method(*_: Any) -> bool:
        return True

    @staticmethod
    def _supports_router_logits_dtype(*_: Any) -> bool:
        return True

    def workspace_shapes(self, M: int, N: int, K: int, *_: Any) -> tuple[tuple[int, ...], ...]:
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        *_: Any,
        **__: Any,
    ) -> None:
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            token, slot = (topk_ids == expert).nonzero(as_tuple=True)
            x = self._read(hidden_states[token])
            middle = self._act(linear(x, w1[expert].to(x.dtype)), activation)
            result = linear(self._read(middle), w2[expert].to(x.dtype))
            total.index_add_(0, token, result.float() * topk_weights[token, slot, None].float())
        output.copy_(total)

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        quantizer = getattr(self, "input_quantizer", None)
        return x if quantizer is None else rounded(x, quantizer)

    def _act(self, gate_up: torch.Tensor, activation: Any) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        if activation == MoEActivation.SILU:
            return silu(gate) * up
        config = self.quant_config
        gate = gate.clamp(max=config.gemm1_clamp_limit)
        up = up.clamp(-config.gemm1_clamp_limit, config.gemm1_clamp_limit)
        return gate * torch.sigmoid(config.gemm1_alpha * gate) * (up + config.gemm1_beta)


# ---- what each method's parameters hold --------------------------------------------------------------------------------


def _packed(method: Any, layer: Any, part: str) -> torch.Tensor:
    bits = method.num_bits
    codes = dequantize.unpack(getattr(layer, f"{part}_weight_packed").data, -1, bits)
    zero: torch.Tensor | int = 2 ** (bits - 1)
    if not method.symmetric:
        zero = dequantize.unpack(getattr(layer, f"{part}_weight_zero_point").data, 1, bits)
    return dequantize.integer(codes, getattr(layer, f"{part}_weight_scale").data, zero)


def _fp8(method: Any, layer: Any, part: str) -> torch.Tensor:
    scale = getattr(layer, f"{part}_weight_scale", None)
    scale = getattr(layer, f"{part}_weight_scale_inv") if scale is None else scale
    return dequantize.fp8(getattr(layer, f"{part}_weight").data, scale.data)


def _awq(method: Any, layer: Any, part: str) -> torch.Tensor:
    codes = dequantize.unpack_awq(getattr(layer, f"{part}_qweight").data)
    zero = dequantize.unpack_awq(getattr(layer, f"{part}_qzeros").data)
    scale = getattr(layer, f"{part}_scales").data
    return dequantize.integer(codes.mT, scale.mT, zero.mT)  # stored K-first


def _run_dequantized(method_class: Any, dequantize_part: Dequantize, fp8_inputs: bool = False) -> None:
    """Make `method_class` run its experts as ReferenceExperts on weights that `dequantize_part` makes after loading.

    fp8_inputs: what the two products read is rounded, once before w13 and once before w2.
    """

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        dtype = self.moe.in_dtype
        weights = {part: dequantize_part(self, layer, part).to(dtype) for part in ("w13", "w2")}
        for part, weight in weights.items():
            layer.register_parameter(f"{part}_weight", Parameter(weight, requires_grad=False))
        self.moe_quant_config = unquantized.UnquantizedFusedMoEMethod.get_fused_moe_quant_config(self, layer)
        self.moe_kernel = unquantized.make_unquantized_moe_kernel(
            quant_config=self.moe_quant_config,
            moe_config=self.moe,
            backend=UnquantizedMoeBackend.CPU,
            experts_cls=ReferenceExperts,
            routing_tables=layer._expert_routing_tables(),
        )
        if fp8_inputs:
            self.moe_kernel.fused_experts.input_quantizer = expert_quantizer(self)

    method_class.process_weights_after_loading = process_weights_after_loading
    method_class.get_fused_moe_quant_config = lambda self, layer: self.moe_quant_config


def _route(compute: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's CPU router, taught sigmoid scores: the bias takes part in the choice, not in the weights."""

    def compute_routing(self: Any, hidden_states: Any, router_logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.scoring_func != "sigmoid" or self.use_grouped_topk or self.custom_routing_function is not None:
            return compute(self, hidden_states, router_logits, *args, **kwargs)
        scores = router_logits.float().sigmoid()
        choice = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias.float()
        experts = choice.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights * self.routed_scaling_factor).contiguous(), experts.to(torch.int32).contiguous()

    return compute_routing


def install() -> None:
    from vllm.model_executor.layers.quantization import auto_awq, fp8
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8 as ct_fp8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as ct_int,
    )

    cpu_router.CPURouter._compute_routing = _route(cpu_router.CPURouter._compute_routing)

    unquantized.select_unquantized_moe_backend = lambda **_: (UnquantizedMoeBackend.CPU, ReferenceExperts)
    unquantized.convert_to_unquantized_kernel_format = lambda *_, w13_weight, w2_weight, **__: (w13_weight, w2_weight)

    # The name of the backend decides which shapes and strategies a method admits: MARLIN's rules are those of a GPU.
    ct_int.select_wna16_moe_backend = lambda **_: (WNA16MoEBackend.MARLIN, ReferenceExperts)
    _run_dequantized(ct_int.CompressedTensorsWNA16MoEMethod, _packed)
    ct_fp8.select_fp8_moe_backend = lambda **_: (Fp8MoeBackend.CPU, ReferenceExperts)
    _run_dequantized(ct_fp8.CompressedTensorsW8A8Fp8MoEMethod, _fp8, fp8_inputs=True)
    fp8.select_fp8_moe_backend = lambda **_: (Fp8MoeBackend.CPU, ReferenceExperts)
    _run_dequantized(fp8.Fp8MoEMethod, _fp8, fp8_inputs=True)
    auto_awq.select_wna16_moe_backend = lambda *_, **__: (WNA16MoEBackend.MARLIN, ReferenceExperts)
    auto_awq.check_moe_marlin_supports_layer = lambda *_, **__: True  # the method that a GPU would pick
    _run_dequantized(auto_awq.AutoAWQMoEMethod, _awq)
