"""What the benchmarks that convert in their own process share: random windows, and a record of the lines that the conversion printed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from m3quant.calibration.corpus import Windows
from m3quant.planning.plan import Plan


class LineRecorder:
    """A Progress that keeps each line with the seconds since `started` (time.perf_counter)."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.lines: list[str] = []

    def start(self, total_bytes: int, done_bytes: int, label: str = "") -> None: ...
    def advance(self, count: int) -> None: ...

    def say(self, line: str) -> None:
        self.lines.append(f"{time.perf_counter() - self.started:.2f} {line}")


def random_windows(plan: Plan) -> Any:
    """Random token ids in the shape that the recipe asks for: what calibration costs does not depend on the text."""
    data = plan.recipe.data
    vocabulary = plan.family.vocab_size
    shape = (data.windows + data.heldout_windows, data.window_length)
    ids = np.random.default_rng(0).integers(0, vocabulary, shape)
    counts = np.full((shape[0], 1), shape[1])
    return Windows(ids=ids, window_kind_tokens=counts, kinds=("text",), sha256="", corpus_sha256="", tokenizer_sha256="", seed=0, source="random")  # fmt: skip
