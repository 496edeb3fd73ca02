"""eval.json: what was measured, by which convention, on what. Torch-free; the card and the report read it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 1
EVAL_FILE = "eval.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Data(_Record):
    """The text or generator behind a result: enough to get the same tokens again."""

    name: str
    sha256: str
    licence: str | None = None


class Result(_Record):
    """One labelled measurement. Metrics of different `convention`s are never comparable.

    task: its name in the suite, which may be any; kind: what the suite names by `task`, None for what is no task.
    metrics, source_metrics: name -> number, in the order tables show them; the same names for the checkpoint and its source.
    cells: rows of a grid or buckets of a curve (needle length x depth, position buckets), JSON-able, for charts.
    not_run: why there is no figure; metrics is then empty, never zero.
    """

    task: str
    kind: str | None = None
    convention: str
    label: str
    data: Data | None = None
    tokens: int = 0
    metrics: dict[str, float] = Field(default_factory=dict)
    source_metrics: dict[str, float] | None = None
    cells: list[dict[str, Any]] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    not_run: str | None = None


class Measured(_Record):
    """What was measured: a folder or an endpoint, its fingerprint, and how it is stored (a recipe's name, bf16, ...)."""

    name: str
    fingerprint: str | None = None
    stored: str | None = None


class EvalRecord(_Record):
    """The whole of eval.json."""

    schema_version: int = SCHEMA
    m3quant: str
    finished: str
    seconds: float
    device: str
    versions: dict[str, str]
    checkpoint: Measured
    source: Measured | None = None
    suite: str
    results: list[Result]
    # stream error of every layer against the source: {"layer": i, "relative_error": e}
    layers: list[dict[str, float]] = Field(default_factory=list)
    # expert coverage of the conversion, copied from its manifest, where there is one
    coverage: dict[str, Any] | None = None
    notes: list[str] = Field(default_factory=list)
