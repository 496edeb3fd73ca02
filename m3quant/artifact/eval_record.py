"""eval.json: what was measured, by which convention, on what. Torch-free; the card and the report read it."""

from __future__ import annotations

from typing import Any, Literal

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


class Computed(_Record):
    """How the checkpoint was computed; its source always with activations, keys and values unrounded.

    dtype: of products and of the residual stream. activations: "engine", rounded as an engine does for their weights'
    schemes (`rounding` says how), or "exact". kv_dtype, index_dtype: "fp8" (E4M3), or None for keys, values and index keys
    as computed. kv_scales: "1.0" or "stored" of an FP8 cache.
    """

    dtype: str
    activations: Literal["engine", "exact"]
    rounding: str
    kv_dtype: Literal["fp8"] | None = None
    kv_scales: Literal["1.0", "stored"] | None = None
    index_dtype: Literal["fp8"] | None = None

    @property
    def sentence(self) -> str:
        """A sentence for the user: one line without a full stop."""
        scales = "its stored scales" if self.kv_scales == "stored" else "scale 1.0"
        kv = f"KV cache E4M3 with {scales}" if self.kv_dtype else "KV cache not rounded"
        index = ", index keys E4M3" if self.index_dtype else ""
        return f"computed in {self.dtype}; weights as stored; activations {self.rounding} ({self.activations}); {kv}{index}"


class EvalRecord(_Record):
    """The content of eval.json. computed: None where a server computed, and before activations could be rounded."""

    schema_version: int = SCHEMA
    m3quant: str
    finished: str
    seconds: float
    device: str
    versions: dict[str, str]
    checkpoint: Measured
    source: Measured | None = None
    suite: str
    computed: Computed | None = None
    results: list[Result]
    # stream error of every layer against the source: {"layer": i, "relative_error": e}
    layers: list[dict[str, float]] = Field(default_factory=list)
    # expert coverage of the conversion, copied from its manifest, where there is one
    coverage: dict[str, Any] | None = None
    notes: list[str] = Field(default_factory=list)
