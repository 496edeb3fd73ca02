"""The rows that the feed-forward block's units read, in both streams, and the difference of their outputs from the target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from m3quant.calibration import ops
from m3quant.calibration.feedback.moments import Moments, MomentSum, Segment, boundary
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.glu import Glu, Unit
from m3quant.calibration.layers import Layer
from m3quant.calibration.precision import full_float32
from m3quant.quant.activations import round_activations
from m3quant.schemes import Activations

ROWS = 8192  # activation rows in work at once
# Rows of several units in one block, which takes segments until it has as many. On a CPU each segment is a block of its own:
# launches cost nothing there, and no number can depend on which rows lie beside an expert's own.
_BLOCK_ROWS = {"cpu": 1, "cuda": 1 << 15}


@dataclass
class MlpStates:
    """Both residual streams after attention, [T, H]: the quantized model's and the source's. window: tokens of one."""

    quantized: torch.Tensor
    source: torch.Tensor
    window: int


@dataclass(frozen=True)
class RowBlock:
    """Rows of a chunk's units, unit by unit. tokens: [n] int64; gates: [n] float32; units: (slot, its rows) in order."""

    tokens: torch.Tensor
    gates: torch.Tensor
    segments: list[Segment]
    units: list[tuple[int, slice]]

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [n, K], each unit's rows times its own of weight [E, N, K] transposed -> [n, N] in x's dtype."""
        out = x.new_empty(len(x), weight.shape[1])
        with full_float32():
            for unit, rows in self.units:
                out[rows] = ops.linear(x[rows], weight[unit])
        return out


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

    def _blocks(self, units: Sequence[Unit], natural: bool = False) -> Iterator[RowBlock]:
        """All rows of these units, or the routed ones alone, in order."""
        most, count, waiting = _BLOCK_ROWS[self.layer.device.type], 0, list[tuple[int, int, slice]]()
        for slot, unit in enumerate(units):
            spans = [(0, slice(0, unit.natural))] if natural else self._parts[unit.names]
            for half, span in spans:
                for rows in Segment(slot, half, span).pieces():
                    waiting.append((slot, half, rows))
                    count += rows.stop - rows.start
                    if count >= most:
                        yield _block(units, waiting)
                        count, waiting = 0, []
        if waiting:
            yield _block(units, waiting)

    def quantized(self, tokens: torch.Tensor) -> torch.Tensor:
        """The normed inputs [n, H] of these tokens in the quantized stream, before a product rounds them."""
        return self.layer.mlp_input(self.states.quantized[tokens])

    def source(self, tokens: torch.Tensor) -> torch.Tensor:
        """The same in the source stream; in the quantized one, if its errors are not to be compensated."""
        return self.layer.mlp_input(
            (self.states.source if self.settings.source_targets else self.states.quantized)[tokens]
        )

    def input_moments(self, units: Sequence[Unit]) -> Moments:
        """Of what gate and up read, units of one scheme; the cross moment is of the inputs."""
        width = self.layer.spec.hidden_size
        total = MomentSum(len(units), width, width, self.layer.device)
        for block in self._blocks(units):
            x = round_activations(self.quantized(block.tokens).float(), units[0].reads[0])
            total.add(x, self.source(block.tokens).float() - x, block.gates.square(), block.segments)
        return total.total()

    def layer_moment(self, activations: Activations | None) -> torch.Tensor | None:
        """The second moment [H, H] of all tokens, rounded so, per token: a prior for every expert. None if it is not finite."""
        total = MomentSum(1, self.layer.spec.hidden_size, 1, self.layer.device)
        for tokens in self.blocks():
            x = round_activations(self.quantized(tokens), activations)
            every = Segment(0, 0, slice(0, len(x)))
            total.add(x, x.new_zeros(len(x), 1), torch.ones(len(x), device=x.device), [every])
        second, _, mass, _ = total.total().of(0)
        moment = second[0] / mass[0].float()
        usable = torch.isfinite(moment).all() & (moment.diagonal().mean() > 0)
        return moment if bool(usable) else None

    def down_moments(self, units: Sequence[Unit], acting: Glu, source: Glu) -> Moments:
        """Of what down reads under the rounded gate and up, units of one scheme; stacks gate and up [E, I, H], down [E, H, I].

        The cross moment is of the outputs.
        """
        count, outputs, width = source.down.shape
        total = MomentSum(count, width, outputs, self.layer.device)
        for block in self._blocks(units):
            hidden = self._gated(self.quantized(block.tokens), acting, units[0], block)
            lost = self._hidden(self.source(block.tokens), source, block) - hidden
            short = block.linear(lost, source.down).float()
            if self.settings.residual:
                short += self.missing[block.tokens].float() / self.share[block.tokens, None]
            total.add(hidden, short, block.gates.square(), block.segments)
        return total.total()

    def outputs(self, units: Sequence[Unit], acting: Glu) -> torch.Tensor:
        """[natural rows, H] float32, unit by unit: what each adds to its routed tokens. Stacks as in `down_moments`."""
        parts = [torch.empty(0, self.layer.spec.hidden_size, device=self.layer.device)]
        for block in self._blocks(units, natural=True):
            hidden = self._gated(self.quantized(block.tokens), acting, units[0], block)
            parts.append(block.linear(hidden, acting.down).float() * block.gates[:, None])
        return torch.cat(parts)

    def _gated(self, x: torch.Tensor, weights: Glu, unit: Unit, block: RowBlock) -> torch.Tensor:
        """What down reads for normed inputs x [n, H], everything rounded as an engine does for units like this one."""
        return round_activations(self._hidden(round_activations(x, unit.reads[0]), weights, block), unit.reads[1])

    def _hidden(self, x: torch.Tensor, weights: Glu, block: RowBlock) -> torch.Tensor:
        return ops.gated(block.linear(x, weights.gate), block.linear(x, weights.up), self.activation)


def _block(units: Sequence[Unit], spans: Sequence[tuple[int, int, slice]]) -> RowBlock:
    """These spans (slot of a unit, half, rows among the unit's) side by side."""
    segments: list[Segment] = []
    whole: list[tuple[int, slice]] = []
    start = 0
    for slot, half, rows in spans:
        stop = start + rows.stop - rows.start
        segments.append(Segment(slot, half, slice(start, stop)))
        if whole and whole[-1][0] == slot:
            whole[-1] = (slot, slice(whole[-1][1].start, stop))
        else:
            whole.append((slot, slice(start, stop)))
        start = stop
    tokens = torch.cat([units[slot].tokens[rows] for slot, _, rows in spans])
    gates = torch.cat([units[slot].weights[rows] for slot, _, rows in spans])
    return RowBlock(tokens, gates, segments, whole)
