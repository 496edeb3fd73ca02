"""eval.json as the card shows it: tables by convention, what is missing, and how long a context was tested. Torch-free."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from pydantic import ValidationError

from ..artifact.eval_record import EVAL_FILE, EvalRecord, Result
from ..checkpoint.bounded import MANIFEST_BYTES, read_bounded
from ..errors import PublishError
from ..evaluate.position import CONVENTION as POSITION
from ..running.complaints import complaint, key_of

# What a reader looks for, by how the conventions of `m3quant eval` begin; a kind without a result is listed as missing.
KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("perplexity", re.compile(r"gptq|lm-eval|llama\.cpp", re.IGNORECASE)),
    ("KL divergence from the base", re.compile(r"kl", re.IGNORECASE)),
    ("the noise floor of that divergence", re.compile(r"noise", re.IGNORECASE)),
    ("perplexity by position", re.compile(r"position", re.IGNORECASE)),
    ("long-context retrieval", re.compile(r"greedy|exact|needle|ruler", re.IGNORECASE)),
)
_PERCENTILE = re.compile(r"_p\d+(\.\d+)?$")
_SHOWN_PERCENTILE = re.compile(r"_p99$")
_WINDOW = re.compile(r"-(\d+)$")


@dataclass(frozen=True)
class EvalTable:
    """One measurement: rows of (metric, this checkpoint, the base or '', relative change or ''), ready to print."""

    label: str
    convention: str
    data: str
    tokens: int
    rows: list[tuple[str, str, str, str]]
    notes: list[str]
    not_run: str | None

    @property
    def against_base(self) -> bool:
        return any(row[2] for row in self.rows)


def read_eval(out: Path, fingerprint: str) -> EvalRecord | None:
    """OUT/eval.json, or None where there is none. fingerprint: `output_fingerprint` of `out` now.

    Raises PublishError for a file that does not parse or that measured another checkpoint.
    """
    path = out / EVAL_FILE
    if not path.exists():
        return None
    try:
        record = EvalRecord.model_validate_json(read_bounded(path, MANIFEST_BYTES, error=PublishError))
    except ValidationError as error:
        first = error.errors()[0]
        reason = complaint(key_of(first)[:120] or "it", first)[:280]
        raise PublishError(f"{path} cannot be read ({reason}): run m3quant eval again, or move it away.") from None
    measured = record.checkpoint.fingerprint
    if measured is None:
        raise PublishError(f"{path} does not say which checkpoint it measured: run m3quant eval on {out}.")
    if measured != fingerprint:
        raise PublishError(f"{path} measured another checkpoint than the one in {out}: run m3quant eval again.")
    return record


def tables(record: EvalRecord) -> list[EvalTable]:
    """One table a result, in the record's order."""
    return [_table(result) for result in record.results]


def missing(record: EvalRecord | None) -> list[str]:
    """Kinds of measurement that have no figure."""
    results = [r for r in record.results if r.metrics] if record else []
    return [kind for kind, pattern in KINDS if not any(pattern.match(r.convention) for r in results)]


def tested_tokens(record: EvalRecord | None, manifest: dict[str, Any]) -> int | None:
    """The longest context that any figure was measured at: windows, needle lengths and position buckets; None without figures."""
    reached = []
    for result in record.results if record else []:
        if result.metrics:
            reached += [int(cell["length"]) for cell in result.cells if "length" in cell]
            if result.convention == POSITION:  # its last bucket ends with the window; a divergence's may end beyond it
                reached += [int(cell["stop"]) for cell in result.cells]
            if match := _WINDOW.search(result.convention):
                reached.append(int(match[1]))
    if heldout := manifest.get("heldout"):
        reached.append(heldout["window_length"])
    return max(reached, default=None)


def hub_results(record: EvalRecord | None) -> list[EvalResult]:
    """The figures as model-index entries: the place for metrics that are no Hub benchmark."""
    out = []
    for result in record.results if record else []:
        for name in shown_metrics(result):
            value = result.metrics[name]
            if math.isfinite(value) and result.data is not None:
                out.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=_slug(result.data.name),
                        dataset_name=result.data.name,
                        dataset_config=result.task,
                        metric_type=name,
                        metric_value=value,
                        metric_name=f"{name} ({result.convention})",
                    )
                )
    return out


def shown_metrics(result: Result) -> list[str]:
    """Names of the metrics that a card shows: of percentiles the 99th; eval.json has all."""
    return [n for n in result.metrics if not _PERCENTILE.search(n) or _SHOWN_PERCENTILE.search(n)]


def figure(value: float) -> str:
    """A number as tables show it: four significant digits beyond the point, no exponent in texts."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or abs(value) >= 1e-4:
        return f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 1e6 else f"{value:,.0f}"
    return f"{value:.2e}"


def _table(result: Result) -> EvalTable:
    names = shown_metrics(result)
    base = result.source_metrics or {}
    rows = [
        (
            name,
            figure(result.metrics[name]),
            figure(base[name]) if name in base else "",
            _change(result.metrics[name], base.get(name)),
        )
        for name in names
    ]
    data = f"{result.data.name} (sha256 {result.data.sha256[:12]}...)" if result.data else ""
    return EvalTable(result.label, result.convention, data, result.tokens, rows, result.notes, result.not_run)


def _change(value: float, base: float | None) -> str:
    if base is None or not math.isfinite(value) or not math.isfinite(base) or base == 0:
        return ""
    return f"{value / base - 1:+.2%}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "data"
