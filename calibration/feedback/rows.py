"""The rows that the feed-forward block's units read, in both streams, and the difference of their outputs from the target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from m3quant.calibration import ops
from m3quant.calibration.feedback.moments import Moments, MomentSum, boundary
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.glu import Glu, Unit
from m3quant.calibration.layers import Layer
from m3quant.quant.activations import round_activations
from m3quant.schemes import Activations

ROWS = 8192  # activation rows in work at once


@dataclass
class MlpStates:
    """Both residual streams after attention, [T, H]: the quantized model's and the source's. window: tokens of one."""

    quantized: torch.Tensor
    source: torch.Tensor
    window: int


class UnitRows:
    """Moments and outputs of units (routed experts, or the MLP that sees every token), block of rows by block.

    missing: [T, H], what the units' outputs together have to compensate beyond their own errors; share: [T], the sum of the
    weights of the units that share it.
    """

    def __init__(self, layer: Layer, states: MlpStates, settings: FeedbackSettings) -> None:
        self.layer, self.states, self.settings = layer, states, settings
        self.activation = layer.spec.activation
        self.second_half = boundary(len(states.quantized), states.window)
        self._parts: dict[tuple[str, str, str], list[tuple[int, slice]]] = {}
        self.missing = states.source - states.quantized
        self.share = torch.ones(len(states.quantized), device=layer.device)

    def split(self, units: Sequence[Unit]) -> None:
        """Find where the halves of these units' rows begin, all at once: the device is waited for only here.

        Routed tokens of a unit, and those that were added to it, must each be in rising order.
        """
        if not units:
            return
        below = torch.cat([unit.tokens for unit in units]) < self.second_half
        seen = torch.cat([below.new_zeros(1, dtype=torch.int64), below.cumsum(0)])
        ends, start = [], 0
        for unit in units:
            ends += [start, start + unit.natural, start + len(unit.tokens)]
            start += len(unit.tokens)
        counts = seen[torch.tensor(ends, device=seen.device)].tolist()
        for index, unit in enumerate(units):
            first, middle, last = counts[3 * index : 3 * index + 3]
            cuts = (0, middle - first, unit.natural, unit.natural + last - middle, len(unit.tokens))
            spans = zip((0, 1, 0, 1), cuts, cuts[1:], strict=False)
            self._parts[unit.names] = [(half, slice(*span)) for half, *span in spans if span[0] < span[1]]

    def blocks(self) -> Iterator[torch.Tensor]:
        """All tokens in order, as index tensors."""
        yield from torch.split(torch.arange(len(self.share), device=self.layer.device), ROWS)

    def _halves(self, unit: Unit) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(half, tokens, gates) of the unit's rows, ROWS of one half at a time."""
        for half, span in self._parts[unit.names]:
            for tokens, gates in zip(
                torch.split(unit.tokens[span], ROWS), torch.split(unit.weights[span], ROWS), strict=True
            ):
                yield half, tokens, gates

    def quantized(self, tokens: torch.Tensor) -> torch.Tensor:
        """The normed inputs [n, H] of these tokens in the quantized stream, before a product rounds them."""
        return self.layer.mlp_input(self.states.quantized[tokens])

    def source(self, tokens: torch.Tensor) -> torch.Tensor:
        """The same in the source stream; in the quantized one, if its errors are not to be compensated."""
        return self.layer.mlp_input(
            (self.states.source if self.settings.source_targets else self.states.quantized)[tokens]
        )

    def input_moments(self, unit: Unit) -> Moments:
        """Of what gate and up read; the cross moment is of the inputs."""
        width = self.layer.spec.hidden_size
        total = MomentSum(width, width, self.layer.device)
        for half, tokens, gates in self._halves(unit):
            x = round_activations(self.quantized(tokens).float(), unit.reads[0])
            total.add(x, self.source(tokens).float() - x, gates.square(), half)
        return total.total()

    def layer_moment(self, activations: Activations | None) -> torch.Tensor | None:
        """The second moment [H, H] of all tokens, rounded so, per token: a prior for every expert. None if it is not finite."""
        width = self.layer.spec.hidden_size
        total = MomentSum(width, 1, self.layer.device)
        for tokens in self.blocks():
            x = round_activations(self.quantized(tokens), activations)
            total.add(x, x.new_zeros(len(x), 1), torch.ones(len(x), device=x.device), 0)
        second, _, mass, _ = total.total().of(None)
        return second / mass if mass and bool(torch.isfinite(second).all() & (second.diagonal().mean() > 0)) else None

    def down_moments(self, unit: Unit, acting: Glu, source: Glu) -> Moments:
        """Of what down reads under the rounded gate and up; weights [I, H] and [H, I]. The cross moment is of the outputs."""
        total = MomentSum(source.down.shape[1], source.down.shape[0], self.layer.device)
        for half, tokens, gates in self._halves(unit):
            hidden = self._gated(self.quantized(tokens), acting, unit)
            short = ops.linear(self._hidden(self.source(tokens), source) - hidden, source.down).float()
            if self.settings.residual:
                short += self.missing[tokens].float() / self.share[tokens, None]
            total.add(hidden, short, gates.square(), half)
        return total.total()

    def outputs(self, unit: Unit, acting: Glu) -> torch.Tensor:
        """[natural rows, H] float32: what the unit adds to its routed tokens."""
        parts = [torch.empty(0, self.layer.spec.hidden_size, device=self.layer.device)]
        tokens, weights = unit.tokens[: unit.natural], unit.weights[: unit.natural]
        for own, gates in zip(torch.split(tokens, ROWS), torch.split(weights, ROWS), strict=True):
            hidden = self._gated(self.quantized(own), acting, unit)
            parts.append(ops.linear(hidden, acting.down).float() * gates[:, None])
        return torch.cat(parts)

    def _gated(self, x: torch.Tensor, weights: Glu, unit: Unit) -> torch.Tensor:
        """What the unit's down reads for normed inputs x, everything rounded as an engine does."""
        return round_activations(self._hidden(round_activations(x, unit.reads[0]), weights), unit.reads[1])

    def _hidden(self, x: torch.Tensor, weights: Glu) -> torch.Tensor:
        return ops.gated(ops.linear(x, weights.gate), ops.linear(x, weights.up), self.activation)
