"""Weights that read the same rows, quantized: estimate, target, codes, comparison on held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from m3quant.calibration.feedback.evidence import Rule, estimate
from m3quant.calibration.feedback.heldout import Readers, aimed, heldout_errors
from m3quant.calibration.feedback.moments import Moments
from m3quant.calibration.feedback.products import matmul
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.feedback.solve import Solver
from m3quant.calibration.quantized_layer import StoredWeight
from m3quant.schemes import FP8_BLOCK

NOT_JUDGED = "one half of the rows is empty, so nothing shows that feedback helps: rounded to nearest"
WORSE = "feedback did not lower the error on held-out rows: rounded to nearest"
SINGULAR = "the moment could not be factored: no error was fed forward"
_TINY = torch.finfo(torch.float32).tiny


@dataclass
class Verdict:
    """What is logged of one weight. rows: effective. damping: of the mean diagonal. Pairs: rounded to nearest under
    searched ranges, and fed back (error: as stored).

    error: squared output error relative to the output's energy, as the damped moments tell it. heldout: the same of sampled output
    rows on the half of the rows that was not used, less a constant; NaN if it has no rows.
    """

    rows: float
    damping: float
    error: tuple[float, float]
    heldout: tuple[float, float]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        notes = {"notes": self.notes} if self.notes else {}
        pairs = {name: [_short(value) for value in getattr(self, name)] for name in ("error", "heldout")}
        return {"rows": _short(self.rows), "damping": _short(self.damping), **pairs, **notes}


@dataclass
class Fitted:
    """A stack of stored weights, and a verdict for each."""

    stored: StoredWeight
    verdicts: list[Verdict]


def fit(
    moments: Moments, readers: Readers, rule: Rule, prior: torch.Tensor | None, settings: FeedbackSettings
) -> list[Fitted]:
    """One `Fitted` for each weight of `readers`, [E, N, K] each; moments: of as many units."""
    known = estimate(moments, rule, prior)
    nearest, found = heldout_errors(moments, readers, rule, prior, settings)
    kept = found < nearest  # [E, weights]; False for NaN too
    solution = Solver(aimed(readers, known), known.second, readers.scheme, settings).solve()
    stored, loss = solution.stored, readers.sums(solution.loss)
    worse = (~kept.all(1)).nonzero()[:, 0]
    if len(worse):
        plain = Solver(readers.weight[worse], known.second[worse], readers.scheme, settings)
        state = plain.nearest()
        _put_rejected(stored, plain.stored(state), worse, kept, readers.sizes)
        loss[worse] = torch.where(kept[worse], loss[worse], readers.sums(state.loss))
    energy = readers.sums((matmul(readers.weight, known.second) * readers.weight).sum(2)).clamp(min=_TINY)
    before, after = (readers.sums(solution.nearest) / energy).tolist(), (loss / energy).tolist()
    held_out, failed, chosen = torch.stack([nearest, found]).tolist(), solution.failed.tolist(), kept.tolist()
    out = []
    for index, part in enumerate(stored.rows(readers.sizes)):
        verdicts = []
        for slot in range(len(moments)):
            held = (held_out[0][slot][index], held_out[1][slot][index])
            notes = list(known.notes[slot])
            if failed[slot]:
                notes.append(SINGULAR)
            if not chosen[slot][index]:
                notes.append(NOT_JUDGED if held[1] != held[1] else WORSE)
            error = (before[slot][index], after[slot][index])
            verdicts.append(Verdict(known.rows[slot], known.damping[slot], error, held, notes))
        out.append(Fitted(part, verdicts))
    return out


def _put_rejected(
    stored: StoredWeight, plain: StoredWeight, units: torch.Tensor, kept: torch.Tensor, sizes: Sequence[int]
) -> None:
    """Overwrite what is not kept [E, weights] of a stack: plain holds these units' weights rounded to nearest."""
    by_row = kept[units].repeat_interleave(torch.tensor(sizes, device=kept.device), dim=1)

    def put(into: torch.Tensor, part: torch.Tensor) -> None:
        rows = by_row if part.shape[1] == by_row.shape[1] else by_row[:, ::FP8_BLOCK]  # a block's scale is of 128 rows
        # Some devices select no E4M3 codes: they are bytes here.
        own, other = (
            value.view(torch.uint8) if value.dtype == torch.float8_e4m3fn else value for value in (into, part)
        )
        own[units] = torch.where(rows[..., None], own[units], other)

    put(stored.codes, plain.codes)
    put(stored.scale, plain.scale)
    if stored.zero_point is not None and plain.zero_point is not None:
        put(stored.zero_point, plain.zero_point)


def block_log(block: str, verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    """What is logged of a block. verdicts: by tensor name. block_error: means of `Verdict.error` over them."""
    if not verdicts:
        return {"block": block, "groups": [], "chosen": "unquantized"}
    before, after = (sum(v.error[i] for v in verdicts.values()) / len(verdicts) for i in range(2))
    return {
        "block": block,
        "groups": [],
        "chosen": "feedback",
        "block_error": {"round_to_nearest": before, "feedback": after},
        "weights": {name: verdict.to_json() for name, verdict in verdicts.items()},
    }


def _short(value: float) -> float | None:
    """Four significant digits; None for NaN, which JSON does not have."""
    return None if value != value else float(f"{value:.4g}")
