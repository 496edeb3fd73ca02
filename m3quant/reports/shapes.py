"""What a result is shown as. It follows from its cells and metrics, not from its task's name: suites rename tasks."""

from __future__ import annotations

from collections.abc import Iterable

from ..artifact.conversion_eval import HELDOUT_TASK
from ..artifact.eval_record import Result


def is_grid(result: Result) -> bool:
    return bool(result.cells) and "depth" in result.cells[0]


def is_by_length(result: Result) -> bool:
    return bool(result.cells) and "length" in result.cells[0] and not is_grid(result)


def is_divergence(result: Result) -> bool:
    """A divergence from the source, or the noise floor of one."""
    return "kl_mean" in result.metrics


def is_noise(result: Result) -> bool:
    return result.convention.startswith("noise")


def is_measured_divergence(result: Result) -> bool:
    """A divergence that an evaluation measured, and not the conversion in its own pass."""
    return is_divergence(result) and not is_noise(result) and result.task != HELDOUT_TASK


def is_by_position(result: Result) -> bool:
    return bool(result.cells) and "start" in result.cells[0] and not is_divergence(result)


def of_perplexity(metric: str) -> bool:
    return "perplexity" in metric


def is_perplexity(result: Result) -> bool:
    return any(map(of_perplexity, result.metrics)) and not is_by_position(result)


def floor_of(result: Result, run: Iterable[Result]) -> Result | None:
    """The noise floor that was measured beside a divergence."""
    return next((r for r in run if is_noise(r) and r.task == result.task), None)
