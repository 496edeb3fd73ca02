"""Round a chunk of GLU units to integers: ranges by second moments, and w3 -> w2 scales where they are exact.

Weights are returned as they act on *unfolded* inputs, q(W s) / s, so that the source's inputs and routing serve every
variant.
"""

from dataclasses import dataclass, replace

import torch

from m3quant.calibration.awq_settings import AwqSettings
from m3quant.calibration.glu import Glu, GluBlock
from m3quant.calibration.grouped import gated_rows, times
from m3quant.calibration.ranges import blend
from m3quant.calibration.round_weight import RoundedWeight, round_weight
from m3quant.calibration.scales import candidate, ratios, relative_magnitude
from m3quant.schemes import Scheme

# A second moment from n rows is blended with a prior worth so many rows. For w1/w3 that is the layer's mean over all
# tokens; for w2, whose channels mean something else in every expert, its own mean over channels. Held-out int4 error of
# 128 x 1024 weights, relative to 2,048 rows without a prior: from 2 rows w1/w3 15 % worse without and 9 % with this
# prior, w2 81 % and 35 %; from 8 rows 3 % and 3 %, 25 % and 19 %; from 32 rows on the prior makes no difference.
INPUT_PRIOR_ROWS = 8.0
DOWN_PRIOR_ROWS = 4.0


@dataclass
class Rounded:
    """weights: as they act. shrink: per role (gate, up, down) [e, N, G] or None. pair: t [e, I], 1 if rejected."""

    weights: Glu
    shrink: list[torch.Tensor | None]
    pair: torch.Tensor | None
    error_before: float  # sum of activation-weighted squared rounding errors at full range
    error_after: float  # and at the chosen ranges


class Rounder:
    """How a block is rounded. effective [H]: scale folded into the norm; moment [H]: the layer's mean h^2."""

    def __init__(
        self,
        block: GluBlock,
        settings: AwqSettings,
        effective: torch.Tensor,
        moment: torch.Tensor,
        ranges: bool,
        pair: bool,
    ) -> None:
        self.block, self.settings, self.effective, self.moment = block, settings, effective, moment
        self.ranges, self.pair = ranges, pair

    def __call__(self, indices: list[int], source: Glu) -> Rounded:
        schemes = self.block.units[indices[0]].schemes
        inputs = self._input_moment(indices) / self.effective.square() if self.ranges else None
        gate = self._round(source.gate, schemes[0], self.effective, inputs)
        up = self._round(source.up, schemes[1], self.effective, inputs)
        hidden = self._down_moment(indices, gate.acting, up.acting) if self.ranges else None
        ones = torch.ones(len(source.down), source.down.shape[2], device=source.down.device)
        down = self._round(source.down, schemes[2], ones, hidden)
        parts = (gate, up, down)
        result = Rounded(
            weights=Glu(gate.acting, up.acting, down.acting),
            shrink=[part.shrink for part in parts],
            pair=None,
            error_before=sum(part.before for part in parts),
            error_after=sum(part.after for part in parts),
        )
        return self._try_pair(indices, source, result, hidden) if self.pair else result

    def _input_moment(self, indices: list[int]) -> torch.Tensor:
        own = self.block.input_moments(indices)
        return blend(own, self.moment, self._rows(indices), INPUT_PRIOR_ROWS)

    def _down_moment(self, indices: list[int], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        own = self.block.down_moments(indices, gate, up)
        return blend(own, _flat_prior(own), self._rows(indices), DOWN_PRIOR_ROWS)

    def _rows(self, indices: list[int]) -> torch.Tensor:
        return torch.tensor([[float(len(self.block.units[i].tokens))] for i in indices], device=self.block.h.device)

    def _round(
        self, weight: torch.Tensor, scheme: Scheme, column: torch.Tensor, moment: torch.Tensor | None
    ) -> RoundedWeight:
        """Round weight [e, N, K] folded by column [K] or [e, K]. moment [e, K]: of the folded input; None: no ranges."""
        if scheme.kind != "int":
            return RoundedWeight(weight)
        dtype, signed = self.settings.scale_dtype, self.settings.signed_scales
        return round_weight(weight, scheme, column, moment=moment, scale_dtype=dtype, signed=signed)

    def _try_pair(self, indices: list[int], source: Glu, plain: Rounded, hidden: torch.Tensor | None) -> Rounded:
        """Per expert, scale up's rows by 1/t and down's columns by t where that lowers its own output error."""
        up_scheme, down_scheme = self.block.units[indices[0]].schemes[1:]
        h, gates = self._padded_rows(indices)
        # In float32: a channel whose activations all but cancel would get another scale from TF32's.
        activations = self._hidden(h, plain.weights, exact=True) * gates[..., None]
        t = self._best_pair(activations, gates, source.down, down_scheme, indices)
        down = self._round(source.down, down_scheme, t, None if hidden is None else hidden / t.square())
        up = source.up
        if up_scheme.kind == "int":
            dtype = self.settings.scale_dtype
            up = round_weight(source.up, up_scheme, self.effective, t, shrink=plain.shrink[1], scale_dtype=dtype).acting
        paired = Glu(plain.weights.gate, up, down.acting)
        target = self._unit_output(h, gates, source)
        better = self._loss(h, gates, paired, target) < self._loss(h, gates, plain.weights, target)
        pick = better[:, None, None]
        weights = Glu(
            plain.weights.gate,
            torch.where(pick, paired.up, plain.weights.up),
            torch.where(pick, paired.down, plain.weights.down),
        )
        shrink_of_down = plain.shrink[2]
        if shrink_of_down is not None and down.shrink is not None:
            shrink_of_down = torch.where(pick, down.shrink, shrink_of_down)
        t = torch.where(better[:, None], t, 1.0)
        # Errors stay those of the plain folds: weighted errors of differently scaled inputs do not compare.
        return replace(plain, weights=weights, shrink=[*plain.shrink[:2], shrink_of_down], pair=t)

    def _best_pair(
        self, activations: torch.Tensor, gates: torch.Tensor, down: torch.Tensor, scheme: Scheme, indices: list[int]
    ) -> torch.Tensor:
        """The t [e, I] of the ratio whose rounded down-projection changes the expert's output least; 1 if none helps.

        activations: [e, n, I], what down reads, times the gate weights [e, n] (zero in padding); down: [e, H, I].
        """
        mean = activations.abs().sum(1) / gates.sum(1).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        mean = blend(mean, _flat_prior(mean), self._rows(indices), DOWN_PRIOR_ROWS)
        w_mean = relative_magnitude(down, scheme).mean(-2)
        best_t = torch.ones_like(mean)
        best = self._down_loss(activations, down, best_t, scheme)
        for ratio in ratios(self.settings.n_grid):
            t = candidate(mean, w_mean, ratio, self.settings.duo_scaling)
            loss = self._down_loss(activations, down, t, scheme)
            better = loss < best
            best = torch.where(better, loss, best)
            best_t = torch.where(better[:, None], t, best_t)
        return best_t

    def _down_loss(
        self, activations: torch.Tensor, down: torch.Tensor, t: torch.Tensor, scheme: Scheme
    ) -> torch.Tensor:
        dtype = self.settings.scale_dtype
        error = round_weight(down, scheme, t, scale_dtype=dtype, difference=True).acting
        return times(activations, error).square_().sum((1, 2), dtype=torch.float64)

    def _padded_rows(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Up to pair_tokens rows of every unit, spread evenly: h [e, n, H] float32, gates [e, n], 0 for padding."""
        cap = self.settings.pair_tokens
        units = [self.block.units[i] for i in indices]
        most = max(1, min(cap, max(len(unit.tokens) for unit in units)))
        h = self.block.h.new_zeros(len(units), most, self.block.h.shape[1], dtype=torch.float32)
        gates = torch.zeros(len(units), most, device=h.device)
        for slot, unit in enumerate(units):
            count = min(most, len(unit.tokens))
            if count:
                pick = torch.arange(count, device=h.device) * len(unit.tokens) // count
                h[slot, :count] = self.block.h[unit.tokens[pick]].float()
                gates[slot, :count] = unit.weights[pick]
        return h, gates

    def _hidden(self, h: torch.Tensor, weights: Glu, exact: bool = False) -> torch.Tensor:
        return gated_rows(h, weights.gate.float(), weights.up.float(), self.block.activation, exact)

    def _unit_output(self, h: torch.Tensor, gates: torch.Tensor, weights: Glu) -> torch.Tensor:
        return times(self._hidden(h, weights), weights.down.float()) * gates[..., None]

    def _loss(self, h: torch.Tensor, gates: torch.Tensor, weights: Glu, target: torch.Tensor) -> torch.Tensor:
        return (self._unit_output(h, gates, weights) - target).square().sum((1, 2), dtype=torch.float64)


def _flat_prior(own: torch.Tensor) -> torch.Tensor:
    """The mean over channels, [e, K] -> [e, 1]; 1 for a unit without data, where every channel then counts alike."""
    mean = own.mean(-1, keepdim=True)
    return torch.where(mean > 0, mean, 1.0)
