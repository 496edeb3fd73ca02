"""How much of what bandwidth allows engines reached: figures measured with full-size models, and the ones near a plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..checkpoint.bounded import read_yaml
from ..errors import NodeError
from ..running.complaints import complaint, given, key_of
from .fit import Fit

FIGURES = Path(__file__).with_name("measured.yaml")
# How far a figure may be from what is asked. Below SHORT, the cache that a step reads is small beside the weights.
REQUESTS, CONTEXT, SHORT, BYTES = 2.0, 3.0, 8192, 1.5

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class MeasuredSet(BaseModel):
    """One model on one node. weights: 'int' or 'float', of the routed experts. figures: requests, context, tokens/s, bound in tokens/s."""

    model_config = ConfigDict(extra="forbid")

    model_type: str
    recipe: str
    weights: Literal["int", "float"]
    stored_bytes: Count
    gpu: str
    gpus: Count
    source: str
    figures: list[tuple[Count, Count, Positive, Positive]] = Field(min_length=1)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sets: list[MeasuredSet]


@dataclass(frozen=True)
class Near:
    """Shares of the bound that were reached near a plan, least and most, and where: one line a set."""

    low: float
    high: float
    count: int
    sources: tuple[str, ...]


@cache
def measured_sets() -> tuple[MeasuredSet, ...]:
    """The figures that ship with m3quant."""
    return read_measured(FIGURES)


def read_measured(path: Path) -> tuple[MeasuredSet, ...]:
    """Raises NodeError with the key that is wrong: sets are added by hand, from what a benchmark writes."""
    try:
        return tuple(_File.model_validate(read_yaml(path, "measured speeds", error=NodeError)).sets)
    except ValidationError as error:
        first = error.errors()[0]
        where = key_of(first) or "the whole"
        raise NodeError(
            f"measured speeds {path}, key '{where}': {complaint('it', first)}{given(first)}: write a set as `python -m tests.benchmarks.bench_gpu_table --yaml` does."
        ) from None


def near(fit: Fit, context: int, requests: int) -> Near | None:
    """Figures of the same family, kind of weights and node, of about as many bytes, requests and tokens. None where there is none, and
    with a draft, whose accepted tokens no figure has."""
    if fit.setup.draft is not None or requests < 1:
        return None
    shares, sources = list[float](), dict[str, None]()
    for known in measured_sets():
        if not _same_kind(fit, known):
            continue
        for count, tokens, speed, bound in known.figures:
            if _ratio(count, requests) <= REQUESTS and _ratio(max(tokens, SHORT), max(context, SHORT)) <= CONTEXT:
                shares.append(speed / bound)
                sources[f"{known.recipe} on {known.gpus}x{known.gpu}: {known.source}"] = None
    return Near(min(shares), max(shares), len(shares), tuple(sources)) if shares else None


def _same_kind(fit: Fit, known: MeasuredSet) -> bool:
    weights = "int" if any(scheme.kind == "int" for scheme in fit.model.schemes) else "float"
    return (
        (known.model_type, known.weights) == (fit.model.family.model_type, weights)
        and (known.gpus, known.gpu) == (fit.node.count, fit.node.gpu.name)
        and _ratio(known.stored_bytes, fit.model.stored_bytes) <= BYTES
    )


def _ratio(a: float, b: float) -> float:
    return max(a, b) / min(a, b)
