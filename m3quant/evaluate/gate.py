"""--fail-over: limits on what was measured, for pipelines. Torch-free."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..artifact.eval_record import EvalRecord, Result
from ..errors import EvaluationError

# name in --fail-over -> (kind of task, metric, whether more is worse)
METRICS = {
    "kld": ("divergence", "kl_mean", True),
    "kld-p99": ("divergence", "kl_p99", True),
    "kld-max": ("divergence", "kl_max", True),
    "top1": ("divergence", "top1_agreement", False),
    "ppl": ("perplexity-gptq", "perplexity", True),
    "word-ppl": ("perplexity-lm-eval", "word_perplexity", True),
    "byte-ppl": ("perplexity-lm-eval", "byte_perplexity", True),
    "ppl-llama-cpp": ("perplexity-llama-cpp", "perplexity", True),
    "needle": ("needle", "accuracy", False),
}
_AGAINST_SOURCE = ("divergence",)


@dataclass(frozen=True)
class Limit:
    """One limit. relative: `value` is a change in percent against the source; else it is the metric's own value."""

    name: str
    value: float
    relative: bool
    text: str

    @property
    def needs_source(self) -> bool:
        return self.relative or METRICS[self.name][0] in _AGAINST_SOURCE


def parse_limits(text: str) -> list[Limit]:
    """`kld=0.05,ppl=+2%,needle=-2%`: absolute values, or with a sign and % the worst change against the source."""
    limits = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = part.partition("=")
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
            raise EvaluationError(f"--fail-over {part}: no metric '{name}': did you mean '{near}'?")
        more_is_worse = METRICS[name][2]
        relative = value.endswith("%")
        sign = "+" if more_is_worse else "-"
        if relative and not value.startswith(sign):
            raise EvaluationError(
                f"--fail-over {part}: write the worst change allowed with its sign, as {name}={sign}2%."
            )
        try:
            number = float(value.removesuffix("%"))
            if not math.isfinite(number):
                raise ValueError
        except ValueError:
            raise EvaluationError(f"--fail-over {part}: write {name}=NUMBER or {name}={sign}PERCENT%.") from None
        limits.append(Limit(name, number, relative, part))
    if not limits:
        raise EvaluationError("--fail-over names no limit: write for example kld=0.05,ppl=+2%.")
    return limits


def check_limits(limits: Sequence[Limit], kinds: Sequence[str], source: bool) -> None:
    """Before anything is computed (kinds: of the suite's tasks): raise EvaluationError for limits on what this run will not measure."""
    for limit in limits:
        kind = METRICS[limit.name][0]
        if kind not in kinds:
            raise EvaluationError(f"--fail-over {limit.text}: the suite has no {kind} task; choose another suite.")
        if limit.needs_source and not source:
            raise EvaluationError(f"--fail-over {limit.text}: compares with the source, so it needs --source.")


def broken(limits: Sequence[Limit], record: EvalRecord) -> list[str]:
    """A sentence for every limit that the record breaks, or that it cannot be held against."""
    sentences = []
    for limit in limits:
        kind, metric, more_is_worse = METRICS[limit.name]
        found = [r for r in record.results if r.kind == kind and _judged(r)]
        if not found:
            sentences.append(f"{limit.text}: {metric} was not measured")
        sentences += [s for r in found if (s := _broken_by(limit, r, metric, more_is_worse))]
    return sentences


def _judged(result: Result) -> bool:
    return not result.convention.startswith("noise-floor")


def _broken_by(limit: Limit, result: Result, metric: str, more_is_worse: bool) -> str | None:
    if metric not in result.metrics:
        return f"{limit.text}: {metric} of {result.task} was not measured"
    value = result.metrics[metric]
    if not math.isfinite(value):
        return f"{limit.text}: {metric} is {value} ({result.convention})"
    if not limit.relative:
        worse = value > limit.value if more_is_worse else value < limit.value
        return f"{limit.text}: {metric} is {value:.6g} ({result.task}, {result.convention})" if worse else None
    if result.source_metrics is None or metric not in result.source_metrics:
        return f"{limit.text}: the source's {metric} was not measured"
    base = result.source_metrics[metric]
    if base == 0:
        return None if value == 0 or not more_is_worse else f"{limit.text}: {metric} rose from 0 to {value:.6g}"
    change = 100 * (value / base - 1)
    worse = change > limit.value if more_is_worse else change < limit.value
    return (
        f"{limit.text}: {metric} went from {base:.6g} to {value:.6g}, {change:+.2f} % ({result.task}, {result.convention})"
        if worse
        else None
    )
