"""A layer's feed-forward block as a list of GLU units, so that one search serves dense, routed and shared MLPs.

A routed expert is a unit with its own tokens and gate weights; the shared expert, or a dense layer's MLP, is a unit
that sees every token with weight 1. The block's output is the weighted sum over units. Weights are kept as stored
(BF16) and upcast to float32 a chunk of units at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from m3quant.calibration.experts import ExpertTokens
from m3quant.calibration.folds import always_on_names, expert_names
from m3quant.calibration.ops import Activation, gated
from m3quant.calibration.spec import LayerSpec
from m3quant.schemes import KEEP, Scheme

# float32 elements of weight (gate, up and down together) resident at once: M3 has 57 M per expert, M2 14 M.
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 27}
_ROWS = 8192  # activation rows multiplied at once


@dataclass(frozen=True)
class Unit:
    """names: (gate, up, down). tokens [n] int64, weights [n] float32: its rows; the first `natural` were routed."""

    names: tuple[str, str, str]
    schemes: tuple[Scheme, Scheme, Scheme]
    tokens: torch.Tensor
    weights: torch.Tensor
    natural: int

    @property
    def quantized(self) -> bool:
        return any(scheme.kind == "int" for scheme in self.schemes)


@dataclass(frozen=True)
class Glu:
    """Stacked float32 weights of a chunk of units: gate and up [e, I, H], down [e, H, I]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Sample:
    """A subset of tokens, and each unit's natural rows among them (positions in the subset, gate weights)."""

    h: torch.Tensor  # [n, H] float32
    rows: list[tuple[torch.Tensor, torch.Tensor]]


class GluBlock:
    """The units of one layer over normed inputs h [T, H] of any float dtype; everything is computed where h is."""

    def __init__(
        self,
        spec: LayerSpec,
        tensors: Mapping[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        h: torch.Tensor,
        assigned: ExpertTokens | None,
    ) -> None:
        self.spec, self.tensors, self.h = spec, tensors, h
        self.activation: Activation = spec.activation
        self.units: list[Unit] = []
        self._input_moments: dict[int, torch.Tensor] = {}
        routed = expert_names(spec)
        if routed:
            assert assigned is not None, "a layer with experts needs its token assignment"
            for names, tokens, weights, natural in zip(
                routed, assigned.tokens, assigned.weights, assigned.natural, strict=True
            ):
                self.units.append(Unit(names, _schemes(names, schemes), tokens, weights, natural))
        always_on = always_on_names(spec)
        if always_on:
            everything = torch.arange(len(h), device=h.device)
            ones = torch.ones(len(h), device=h.device)
            self.units.append(Unit(always_on, _schemes(always_on, schemes), everything, ones, len(h)))

    def sample(self, tokens: torch.Tensor) -> Sample:
        """Restrict the block to `tokens` (int64, distinct)."""
        tokens = tokens.to(self.h.device)
        position = torch.full((len(self.h),), -1, device=self.h.device)
        position[tokens] = torch.arange(len(tokens), device=self.h.device)
        rows = []
        for unit in self.units:
            where = position[unit.tokens[: unit.natural]]
            rows.append((where[where >= 0], unit.weights[: unit.natural][where >= 0]))
        return Sample(self.h[tokens].float(), rows)

    def chunks(self, quantized: bool | None = None) -> Iterator[tuple[list[int], Glu]]:
        """Runs of units of one shape and scheme: (indices, weights). quantized: only units that are, or are not."""
        limit = _CHUNK["cuda" if self.h.is_cuda else "cpu"]
        wanted = [i for i, unit in enumerate(self.units) if quantized is None or unit.quantized == quantized]
        start = 0
        while start < len(wanted):
            first = self.units[wanted[start]]
            shape = self.tensors[first.names[0]].shape
            most = max(1, limit // (3 * shape.numel()))
            stop = start + 1
            while (
                stop < len(wanted)
                and stop - start < most
                and self.units[wanted[stop]].schemes == first.schemes
                and self.tensors[self.units[wanted[stop]].names[0]].shape == shape
            ):
                stop += 1
            indices = wanted[start:stop]
            yield indices, self._stack(indices)
            start = stop

    def _stack(self, indices: list[int]) -> Glu:
        parts = []
        for role in range(3):
            names = [self.units[i].names[role] for i in indices]
            parts.append(torch.stack([self.tensors[name].to(self.h.device).float() for name in names]))
        return Glu(*parts)

    def output(
        self, sample: Sample, change: Callable[[list[int], Glu], Glu] | None = None, quantized: bool | None = None
    ) -> torch.Tensor:
        """Sum over units on the sample, [n, H] float32, with weights replaced by change(indices, weights) if given."""
        out = torch.zeros_like(sample.h)
        for indices, weights in self.chunks(quantized):
            self.add_output(out, sample, indices, change(indices, weights) if change else weights)
        return out

    def add_output(self, out: torch.Tensor, sample: Sample, indices: list[int], weights: Glu) -> None:
        """Add these units' weighted outputs. A token appears once per unit, so index_add_ has one order anywhere."""
        for slot, index in enumerate(indices):
            rows, gates = sample.rows[index]
            for part, gate in zip(rows.split(_ROWS), gates.split(_ROWS), strict=True):
                if len(part):
                    hidden = self.intermediate(sample.h[part], weights.gate[slot], weights.up[slot])
                    out.index_add_(0, part, F.linear(hidden, weights.down[slot]) * gate[:, None])

    def intermediate(self, h: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What the down-projection reads: h [n, H] -> [n, I]."""
        return gated(F.linear(h, gate), F.linear(h, up), self.activation)

    def input_moment(self, index: int) -> torch.Tensor:
        """E[h^2] over one unit's rows, weighted by gate^2, as an error counts in the block's output.

        [H] float32; zeros for a unit without rows.
        """
        if index not in self._input_moments:
            self._input_moments[index] = self._moment(index, lambda h: h)
        return self._input_moments[index]

    def down_moment(self, index: int, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The same for the input of the unit's down-projection under this gate and up [I, H]: [I] float32."""
        return self._moment(index, lambda h: self.intermediate(h, gate, up))

    def _moment(self, index: int, read: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        unit = self.units[index]
        width = read(self.h[:1].float()).shape[-1]
        total, mass = torch.zeros(width, dtype=torch.float64, device=self.h.device), 0.0
        for tokens, gates in zip(unit.tokens.split(_ROWS), unit.weights.split(_ROWS), strict=True):
            if len(tokens):
                squared = gates.square()
                total = total + (read(self.h[tokens].float()).square() * squared[:, None]).sum(0, dtype=torch.float64)
                mass += float(squared.sum(dtype=torch.float64))
        return (total / mass if mass else total).float()


def _schemes(names: tuple[str, str, str], schemes: Mapping[str, Scheme]) -> tuple[Scheme, Scheme, Scheme]:
    gate, up, down = (schemes.get(name, KEEP) for name in names)
    return gate, up, down
