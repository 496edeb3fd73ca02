"""How far a layer's calibration is, in bytes of its source: what its search and its forward passes compute is what takes the time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..planning.plan import Plan
from ..planning.timing_model import forward_flops, search_flops
from ..planning.unit import Unit
from ..running import steps
from ..running.progress import Progress
from .words import layer_words

# Stage -> what a person reads of it.
WORDS = {
    "search": "quantizing",
    "forward_source": "hidden states of the source",
    "pack": "packing and writing",
    "forward_quantized": "hidden states of the output",
}


def stage_shares(plan: Plan) -> dict[str, tuple[float, float]]:
    """Stage -> where in a layer it begins and ends (0 to 1), by the operations that an average layer takes."""
    search, forward = search_flops(plan), forward_flops(plan) / 2
    total = search + 2 * forward
    ends = {
        "search": search / total,
        "forward_source": (search + forward) / total,
        "pack": (search + forward) / total,
        "forward_quantized": 1.0,
    }
    begins = [0.0, *list(ends.values())[:-1]]
    return dict(zip(ends, zip(begins, ends.values(), strict=True), strict=True))


class LayerWork:
    """Tells progress the bytes of one layer in shares."""

    def __init__(self, progress: Progress, plan: Plan, unit: Unit, shares: Mapping[str, tuple[float, float]]) -> None:
        self._progress, self._plan, self._unit, self._shares = progress, plan, unit, shares
        self._told = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin, end = self._shares[name]
        steps.step(layer_words(self._plan, self._unit, WORDS[name]))
        with steps.parts(lambda share: self._reach(begin + share * (end - begin))):
            yield
        self._reach(end)

    def _reach(self, share: float) -> None:
        """Never back: a search may go over its experts several times."""
        now = max(self._told, round(self._unit.bytes_in * share))
        self._progress.advance(now - self._told)
        self._told = now
