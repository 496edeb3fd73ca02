"""The expert ledger: how much calibration data each routed expert saw, and what was done about the starved ones.

An expert below the floor is topped up with the tokens whose router score for it is highest: real inputs of this layer
that the router nearly sent there. (The correction bias is one constant per expert, so with or without it the order of
the tokens is the same.) Topped-up tokens calibrate that expert's ranges only; they carry the weight the router would
have given it had it been chosen as well, and they never enter the layer's own output.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from m3quant.calibration.ops import Routing
from m3quant.errors import CalibrationError

# Held-out int4 error after a range search from n tokens, relative to 2,048 (128 x 1024 weights; w1/w3 read normed
# inputs, w2 gated ones, which are heavier-tailed): n = 8 gives +3 % and +19 %, 32 +1 % and +6 %, 128 0 % and +1 %.
# 128 windows of 512 tokens average 2,048 tokens per expert on both M2 (256 experts, top 8) and M3 (128 experts, top
# 4).
DEFAULT_MIN_EXPERT_TOKENS = 32


@dataclass
class ExpertLedger:
    """Tokens and gate mass per expert of one layer. `natural` counts routed tokens, `topped_up` the added ones."""

    layer: int
    tokens: int
    top_k: int
    floor: int
    natural: list[int]
    gate_mass: list[float]
    topped_up: list[int] = field(default_factory=list)

    @property
    def starved(self) -> list[int]:
        """Experts that the router gave fewer tokens than the floor."""
        return [expert for expert, count in enumerate(self.natural) if count < self.floor]

    @property
    def below_floor(self) -> list[int]:
        """Experts still below the floor after topping up: the whole corpus has fewer tokens than the floor."""
        return [e for e in self.starved if self.natural[e] + self.topped_up[e] < self.floor]

    def check(self) -> None:
        """Every token is counted top_k times. A mismatch is a defect of m3quant (a lost batch), hence an assertion."""
        assert sum(self.natural) == self.tokens * self.top_k, (
            f"layer {self.layer}: {sum(self.natural)} routed pairs counted, {self.tokens} tokens x {self.top_k} fed"
        )
        assert len(self.natural) == len(self.gate_mass) == len(self.topped_up)

    def summary(self) -> dict[str, Any]:
        """min/median/max natural tokens, and how many experts were topped up or saw no token at all."""
        counts = sorted(self.natural)
        return {
            "layer": self.layer,
            "experts": len(counts),
            "tokens": self.tokens,
            "floor": self.floor,
            "min": counts[0],
            "median": counts[len(counts) // 2],
            "max": counts[-1],
            "topped_up": len(self.starved),
            "tokens_added": sum(self.topped_up),
            "zero_natural": sum(count == 0 for count in counts),
            "below_floor": len(self.below_floor),
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ExpertLedger":
        ledger = cls(**data)
        ledger.check()
        return ledger


@dataclass(frozen=True)
class ExpertTokens:
    """The calibration rows of every expert: tokens[e] int64 [n_e], weights[e] float32 [n_e], natural ones first."""

    tokens: list[torch.Tensor]
    weights: list[torch.Tensor]
    natural: list[int]


def assign_tokens(
    routing: Routing,
    scores: torch.Tensor,
    scaling: float,
    layer: int,
    floor: int,
    strict: bool = False,
    *,
    normalise: bool = True,
) -> tuple[ExpertTokens, ExpertLedger]:
    """Count what the router did, and top up starved experts to `floor` tokens.

    routing: experts and weights [T, k]; scores: the router's scores [T, E] float32; scaling, normalise: as in
    `ops.route`. A token is given to an expert at most once; ties go to the earlier token. With strict=True
    a starved expert raises CalibrationError naming the layer, the experts and their counts.
    """
    total, top_k = routing.experts.shape
    num_experts = scores.shape[1]
    flat = routing.experts.reshape(-1)
    weights = routing.weights.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    tokens = list(torch.split(order // top_k, counts))
    gates = list(torch.split(weights[order], counts))
    mass = [float(gate.double().sum()) for gate in torch.split(weights[order].cpu(), counts)]
    ledger = ExpertLedger(layer, total, top_k, floor, counts, mass, [0] * num_experts)
    if strict and ledger.starved:
        raise CalibrationError(_starved_message(ledger))
    chosen_sum = scores.gather(1, routing.experts).sum(dim=1)
    for expert in ledger.starved:
        free = scores[:, expert].clone()
        free[tokens[expert]] = -1.0  # below every score: a token counts once
        missing = min(floor, total) - counts[expert]
        added = torch.sort(free, descending=True, stable=True).indices[: max(missing, 0)]
        score = scores[added, expert]
        tokens[expert] = torch.cat([tokens[expert], added])
        share = score / (chosen_sum[added] + score) if normalise else score
        gates[expert] = torch.cat([gates[expert], share * scaling])
        ledger.topped_up[expert] = len(added)
    ledger.check()
    return ExpertTokens(tokens, gates, counts), ledger


def _starved_message(ledger: ExpertLedger) -> str:
    shown = ", ".join(f"{e} ({ledger.natural[e]})" for e in ledger.starved[:16])
    more = f" and {len(ledger.starved) - 16} more" if len(ledger.starved) > 16 else ""
    few, all_of_them = len(ledger.starved), len(ledger.natural)
    return (
        f"layer {ledger.layer}: {few} of {all_of_them} experts got fewer than {ledger.floor} of {ledger.tokens} "
        f"calibration tokens: expert (tokens) {shown}{more}. Give more or broader calibration text, lower "
        "--min-expert-tokens, or drop --strict-coverage to top these experts up with their best-scoring tokens."
    )
