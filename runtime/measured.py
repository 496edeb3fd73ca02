"""Decoding speeds measured with full-size models, as m3quant ships them (measured.yaml); runtime/near.py estimates by them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..checkpoint.bounded import read_yaml
from ..engines.device import Gpu
from ..errors import NodeError
from ..running.complaints import complaint, given, key_of
from .hardware import GPUS

FIGURES = Path(__file__).with_name("measured.yaml")

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
