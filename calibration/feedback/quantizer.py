"""One layer through the feedback quantizer: attention, then the feed-forward block on the output of the rounded attention."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from m3quant.calibration.awq import require_finite_weights
from m3quant.calibration.experts import ExpertLedger, ExpertTokens, assign_tokens
from m3quant.calibration.feedback.attention import AttentionQuantizer
from m3quant.calibration.feedback.mlp import MlpQuantizer
from m3quant.calibration.feedback.rows import ROWS, MlpStates
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.head import Windows
from m3quant.calibration.layers import Layer
from m3quant.calibration.ops import Routing
from m3quant.calibration.quantized_layer import QuantizedLayer
from m3quant.calibration.spec import LayerSpec
from m3quant.schemes import Scheme


class FeedbackQuantizer:
    """`quantized_layer.LayerQuantizer` with error feedback."""

    @torch.no_grad()
    def quantize(
        self,
        spec: LayerSpec,
        tensors: Mapping[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        quantized_stream: Windows,
        source_stream: Windows,
        settings: FeedbackSettings,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        layer: Layer | None = None,
    ) -> QuantizedLayer:
        started = time.perf_counter()
        layer = layer or Layer(spec, tensors, device, dtype)
        require_finite_weights(layer)
        attention = AttentionQuantizer(layer, schemes, quantized_stream, source_stream, settings)
        weights, mid, source_mid, first = attention.run()
        states = MlpStates(mid, source_mid, quantized_stream.shape[1])
        assigned, ledger = _assign(layer, mid, settings)
        second = MlpQuantizer(layer, schemes, states, assigned, settings).run()
        log: dict[str, Any] = {"layer": spec.index, "blocks": [first, second.log]}
        if ledger is not None:
            log["experts"] = ledger.summary() | {"starved": ledger.starved}
        log["seconds"] = time.perf_counter() - started
        return QuantizedLayer({**weights, **second.weights}, {}, log, ledger, second.stacks)


def _assign(
    layer: Layer, mid: torch.Tensor, settings: FeedbackSettings
) -> tuple[ExpertTokens | None, ExpertLedger | None]:
    spec = layer.spec
    if spec.moe is None:
        return None, None
    routings, scores = [], []
    for part in torch.split(mid, ROWS):
        h = layer.mlp_input(part)
        routings.append(layer.routing(h))
        scores.append(layer.router_scores(h))
    routing = Routing(torch.cat([r.experts for r in routings]), torch.cat([r.weights for r in routings]))
    floor, strict = settings.min_expert_tokens, settings.strict_coverage
    return assign_tokens(
        routing,
        torch.cat(scores),
        spec.moe.routed_scaling,
        spec.index,
        floor,
        strict,
        normalise=spec.moe.normalise,
    )
