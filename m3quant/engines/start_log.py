"""An engine's start-up log as numbers, whichever engine printed it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from .device import Gpu

_DIGITS = 18
WEIGHTS, CACHE, OVERHEAD = "weights", "cache", "overhead"  # the parts of a prediction that a setting can change


@dataclass
class EngineLog:
    """What a log said; None where it said nothing. Sizes in bytes, per GPU.

    settings: under vLLM's names of them, into which the reader of another engine's log translates its own.
    """

    version: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    arguments: bool = False  # the arguments were printed: a setting that is absent has the engine's default
    other_settings: list[str] = field(default_factory=list)  # names of arguments that the prediction does not read
    vision: bool = False  # the vision tower was profiled
    total: int | None = None
    free_at_start: int | None = None
    requested: int | None = None
    utilization: float | None = None
    weights: int | None = None
    consumed: int | None = None  # weights + non-torch (0.33's wording)
    non_torch: int | None = None
    activation: int | None = None
    graphs: int | None = None
    graphs_estimated: int | None = None
    kv_available: int | None = None
    kv_pinned: int | None = None
    pool_tokens: int | None = None
    max_model_len: int | None = None
    concurrency: float | None = None
    needed_for: int | None = None  # the length that did not fit, with the bytes it needs and the longest that would
    needed: int | None = None
    estimated_max_len: int | None = None
    fitted_len: int | None = None
    suggested_pin: int | None = None
    sparse_attention: str | None = None
    no_memory: bool = False

    @property
    def tp(self) -> int:
        return self._count("tensor_parallel_size")

    @property
    def pp(self) -> int:
        return self._count("pipeline_parallel_size")

    @property
    def dp(self) -> int:
        return self._count("data_parallel_size")

    @property
    def dcp(self) -> int:
        return self._count("decode_context_parallel_size")

    def _count(self, name: str) -> int:
        """What is no number (None, auto) is the engine's default, 1."""
        return whole_number(self.settings.get(name, "")) or 1

    def setting(self, *names: str) -> str | None:
        return next((self.settings[name] for name in names if name in self.settings), None)


def whole_number(text: str) -> int | None:
    """None for what is none, or has more digits than any setting of an engine."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _DIGITS else None


def is_true(value: str | None) -> bool:
    """Whether a setting is a true switch."""
    return value is not None and value.lower() == "true"


def is_empty(log: EngineLog) -> bool:
    return log == EngineLog()


class LogReader(ABC):
    """How one engine's start-up log is read."""

    start: ClassVar[str]  # printed once a start
    releases: ClassVar[str]  # those whose lines are known, in words

    @abstractmethod
    def read(self, text: str) -> EngineLog:
        """All that the log states. A log of something else gives an empty EngineLog. Linear in the text."""

    @abstractmethod
    def server_defaults(self, gpu: Gpu) -> tuple[int, int] | tuple[None, None]:
        """max_num_batched_tokens and max_num_seqs where the arguments do not say; unknown without the memory."""

    @abstractmethod
    def vision(self, log: EngineLog) -> bool | None:
        """Whether the engine built and profiled the vision tower; None where the log does not tell."""

    @abstractmethod
    def uncovered(self, settings: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
        """`setting=value` -> which of WEIGHTS, CACHE and OVERHEAD it changes, where the prediction does not know it."""
