"""What to conclude from figures: one headline, the findings behind it, and what was not tested. Pure functions, no torch.

The words for a divergence (LEVELS) and for text that a model does not know (UNKNOWN_TEXT) are m3quant's own choices; the page
says so. Whether retrieval got worse is decided by Wilson's intervals, whether a divergence is more than rounding by the noise floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..artifact.eval_record import EvalRecord, Result
from ..evaluate.intervals import wilson
from .charts import number
from .shapes import (
    floor_of,
    is_by_length,
    is_by_position,
    is_divergence,
    is_grid,
    is_measured_divergence,
    is_noise,
    is_perplexity,
    of_perplexity,
)

# Mean KL divergence in nats per token, below which an output is called so.
LEVELS = ((0.01, "very close to"), (0.05, "close to"), (0.2, "clearly different from"), (math.inf, "far from"))
LEVEL_WORDS = (
    "m3quant's words for a mean KL divergence: below 0.01 nats very close, below 0.05 close, below 0.2 clearly different, above it "
    "far. What a task bears only that task can say."
)
# Times the noise floor up to which a divergence is called rounding.
NEAR_FLOOR = 2.0
# Perplexity per token of the source from which on a text is called unknown to it. On text of the kind that it was trained on a
# language model has a perplexity of a few to a few dozen; a guess among V tokens has V.
UNKNOWN_TEXT = 500.0


@dataclass(frozen=True)
class Finding:
    """A figure and what it means. bad: whether it stands out."""

    label: str
    value: str
    meaning: str
    bad: bool = False


@dataclass(frozen=True)
class Verdict:
    """headline: one sentence. note: small print about its words."""

    headline: str
    findings: Sequence[Finding]
    not_tested: Sequence[str]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "headline": self.headline,
            "findings": [asdict(finding) for finding in self.findings],
            "not_tested": list(self.not_tested),
        }


def level(kl: float, floor: float | None, name: str = "The checkpoint") -> str:
    """A sentence without a full stop: how far `name` is from its source."""
    if kl == 0 or (floor is not None and kl <= NEAR_FLOOR * floor):
        return f"{name} cannot be told from its source: what differs is rounding"
    return f"{name} is {next(words for limit, words in LEVELS if kl < limit)} its source"


def unknown_text(perplexity: float | None) -> str:
    """A sentence for a text that the source itself predicts badly; empty for other texts."""
    if perplexity is None or perplexity < UNKNOWN_TEXT:
        return ""
    return (
        f"The source itself has a perplexity of {number(perplexity)} here: it does not know text of this kind (on text that a "
        "language model knows, it has a few to a few dozen). Its probabilities are nearly even then, so that these figures say "
        "little about quality in use; measure on text of the kind that it is for."
    )


def of_evaluation(record: EvalRecord) -> Verdict:
    """The verdict on an evaluation."""
    run = [result for result in record.results if result.not_run is None]
    found = [r for r in run if is_divergence(r) and not is_noise(r)]
    divergence = next(filter(is_measured_divergence, found), found[0] if found else None)
    findings = []
    if divergence is not None:
        findings += _divergence(divergence, floor_of(divergence, run))
    perplexity = next(filter(is_perplexity, run), None)
    unknown = ""
    if perplexity is not None:
        name = next(filter(of_perplexity, perplexity.metrics))
        before = (perplexity.source_metrics or {}).get(name)
        unknown = unknown_text(before if before is not None else perplexity.metrics[name]) if _per_token(name) else ""
        findings.append(_perplexity(perplexity, name, before, unknown))
    grids = list(filter(is_grid, run))
    retrieval = [
        _retrieval(label, [r for r in grids if r.label == label]) for label in dict.fromkeys(r.label for r in grids)
    ]
    if by_length := list(filter(is_by_length, run)):
        tasks = by_length[0].label if len(by_length) == 1 else f"retrieval by length, {len(by_length)} tasks"
        retrieval.append(_retrieval(tasks, by_length))
    findings += retrieval
    if coverage := _coverage(record.coverage):
        findings.append(coverage)
    headline = _headline(divergence, run, unknown, any(finding.bad for finding in retrieval))
    return Verdict(headline, findings, not_tested(record), LEVEL_WORDS if divergence is not None else "")


KL, PERPLEXITY = "KL divergence from the source", "perplexity"


def _headline(divergence: Result | None, run: Sequence[Result], unknown: str, worse: bool) -> str:
    if divergence is None:
        return (
            "Measured without a divergence from its source: how the checkpoint does, not what its quantization costs."
        )
    if unknown:
        return "No conclusion about quality: the model does not know the text that was measured."
    floor = floor_of(divergence, run)
    said = level(divergence.metrics["kl_mean"], floor.metrics["kl_mean"] if floor else None)
    return f"{said}{', and it finds less in long context' if worse else ''}."


def _divergence(result: Result, floor: Result | None) -> list[Finding]:
    kl, error = result.metrics["kl_mean"], result.metrics.get("kl_mean_error")
    value = f"{number(kl, 3)}{f' ± {number(error, 1)}' if error else ''} nats per token"
    meaning = beside_floor(kl, floor.metrics["kl_mean"] if floor else None)
    if not is_measured_divergence(result):
        meaning += (
            " Measured by the conversion in its own pass, on text that resembles what it calibrated on: it flatters."
        )
    findings = [Finding(KL, value, meaning)]
    if (same := result.metrics.get("top1_agreement")) is not None:
        other = f"For {100 * (1 - same):.2f} % of tokens the most likely next token is another one"
        with_itself = (
            f"; of the source with itself for {100 * (1 - floor.metrics['top1_agreement']):.2f} %" if floor else ""
        )
        findings.append(Finding("same most likely token", f"{100 * same:.2f} %", f"{other}{with_itself}."))
    return findings


def beside_floor(kl: float, floor: float | None) -> str:
    """What a mean KL divergence means beside the noise floor. A sentence."""
    if kl == 0:
        return "Exactly the source's probabilities."
    if floor is None:
        return "No noise floor was measured beside it: part of it may be rounding of the arithmetic."
    if floor == 0:
        return "The noise floor is 0: all of it is the quantization."
    if kl <= NEAR_FLOOR * floor:
        return f"No more than rounding: the source differs from itself by {number(floor, 2)} in another precision."
    return f"{number(kl / floor, 2)} times the noise floor of {number(floor, 2)}, by which the source differs from itself in another precision."


def _per_token(metric: str) -> bool:
    return metric == "perplexity"


def _perplexity(result: Result, name: str, before: float | None, unknown: str) -> Finding:
    after = result.metrics[name]
    called = f"{name.replace('_', ' ')}, convention {result.convention}"
    if before is None:
        return Finding(
            PERPLEXITY,
            number(after),
            " ".join(filter(None, [f"{called}; the source's is not known.", unknown])),
            bool(unknown),
        )
    meaning = f"From {number(before)} of the source to {number(after)} ({called})."
    return Finding(
        f"change of {PERPLEXITY}", change(after, before), " ".join(filter(None, [meaning, unknown])), bool(unknown)
    )


def change(after: float, before: float) -> str:
    return f"{100 * (after / before - 1):+.2f} %"


def _retrieval(label: str, results: Sequence[Result]) -> Finding:
    """Bad where the 95 % intervals of the checkpoint and of the source do not overlap."""
    cells = [(result, cell) for result in results for cell in result.cells]
    hits, samples = (sum(cell[key] for _, cell in cells) for key in ("hits", "samples"))
    value = f"{hits:,} of {samples:,} found"
    task, worst = min(cells, key=lambda pair: pair[1]["accuracy"])
    place = f"{worst['length']:,} tokens" + (f", depth {100 * worst['depth']:g} %" if "depth" in worst else "")
    of_task = f"{task.label} at " if task.label != label else ""
    weakest = f" Weakest: {of_task}{place}, {worst['hits']} of {worst['samples']}." if worst["accuracy"] < 1 else ""
    if not all("hits_source" in cell for _, cell in cells):
        return Finding(label, value, f"The source was not asked.{weakest}")
    theirs = sum(cell["hits_source"] for _, cell in cells)
    most, least = wilson(hits, samples)[1], wilson(theirs, samples)[0]
    if least > most:
        meaning = (
            f"The source finds {theirs:,}: a loss that chance does not explain (the checkpoint at most {_percent(most)}, the source "
            f"at least {_percent(least)}, by 95 % intervals)."
        )
        return Finding(label, value, meaning + weakest, bad=True)
    return Finding(label, value, f"The source finds {theirs:,}: no loss that {samples:,} samples can show.{weakest}")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _coverage(coverage: Mapping[str, Any] | None) -> Finding | None:
    if not coverage:
        return None
    starved = sum(map(len, (coverage.get("starved") or {}).values()))
    total, floor = coverage["experts"], coverage["floor"]
    if not starved:
        return Finding(
            "expert coverage",
            f"all {total:,} experts",
            f"Each saw at least {coverage['least_tokens']:,} tokens of calibration text; the floor is {floor:,}.",
        )
    return Finding(
        "expert coverage",
        f"{starved:,} of {total:,} experts starved",
        f"They saw fewer than {floor:,} tokens of calibration text and were given tokens that the router would not have sent; text of more kinds covers more experts.",
        bad=True,
    )


def not_tested(record: EvalRecord) -> list[str]:
    """What this evaluation says nothing about, one phrase each."""
    run = [result for result in record.results if result.not_run is None]
    left = [f"{r.task}: {r.not_run}" for r in record.results if r.not_run is not None]
    divergences = list(filter(is_measured_divergence, run))
    said = any(r.not_run is not None and r.convention.startswith("kl-") for r in record.results)
    if not divergences and not said:
        left.append("KL divergence from the source" + ("" if record.source else ": give --source"))
    if divergences and not any(floor_of(r, run) for r in divergences):
        left.append("the noise floor: the suite's divergence has no noise_windows")
    cells = [cell for r in run if is_grid(r) or is_by_length(r) for cell in r.cells]
    longest = max(
        [*(cell["length"] for cell in cells), *(cell["stop"] for r in filter(is_by_position, run) for cell in r.cells)],
        default=None,
    )
    if not cells:
        left.append("retrieval from a long context: the suite asks for none (--suite full does)")
    if longest is not None:
        left.append(f"contexts of more than {longest:,} tokens")
    msa = {cell.get("exercises_msa") for cell in cells} - {None}  # None: a model without it
    if msa == {False}:
        left.append("block-sparse attention (MSA): every context was short enough to be read whole")
    if record.computed is not None:
        left.append(
            "an engine's kernels: m3quant computed this itself (m3quant verify --engine; m3quant eval --endpoint)"
        )
        left.append(
            "free generation, tool calls and images: answers were scored with the right text before every token"
        )
    return left


def of_conversion(heldout: Mapping[str, Any] | None, coverage: Mapping[str, Any] | None) -> Verdict:
    """The verdict on a calibrated conversion. heldout, coverage: as the manifest has them."""
    findings = []
    headline = "Not measured: the recipe holds no text out (data.heldout_windows is 0)."
    if heldout is not None:
        kl, before, after = (heldout[key] for key in ("kl_mean", "perplexity_source", "perplexity_quantized"))
        unknown = unknown_text(before)
        headline = (
            "No conclusion about quality: the model does not know the held-out text."
            if unknown
            else f"{level(kl, None, 'The output')}."
        )
        meaning = "A conversion measures no noise floor; m3quant eval does."
        same = heldout["top1_agreement"]
        findings = [
            Finding(KL, f"{number(kl, 3)} nats per token", meaning),
            Finding(
                "same most likely token",
                f"{100 * same:.2f} %",
                f"For {100 * (1 - same):.2f} % of tokens it is another one.",
            ),
            Finding(
                f"change of {PERPLEXITY}",
                change(after, before),
                " ".join(filter(None, [f"From {number(before)} to {number(after)} on held-out windows.", unknown])),
                bool(unknown),
            ),
        ]
    if found := _coverage(coverage):
        findings.append(found)
    length = f"contexts of more than {heldout['window_length']:,} tokens" if heldout else "quality"
    left = [
        f"{length}: m3quant eval OUT --source SRC --suite full",
        "loading and answering in an engine: m3quant verify OUT --engine",
    ]
    return Verdict(headline, findings, left, LEVEL_WORDS if heldout is not None else "")
