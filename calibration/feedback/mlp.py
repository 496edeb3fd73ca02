"""The feed-forward block: routed experts, w1 and w3 before w2, and last the MLP that sees every token.

Experts come in chunks, so that a device holds the moments of a few (lanes.py). Each expert's numbers depend on its own rows alone
(and on the layer's moment, which is found first), not on the chunk it is in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from m3quant.calibration import ops
from m3quant.calibration.experts import ExpertTokens
from m3quant.calibration.feedback.evidence import GATED, NORMED
from m3quant.calibration.feedback.fit import Fitted, Verdict, block_log, fit
from m3quant.calibration.feedback.heldout import Readers, joined_by_scheme
from m3quant.calibration.feedback.lanes import side_by_side
from m3quant.calibration.feedback.rows import MlpStates, UnitRows
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.glu import Glu, Unit, even_chunk
from m3quant.calibration.layers import Layer
from m3quant.calibration.quantized_layer import StoredWeight
from m3quant.families.spec import always_on_names, expert_names
from m3quant.planning.quantizers import FEEDBACK_CHUNK_BYTES, FEEDBACK_MATRICES, feedback_chunks
from m3quant.running import steps
from m3quant.schemes import KEEP, Scheme

# Bytes of a chunk's moments and weights in work; a plan counts with the GPU's.
_CHUNK_BYTES = {"cpu": 1 << 30, "cuda": FEEDBACK_CHUNK_BYTES}
_WEIGHTS = 12  # float32 matrices [N, K] of an expert alive at once, in addition to FEEDBACK_MATRICES of [K, K]


@dataclass
class _Part:
    """What a chunk gives: per role (gate, up, down) a stack over its units, None if kept; outputs [natural rows, H]."""

    fitted: list[Fitted | None]
    outputs: torch.Tensor | None = None


@dataclass
class MlpResult:
    """weights: by tensor name. stacks: "w1", "w3", "w2" of all routed experts, in the order of experts."""

    weights: dict[str, StoredWeight] = field(default_factory=dict)
    stacks: dict[str, StoredWeight] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)


class MlpQuantizer:
    """One layer's feed-forward block on the output of the rounded attention."""

    def __init__(
        self,
        layer: Layer,
        schemes: Mapping[str, Scheme],
        states: MlpStates,
        assigned: ExpertTokens | None,
        settings: FeedbackSettings,
    ) -> None:
        self.layer, self.spec, self.settings = layer, layer.spec, settings
        self.rows = UnitRows(layer, states, settings)
        self.routed: list[Unit] = []
        if assigned is not None:
            parts = zip(assigned.tokens, assigned.weights, assigned.natural, strict=True)
            for names, part in zip(expert_names(self.spec), parts, strict=True):
                self.routed.append(Unit(names, _schemes(names, schemes), *_in_order(*part)))
        self.always_on: Unit | None = None
        read_by_all = always_on_names(self.spec)
        if read_by_all is not None and any(scheme.quantizes for scheme in _schemes(read_by_all, schemes)):
            count = len(states.quantized)
            every, ones = torch.arange(count, device=layer.device), torch.ones(count, device=layer.device)
            self.always_on = Unit(read_by_all, _schemes(read_by_all, schemes), every, ones, count)
        self.rows.split([*self.routed, *([self.always_on] if self.always_on else [])])

    def run(self) -> MlpResult:
        result = MlpResult()
        verdicts: dict[str, Verdict] = {}
        out = torch.zeros_like(self.rows.missing, dtype=torch.float32)
        if any(scheme.quantizes for unit in self.routed for scheme in unit.schemes):
            self._run_routed(result, verdicts, out)
        elif self.routed and self.always_on is not None:
            for unit in self.routed:
                self._add(out, unit, self.rows.outputs([unit], self._source([unit])))
        if self.always_on is not None:
            self._left_over(out)
            part = self._fit([self.always_on], None)
            self._collect([self.always_on], part, result, verdicts)
        result.log = block_log("mlp", verdicts)
        return result

    def _run_routed(self, result: MlpResult, verdicts: dict[str, Verdict], out: torch.Tensor) -> None:
        self.rows.share.zero_()
        for unit in self.routed:
            natural = slice(unit.natural)
            self.rows.share.index_add_(0, unit.tokens[natural], unit.weights[natural].float())
        if self.always_on is not None:
            self.rows.share += 1.0
        prior = self.rows.layer_moment(self.routed[0].reads[0])

        def work(units: list[Unit]) -> _Part:
            return self._fit(units, prior, outputs=self.always_on is not None)

        def work_together(chunks: list[list[Unit]]) -> list[_Part]:
            return side_by_side(work, chunks, self.layer.device)

        stacks: dict[str, list[StoredWeight]] = {}
        stacked = self.layer.device.type == "cuda" and len({unit.schemes for unit in self.routed}) == 1
        done = 0
        together = self.settings.ranks.each(work_together, self._chunks_together())
        for units, part in (pair for chunks, parts in together for pair in zip(chunks, parts, strict=True)):
            self._collect(units, part, result, verdicts)
            done += len(units)
            steps.part(done, len(self.routed))
            for which, one in zip(("w1", "w3", "w2"), part.fitted, strict=True):
                if one is not None and stacked:
                    stacks.setdefault(which, []).append(one.stored)
            if part.outputs is not None:
                for unit, rows in zip(units, torch.split(part.outputs, [unit.natural for unit in units]), strict=True):
                    self._add(out, unit, rows)
        self._stack(stacks, result)

    def _routed_shape(self) -> tuple[int, int, int]:
        """Experts, hidden size, intermediate size."""
        return len(self.routed), self.spec.hidden_size, self.layer.weight(self.routed[0].names[0]).shape[0]

    def _chunks_together(self) -> list[list[list[Unit]]]:
        """The chunks, those together that are in work at once on one rank; more only once every rank has one."""
        chunks, at_once = self._chunks(), 1
        if self.layer.device.type == "cuda":
            at_once = min(feedback_chunks(*self._routed_shape()), -(-len(chunks) // self.settings.ranks.size))
        return [chunks[start : start + at_once] for start in range(0, len(chunks), at_once)]

    def _chunks(self) -> list[list[Unit]]:
        """Runs of experts with the same schemes; as many whatever the number of ranks."""
        most = experts_at_once(*self._routed_shape(), _CHUNK_BYTES[self.layer.device.type])
        chunks: list[list[Unit]] = []
        for unit in self.routed:
            if not chunks or len(chunks[-1]) == most or chunks[-1][0].schemes != unit.schemes:
                chunks.append([])
            chunks[-1].append(unit)
        return chunks

    def _source(self, units: list[Unit]) -> Glu:
        """The units' weights as stored, stacked."""
        return Glu(*(torch.stack([self.layer.weight(unit.names[role]) for unit in units]) for role in range(3)))

    def _fit(self, units: list[Unit], prior: torch.Tensor | None, outputs: bool = False) -> _Part:
        source, schemes = self._source(units), units[0].schemes
        exact = self._acting(source, [None, None, None])  # in the layer's dtype, once
        fitted = self._fit_normed(units, source, prior)
        acting = self._acting(exact, fitted)
        if schemes[2].quantizes:
            moments = self.rows.down_moments(units, acting, exact)
            readers = Readers.of([source.down.float()], schemes[2], inputs=False)
            fitted[2] = fit(moments, readers, GATED, None, self.settings)[0]
            acting = self._acting(exact, fitted)
        return _Part(fitted, self.rows.outputs(units, acting) if outputs else None)

    def _fit_normed(self, units: list[Unit], source: Glu, prior: torch.Tensor | None) -> list[Fitted | None]:
        """Gate and up as they will be stored, None if kept, and None for down."""
        out: list[Fitted | None] = [None, None, None]
        sets = _normed(source, units[0].schemes)
        if sets:
            moments = self.rows.input_moments(units)
            for readers, roles in sets:
                for role, fitted in zip(roles, fit(moments, readers, NORMED, prior, self.settings), strict=True):
                    out[role] = fitted
        return out

    def _acting(self, source: Glu, fitted: list[Fitted | None]) -> Glu:
        """The units' weights as an engine computes with them, in the layer's dtype."""
        stored = zip((source.gate, source.up, source.down), fitted, strict=True)
        stacks = (own if one is None else one.stored.dequantized() for own, one in stored)
        return Glu(*(stack.to(self.layer.dtype) for stack in stacks))

    def _collect(self, units: list[Unit], part: _Part, result: MlpResult, verdicts: dict[str, Verdict]) -> None:
        for slot, unit in enumerate(units):
            for name, stack in zip(unit.names, part.fitted, strict=True):
                if stack is not None:
                    result.weights[name] = stack.stored[slot]
                    verdicts[name] = stack.verdicts[slot]

    def _stack(self, parts: dict[str, list[StoredWeight]], result: MlpResult) -> None:
        """Put the chunks' codes into one piece each, and make the weights views of them."""
        role = {"w1": 0, "w3": 1, "w2": 2}
        for which in list(parts):
            whole = StoredWeight.joined(parts.pop(which))
            result.stacks[which] = whole
            for expert, unit in enumerate(self.routed):
                result.weights[unit.names[role[which]]] = whole[expert]

    def _add(self, out: torch.Tensor, unit: Unit, rows: torch.Tensor) -> None:
        # A token is in a unit once, so index_add_ has one order anywhere.
        out.index_add_(0, unit.tokens[: unit.natural], rows)

    def _left_over(self, out: torch.Tensor) -> None:
        """Make `rows.missing` what the always-on MLP has to compensate: all that is missing after the rounded experts."""
        assert self.always_on is not None
        self.rows.share.fill_(1.0)
        if not self.routed:
            return
        own = [self.layer.weight(name) for name in self.always_on.names]
        states = self.rows.states
        for tokens in self.rows.blocks():
            given = self.rows.source(tokens)
            routed = (
                self.layer.mlp(given).float() - ops.glu_mlp(given, own[0], own[1], own[2], self.spec.activation).float()
            )
            short = states.source[tokens].float() - states.quantized[tokens].float() + routed - out[tokens]
            self.rows.missing[tokens] = short.to(self.rows.missing.dtype)


def experts_at_once(count: int, hidden: int, inner: int, nbytes: int) -> int:
    """How many of `count` experts [inner, hidden] are in work together in so many bytes: at least one, in chunks of like size."""
    each = 4 * (FEEDBACK_MATRICES * max(hidden, inner) ** 2 + _WEIGHTS * hidden * inner)
    return even_chunk(count, max(1, nbytes // each))


def _normed(source: Glu, schemes: tuple[Scheme, Scheme, Scheme]) -> list[tuple[Readers, tuple[int, ...]]]:
    """The quantized ones of gate (role 0) and up (1) of a stack of units, together if their scheme is one."""
    stacks = {0: source.gate, 1: source.up}
    roles = {role: (schemes[role], stack.shape[1]) for role, stack in stacks.items() if schemes[role].quantizes}
    return [
        (Readers.of([stacks[role].float() for role in own], schemes[own[0]], inputs=True), own)
        for own in joined_by_scheme(roles)
    ]


def _in_order(tokens: torch.Tensor, weights: torch.Tensor, natural: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """An expert's rows with those beyond the routed ones, which come by score, in the order of tokens."""
    added, order = tokens[natural:].sort()
    return torch.cat([tokens[:natural], added]), torch.cat([weights[:natural], weights[natural:][order]]), natural


def _schemes(names: tuple[str, str, str], schemes: Mapping[str, Scheme]) -> tuple[Scheme, Scheme, Scheme]:
    gate, up, down = (schemes.get(name, KEEP) for name in names)
    return gate, up, down
