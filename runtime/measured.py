"""How much of what bandwidth allows engines reached: figures measured with full-size models, and the ones near a plan.

A figure of another GPU with the same chip (`Gpu.chip`) bounds a plan from both sides. Between the two only what a step reads from memory
changes its time, by the ratio of the bandwidths; launches, compute and all-reduce take as long. A step that is all memory reaches the same
share of its GPU's bound, a step that is none the same speed, which is share x (bandwidth measured on / bandwidth planned for) of the bound:
`decode_bound` depends on the GPU by its bandwidth alone, with no weights in host memory. Every other step lies between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..checkpoint.bounded import read_yaml
from ..engines.device import Gpu
from ..errors import NodeError
from ..running.complaints import complaint, given, key_of
from .fit import Fit
from .hardware import GPUS

FIGURES = Path(__file__).with_name("measured.yaml")
# How far a figure may be from what is asked. Below SHORT, the cache that a step reads is small beside the weights.
REQUESTS, CONTEXT, SHORT, BYTES = 2.0, 3.0, 8192, 1.5

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class MeasuredSet(BaseModel):
    """One model on one node. weights: 'int' or 'float', of the routed experts. gpu: a name of GPUS. figures: requests, context, tokens/s,
    bound in tokens/s."""

    model_config = ConfigDict(extra="forbid")

    model_type: str
    recipe: str
    weights: Literal["int", "float"]
    stored_bytes: Count
    gpu: str
    gpus: Count
    source: str
    figures: list[tuple[Count, Count, Positive, Positive]] = Field(min_length=1)

    @property
    def measured_on(self) -> Gpu:
        return GPUS[self.gpu.lower()]

    @field_validator("gpu")
    @classmethod
    def _is_known(cls, name: str) -> str:
        names = [gpu.name for gpu in GPUS.values()]
        if name not in names:
            raise ValueError(f"must be a GPU of runtime/hardware.py: {', '.join(names)}")
        return name

    @field_validator("figures")
    @classmethod
    def _are_within_bounds(cls, figures: list[tuple[int, int, float, float]]) -> list[tuple[int, int, float, float]]:
        for _, _, speed, bound in figures:
            if speed > bound:
                raise ValueError(f"{speed:g} tokens/s are more than its bound, {bound:g}, allows")
        return figures


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sets: list[MeasuredSet]


@dataclass(frozen=True)
class Near:
    """Shares of the bound, least and most, by `count` figures near a plan: what they reached, or, where others names the GPUs of the same
    chip that they are of, what they leave the plan's own. sources: where they are from, one line a set."""

    low: float
    high: float
    count: int
    sources: tuple[str, ...]
    others: tuple[str, ...] = ()


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
    """Figures of the same family, kind of weights and node, of about as many bytes, requests and tokens; where there is none of that GPU,
    those of others with its chip. None where there is none either, and with a draft, whose accepted tokens no figure has."""
    if fit.setup.draft is not None or requests < 1:
        return None
    gpu = fit.node.gpu
    found = [
        (known, speed / bound)
        for known in measured_sets()
        if _same_kind(fit, known)
        for count, tokens, speed, bound in known.figures
        if _ratio(count, requests) <= REQUESTS and _ratio(max(tokens, SHORT), max(context, SHORT)) <= CONTEXT
    ]
    if not (found := [figure for figure in found if figure[0].gpu == gpu.name] or found):
        return None
    spans = [share_on(gpu, known.measured_on, share) for known, share in found]
    return Near(
        min(low for low, _ in spans),
        max(high for _, high in spans),
        len(found),
        tuple(dict.fromkeys(_source(fit, known) for known, _ in found)),
        tuple(dict.fromkeys(known.gpu for known, _ in found if known.gpu != gpu.name)),
    )


def share_on(gpu: Gpu, measured: Gpu, share: float) -> tuple[float, float]:
    """The least and the most of `gpu`'s bound that a step can reach which reached `share` of the bound of `measured`, of the same chip."""
    ends = share, share * measured.bandwidth / gpu.bandwidth
    return min(ends), min(1.0, max(ends))


def _source(fit: Fit, known: MeasuredSet) -> str:
    gpu = fit.node.gpu
    other = (
        ""
        if known.gpu == gpu.name
        else f", not on {fit.node.name}, which has the same chip ({gpu.chip}) and {gpu.bandwidth / known.measured_on.bandwidth:.2f} times the "
        "memory bandwidth"
    )
    return f"{known.recipe} on {known.gpus}x{known.gpu}{other}: {known.source}"


def _same_kind(fit: Fit, known: MeasuredSet) -> bool:
    weights = "int" if any(scheme.kind == "int" for scheme in fit.model.schemes) else "float"
    return (
        (known.model_type, known.weights) == (fit.model.family.model_type, weights)
        and known.gpus == fit.node.count
        and _same_chip(fit.node.gpu, known.measured_on)
        and _ratio(known.stored_bytes, fit.model.stored_bytes) <= BYTES
    )


def _same_chip(a: Gpu, b: Gpu) -> bool:
    return a.name == b.name or (a.chip == b.chip != "")


def _ratio(a: float, b: float) -> float:
    return max(a, b) / min(a, b)
