"""The feed-forward block: routed experts, w1 and w3 before w2, and last the MLP that sees every token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from m3quant.calibration import ops
from m3quant.calibration.experts import ExpertTokens
from m3quant.calibration.feedback.evidence import Trust, regularised
from m3quant.calibration.feedback.moments import MomentSum, halves
from m3quant.calibration.feedback.products import matmul
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.feedback.solve import Solver
from m3quant.calibration.feedback.targets import targets
from m3quant.calibration.folds import always_on_names, expert_names
from m3quant.calibration.glu import Unit
from m3quant.calibration.layers import Layer
from m3quant.calibration.ops import gated
from m3quant.calibration.quantized_layer import StoredWeight
from m3quant.schemes import KEEP, Scheme

_ROWS = 8192


@dataclass
class MlpStates:
    """Both residual streams after attention, [T, H], and what the routed experts cannot know of: see `missing`.

    missing [T, H]: how far the quantized stream's residual, and the choice of experts in it, fall short of the source's
    layer output. window: tokens of a window.
    """

    quantized: torch.Tensor
    source: torch.Tensor
    window: int


@dataclass
class _Part:
    weights: list[StoredWeight | None]  # of gate, up, down: stacks over the chunk's units
    rows: torch.Tensor  # [m, H]: natural rows' outputs times their gates, unit by unit
    log: list[dict[str, Any]] = field(default_factory=list)


class MlpQuantizer:
    def __init__(
        self,
        layer: Layer,
        schemes: Mapping[str, Scheme],
        states: MlpStates,
        assigned: ExpertTokens | None,
        settings: FeedbackSettings,
    ) -> None:
        self.layer, self.spec, self.states, self.settings = layer, layer.spec, states, settings
        self.half = halves(len(states.quantized), states.window, layer.device)
        self.routed: list[Unit] = []
        self.always_on: Unit | None = None
        if assigned is not None:
            for names, tokens, weights, natural in zip(
                expert_names(self.spec), assigned.tokens, assigned.weights, assigned.natural, strict=True
            ):
                self.routed.append(Unit(names, _schemes(names, schemes), tokens, weights, natural))
        names = always_on_names(self.spec)
        if names is not None:
            count = len(states.quantized)
            everything = torch.arange(count, device=layer.device)
            ones = torch.ones(count, device=layer.device)
            self.always_on = Unit(names, _schemes(names, schemes), everything, ones, count)
        self.gates = torch.zeros(len(states.quantized), device=layer.device)
        for unit in self.routed:
            self.gates.index_add_(0, unit.tokens[: unit.natural], unit.weights[: unit.natural].float())
        if self.always_on is not None and self.always_on.schemes[2].quantizes:
            self.gates += 1.0

    def run(self) -> tuple[dict[str, StoredWeight], dict[str, Any]]:
        weights: dict[str, StoredWeight] = {}
        log: dict[str, Any] = {"block": "mlp", "units": []}
        self.missing = self._missing()
        out = torch.zeros_like(self.states.quantized, dtype=torch.float32)
        if self.routed:
            self.prior = self._prior()
            for indices, part in self.settings.ranks.each(self._routed_chunk, self._chunks()):
                units = [self.routed[i] for i in indices]
                self._collect(units, part, weights, log)
                for unit, rows in (
                    zip(units, part.rows.split([u.natural for u in units]), strict=True) if len(part.rows) else ()
                ):
                    out.index_add_(0, unit.tokens[: unit.natural], rows)
        if self.always_on is not None and any(s.quantizes for s in self.always_on.schemes):
            if self.settings.residual:
                self._left_over(out)
            self.gates.fill_(1.0)
            self.prior = None
            part = self._chunk([self.always_on], outputs=False)
            self._collect([self.always_on], part, weights, log)
        return weights, log

    def _collect(self, units: list[Unit], part: _Part, weights: dict[str, StoredWeight], log: dict[str, Any]) -> None:
        for slot, unit in enumerate(units):
            for name, stored in zip(unit.names, part.weights, strict=True):
                if stored is not None:
                    weights[name] = stored[slot]
        log["units"] += part.log

    def _chunks(self) -> Iterator[list[int]]:
        most = 24
        for start in range(0, len(self.routed), most):
            yield list(range(start, min(start + most, len(self.routed))))

    def _routed_chunk(self, indices: list[int]) -> _Part:
        return self._chunk([self.routed[i] for i in indices], outputs=self.always_on is not None)

    def _chunk(self, units: list[Unit], outputs: bool) -> _Part:
        source = [[self.layer.weight(unit.names[role]).float() for unit in units] for role in range(3)]
        schemes = units[0].schemes
        moments = [self._input_moments(unit) for unit in units]
        part = _Part([None, None, None], self.states.quantized.new_empty(0))
        kind = "routed" if self.prior is not None else "always_on"
        trust = TRUST[kind, "in"]
        second, plain, cross, ridge = regularised(moments, trust, self.prior)
        acting = [list(weights) for weights in source]
        logs: list[dict[str, Any]] = [
            {"unit": unit.names[0].rsplit(".", 2)[0], "rows": len(unit.tokens), "effective": m.effective_rows}
            for unit, m in zip(units, moments, strict=True)
        ]
        for role in range(2):
            if not schemes[role].quantizes:
                continue
            weight = torch.stack(source[role])
            part.weights[role] = self._solve(
                weight, plain, second, matmul(weight, cross), ridge, schemes[role], logs, role
            )
            acting[role] = list(part.weights[role].dequantized())
        if schemes[2].quantizes:
            moments = [
                self._down_moments(unit, *(a[i] for a in acting[:2]), *(s[i] for s in source))
                for i, unit in enumerate(units)
            ]
            second, plain, cross, ridge = regularised(moments, TRUST[kind, "down"], None)
            weight = torch.stack(source[2])
            part.weights[2] = self._solve(weight, plain, second, cross, ridge, schemes[2], logs, 2)
            acting[2] = list(part.weights[2].dequantized())
        part.log = logs
        if outputs:
            part.rows = torch.cat([self._outputs(unit, *(a[i] for a in acting)) for i, unit in enumerate(units)])
        return part

    def _solve(
        self, weight: torch.Tensor, plain: torch.Tensor, second: torch.Tensor, cross: torch.Tensor, ridge: torch.Tensor,
        scheme: Scheme, logs: list[dict[str, Any]], role: int
    ) -> StoredWeight:  # fmt: skip
        target, _ = targets(weight, cross, plain, ridge) if self.settings.source_targets else (weight, None)
        stored, loss, nearest, _ = Solver(target, second, scheme, self.settings).run()
        for slot, log in enumerate(logs):
            log[("gate", "up", "down")[role]] = [float(nearest[slot]), float(loss[slot])]
        return stored

    def _rows(self, unit: Unit) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        for tokens, gates in zip(unit.tokens.split(_ROWS), unit.weights.split(_ROWS), strict=True):
            yield self._inputs(self.states.quantized, tokens), self._inputs(self.states.source, tokens), tokens, gates

    def _inputs(self, stream: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.layer.mlp_input(stream[tokens].to(self.layer.device))

    def _input_moments(self, unit: Unit) -> Any:
        width = self.spec.hidden_size
        total = MomentSum(width, width, self.layer.device)
        for x, x_source, tokens, gates in self._rows(unit):
            total.add(x, x_source.float() - x.float(), gates.square(), self.half[tokens])
        return total.total()

    def _prior(self) -> torch.Tensor:
        """The layer's second moment [H, H] per token."""
        width = self.spec.hidden_size
        total = MomentSum(width, 1, self.layer.device)
        for tokens in torch.arange(len(self.half), device=self.layer.device).split(_ROWS):
            x = self._inputs(self.states.quantized, tokens)
            ones = torch.ones(len(x), device=x.device)
            total.add(x, x.new_zeros(len(x), 1), ones, self.half[tokens])
        found = total.total()
        return found.second.sum(0) / float(found.mass.sum())

    def _down_moments(
        self, unit: Unit, gate: torch.Tensor, up: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor
    ) -> Any:
        act = self.spec.activation
        total = MomentSum(w2.shape[1], w2.shape[0], self.layer.device)
        for x, x_source, tokens, gates in self._rows(unit):
            hidden = gated(ops.linear(x, gate), ops.linear(x, up), act)
            given = x_source if self.settings.source_targets else x
            expected = gated(ops.linear(given, w1), ops.linear(given, w3), act)
            error = ops.linear(expected.float() - hidden.float(), w2)
            if self.settings.residual:
                error = error + self.missing[tokens].float() / self.gates[tokens, None]
            total.add(hidden, error, gates.square(), self.half[tokens])
        return total.total()

    def _outputs(self, unit: Unit, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        parts = [self.states.quantized.new_empty(0, self.spec.hidden_size, dtype=torch.float32)]
        tokens, weights = unit.tokens[: unit.natural], unit.weights[: unit.natural]
        for own, gates in zip(tokens.split(_ROWS), weights.split(_ROWS), strict=True):
            x = self._inputs(self.states.quantized, own)
            hidden = gated(ops.linear(x, gate), ops.linear(x, up), self.spec.activation)
            parts.append(ops.linear(hidden, down).float() * gates[:, None])
        return torch.cat(parts)

    def _missing(self) -> torch.Tensor:
        """[T, H]: the residual streams' difference, and what the source's own choice of experts would have given."""
        missing = (self.states.source - self.states.quantized).float()
        if ROUTING_DIFFERENCE and self.routed:
            for tokens in torch.arange(len(missing), device=missing.device).split(_ROWS):
                h, given = self._inputs(self.states.quantized, tokens), self._inputs(self.states.source, tokens)
                experts = tuple(self.layer._experts[w] for w in ("w1", "w3", "w2"))
                own = ops.experts_forward(given, self.layer.routing(given), *experts, self.spec.activation)
                other = ops.experts_forward(given, self.layer.routing(h), *experts, self.spec.activation)
                missing[tokens] += own.float() - other.float()
        return missing

    def _left_over(self, out: torch.Tensor) -> None:
        """Make `missing` what the always-on MLP's output has to make good beyond its own."""
        assert self.always_on is not None
        if not self.routed:
            return
        shared = [self.layer.weight(name) for name in self.always_on.names]
        for tokens in torch.arange(len(out), device=out.device).split(_ROWS):
            given = self._inputs(self.states.source, tokens)
            wanted = self.layer.mlp(given).float() - ops.glu_mlp(given, *shared, self.spec.activation).float()
            difference = self.states.source[tokens].float() - self.states.quantized[tokens].float()
            self.missing[tokens] = difference + wanted - out[tokens]


ROUTING_DIFFERENCE = False
TRUST = {
    ("routed", "in"): Trust(0.1, 0.5),
    ("routed", "down"): Trust(0.5, 0.5),
    ("always_on", "in"): Trust(0.05, 0.3),
    ("always_on", "down"): Trust(0.05, 0.3),
    ("attention", "in"): Trust(0.05, 0.3),
    ("attention", "out"): Trust(0.05, 0.3),
}


def _schemes(names: tuple[str, str, str], schemes: Mapping[str, Scheme]) -> tuple[Scheme, Scheme, Scheme]:
    gate, up, down = (schemes.get(name, KEEP) for name in names)
    return gate, up, down
