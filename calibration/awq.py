"""Calibrate one layer: exact folds, integer ranges, and the record of what each of them gained.

Order, as the quantized model will run: attention first; then the feed-forward block on what the rounded attention
hands it. Each block is stored in the best of three ways, by its own output error on tokens that took no part in
choosing the scale (as far as there are enough): rounded to nearest, with searched ranges, with folds and searched
ranges.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from m3quant.calibration.awq_attention import AttentionSearch
from m3quant.calibration.awq_mlp import MlpSearch
from m3quant.calibration.awq_settings import AwqSettings
from m3quant.calibration.experts import ExpertLedger, ExpertTokens, assign_tokens
from m3quant.calibration.folds import fold_groups, scale_columns
from m3quant.calibration.head import Windows
from m3quant.calibration.layers import Layer
from m3quant.calibration.ops import Routing
from m3quant.calibration.ranges import fake_quantize, qparams
from m3quant.calibration.search import BlockResult, require_finite, require_finite_weight
from m3quant.calibration.stream import HiddenStates
from m3quant.errors import CalibrationError
from m3quant.families.spec import INPUT_NORM, MLP_NORM, LayerSpec, layer_shapes
from m3quant.quant.dead_experts import without_dead
from m3quant.schemes import KEEP, Scheme

_ROWS = 8192


@dataclass
class CalibratedLayer:
    """How to store one layer. Weights are made on demand from the source tensors; nothing is copied.

    column [K], row [N]: float32 folds by tensor name, weight = source * column / row. shrink [N, G]: range factors.
    other: norms, router and kept linears that a fold changed, in their stored dtype; every tensor not in `other` and
    without a scheme is stored as it was. log: JSON-able. ledger: None for a dense layer.
    """

    source: Mapping[str, torch.Tensor]
    schemes: Mapping[str, Scheme]
    column: dict[str, torch.Tensor]
    row: dict[str, torch.Tensor]
    shrink: dict[str, torch.Tensor]
    other: dict[str, torch.Tensor]
    log: dict[str, Any]
    ledger: ExpertLedger | None
    scale_dtype: torch.dtype = torch.bfloat16
    device: torch.device | str = field(default="cpu")

    def weight(self, name: str) -> torch.Tensor:
        """The folded weight [N, K] float32, on self.device, ready to be compressed in its scheme."""
        weight = self.source[name].to(self.device).float()
        if name in self.column:
            weight = weight * self.column[name].to(self.device)
        if name in self.row:
            weight = weight / self.row[name].to(self.device)[:, None]
        return weight

    def qparams(self, name: str, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(scale [N, G] float32, zero point int8 or None) of an integer weight; weight: `weight(name)` if at hand."""
        return qparams(self.weight(name) if weight is None else weight, self._scheme(name), *self._range(name))

    def dequantized(self, name: str) -> torch.Tensor:
        """The float32 [N, K] that an engine computes with after loading this integer-quantized weight."""
        return fake_quantize(self.weight(name), self._scheme(name), *self._range(name))

    def _range(self, name: str) -> tuple[float | torch.Tensor, torch.dtype]:
        shrink = self.shrink.get(name)
        return 1.0 if shrink is None else shrink.to(self.device), self.scale_dtype

    def _scheme(self, name: str) -> Scheme:
        scheme = self.schemes.get(name, KEEP)
        if scheme.kind != "int":
            raise CalibrationError(
                f"{name} is stored as {scheme}, which has no integer scale; compress weight('{name}')."
            )
        return scheme


def require_finite_weights(layer: Layer) -> None:
    """Raises CalibrationError naming the first weight of the layer that holds NaN or Inf."""
    stacks = layer.expert_stacks()
    whole = stacks is not None and all(bool(torch.isfinite(stack).all()) for stack in stacks)
    for name in layer_shapes(layer.spec):
        if not (whole and layer.spec.moe and layer.spec.moe.expert_of(name)):
            weight = layer.weight(name)
            bias = layer.spec.moe is not None and name == layer.spec.moe.bias_name
            require_finite_weight(without_dead(weight) if bias else weight, layer.spec.index, name)


@torch.no_grad()
def calibrate_layer(
    spec: LayerSpec,
    tensors: Mapping[str, torch.Tensor],
    schemes: Mapping[str, Scheme],
    x: Windows | torch.Tensor,
    settings: AwqSettings,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    layer: Layer | None = None,
) -> CalibratedLayer:
    """Calibrate one decoder layer.

    tensors: the layer's tensors by relative name, dequantized (BF16 or F32). schemes: scheme by relative weight name;
    a name without one is kept. x: hidden states [S, L, H] entering this layer in the quantized stream. device: where
    to compute; dtype: of activations (default float32 on the CPU, bfloat16 elsewhere). layer: those tensors where a
    forward pass has already put them; its attention is left rounded. Feed-forward losses are
    float32 on the CPU, and on a GPU TF32 products summed in float32 (`grouped`). The same arguments on the same device give the same bytes. Raises CalibrationError for a
    tensor or activation that is not finite, and, with settings.strict_coverage, for experts below the floor.
    """
    started = time.perf_counter()
    groups = {group.norm: group for group in fold_groups(spec, schemes)}
    layer = layer or Layer(spec, tensors, device, dtype)
    resident = {
        name: layer.weight(name) for name in layer_shapes(spec)
    }  # the layer's own tensors: one copy on the device
    stacks = layer.expert_stacks()
    require_finite_weights(layer)

    states = HiddenStates(x) if isinstance(x, torch.Tensor) else x
    attention = AttentionSearch(layer, spec, resident, schemes, states, settings)
    first = attention.run(groups.get(INPUT_NORM))
    h = attention.mlp_inputs()
    require_finite(h, spec.index, "the input of the feed-forward block")
    assigned, ledger = _assign(layer, h, settings)
    second = BlockResult(log={"block": "mlp", "groups": [], "chosen": "unquantized"})
    search = MlpSearch(spec, resident, schemes, h, assigned, settings, stacks)
    if any(unit.quantized for unit in search.block.units):
        second = search.run(groups.get(MLP_NORM))

    column = {**first.column, **second.column}
    log: dict[str, Any] = {"layer": spec.index, "blocks": [first.log, second.log]}
    if ledger is not None:
        log["experts"] = ledger.summary() | {"starved": ledger.starved}
    other = {**first.norms, **second.norms}
    for name, scale in column.items():
        if not schemes.get(name, KEEP).quantizes:
            other[name] = scale_columns(tensors[name], scale.to(tensors[name].device))
    log["rounded_readers"] = sorted(n for n in other if other[n].ndim == 2 and other[n].dtype != torch.float32)
    log["seconds"] = time.perf_counter() - started
    return CalibratedLayer(
        source=tensors,
        schemes=schemes,
        column=column,
        row={**first.row, **second.row},
        shrink={**first.shrink, **second.shrink},
        other=other,
        log=log,
        ledger=ledger,
        scale_dtype=settings.scale_dtype,
    )


def _assign(layer: Layer, h: torch.Tensor, settings: AwqSettings) -> tuple[ExpertTokens | None, ExpertLedger | None]:
    """Route every token of h [T, H] with the source's router, and top starved experts up."""
    spec = layer.spec
    if spec.moe is None:
        return None, None
    parts = torch.split(h, _ROWS)
    routings = [layer.routing(part) for part in parts]
    routing = Routing(torch.cat([r.experts for r in routings]), torch.cat([r.weights for r in routings]))
    scores = torch.cat([layer.router_scores(part) for part in parts])
    floor, strict = settings.min_expert_tokens, settings.strict_coverage
    return assign_tokens(
        routing, scores, spec.moe.routed_scaling, spec.index, floor, strict, normalise=spec.moe.normalise
    )
