"""Weights that read the same rows, quantized: estimate, target, verdict of held-out rows, codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from m3quant.calibration.feedback.evidence import Rule, estimate
from m3quant.calibration.feedback.heldout import Member, aimed, judged
from m3quant.calibration.feedback.moments import Moments
from m3quant.calibration.feedback.products import matmul
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.feedback.solve import Solver
from m3quant.calibration.quantized_layer import StoredWeight

_TINY = torch.finfo(torch.float32).tiny
NOT_JUDGED = "one half of the rows is empty, so nothing shows that feedback helps: rounded to nearest"
WORSE = "feedback did not lower the error on held-out rows: rounded to nearest"
SINGULAR = "the moment could not be factored: no error was fed forward"


@dataclass
class Fitted:
    """A stack of stored weights, and per weight what is logged.

    error: sums of squared output errors relative to the output's energy, rounded to nearest (searched ranges) and as
    stored, as the damped moments tell them; heldout: those of the sampled rows on the half not learnt from.
    """

    stored: StoredWeight
    rows: list[float] = field(default_factory=list)
    damping: list[float] = field(default_factory=list)
    error: list[tuple[float, float]] = field(default_factory=list)
    heldout: list[tuple[float, float]] = field(default_factory=list)
    notes: list[list[str]] = field(default_factory=list)

    def one(self, slot: int) -> Fitted:
        """One weight of the stack, still with a leading dimension."""
        part = slice(slot, slot + 1)
        lists = (self.rows, self.damping, self.error, self.heldout, self.notes)
        return Fitted(self.stored.part(part), *(values[part] for values in lists))  # type: ignore[arg-type]


def fit(
    moments: list[Moments],
    members: list[Member],
    rule: Rule,
    factor: float,
    prior: torch.Tensor | None,
    settings: FeedbackSettings,
) -> list[Fitted]:
    """One `Fitted` for each member; all read the rows of `moments`, one for each weight of the stacks."""
    known = estimate(moments, rule, factor, prior)
    out = []
    for member in members:
        solution = Solver(aimed(member, known), known.second, member.scheme, settings).solve()
        nearest, found = judged(moments, member, rule, factor, prior, settings)
        kept = found < nearest  # False for NaN too
        notes = [list(said) for said in known.notes]
        for slot, (better, failed) in enumerate(zip(kept.tolist(), solution.failed.tolist(), strict=True)):
            if failed:
                notes[slot].append(SINGULAR)
            if not better:
                notes[slot].append(NOT_JUDGED if bool(torch.isnan(found[slot])) else WORSE)
        stored, loss = solution.stored, solution.loss
        if not bool(kept.all()):
            plain = Solver(member.weight, known.second, member.scheme, settings)
            state = plain.nearest()
            stored = _where(kept, stored, plain.stored(state))
            loss = torch.where(kept, loss, state.loss.sum(1))
        energy = (matmul(member.weight, known.second) * member.weight).sum((1, 2)).clamp(min=_TINY)
        out.append(
            Fitted(
                stored,
                known.rows,
                known.damping,
                list(zip((solution.nearest / energy).tolist(), (loss / energy).tolist(), strict=True)),
                list(zip(nearest.tolist(), found.tolist(), strict=True)),
                notes,
            )
        )
    return out


def _where(kept: torch.Tensor, first: StoredWeight, second: StoredWeight) -> StoredWeight:
    """Weight by weight, the first where kept [E], else the second."""

    def pick(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = a.clone()
        out[~kept] = b[~kept]
        return out

    zero = None
    if first.zero_point is not None and second.zero_point is not None:
        zero = pick(first.zero_point, second.zero_point)
    return StoredWeight(pick(first.codes, second.codes), pick(first.scale, second.scale), zero)


def block_log(block: str, fitted: dict[str, Fitted], **more: Any) -> dict[str, Any]:
    """What is logged of a block. fitted: by tensor name, stacks of one weight each.

    block_error: sums over the block's weights of `Fitted.error`, relative to their number.
    """
    if not fitted:
        return {"block": block, "groups": [], "chosen": "unquantized"}
    errors = [one.error[0] for one in fitted.values()]
    weights = {
        name: {
            "rows": _short(one.rows[0]),
            "damping": _short(one.damping[0]),
            "error": [_short(value) for value in one.error[0]],
            "heldout": [_short(value) for value in one.heldout[0]],
            **({"notes": one.notes[0]} if one.notes[0] else {}),
        }
        for name, one in fitted.items()
    }
    means = [sum(pair[i] for pair in errors) / len(errors) for i in range(2)]
    return {
        "block": block,
        "groups": [],
        "chosen": "feedback",
        "block_error": {"round_to_nearest": means[0], "feedback": means[1]},
        **more,
        "weights": weights,
    }


def _short(value: float) -> float | None:
    """Four significant digits; None for NaN, which JSON does not have."""
    return None if value != value else float(f"{value:.4g}")
