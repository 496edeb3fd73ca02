"""A timeline of a conversion's stages: which stage was busy when, with how many bytes. Costs one comparison per span if off.

    with recording() as timeline:
        convert(...)
    timeline.stages()

The code under measurement wraps its work in `span("read", nbytes)`, and work that a GPU does asynchronously in
`device_span("search", nbytes)`, which is timed by events on the current stream. Needs torch only for the latter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

# The stages that a data-free or calibrated conversion is made of; a span may carry any other name too.
STAGES = ("read", "h2d", "forward", "search", "pack", "d2h", "hash", "write", "sync")
_OFF: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True)
class Span:
    """One stretch of work. start and end: seconds since the recording began. lane: the thread, or the GPU's stream."""

    stage: str
    lane: str
    start: float
    end: float
    nbytes: int = 0
    label: str = ""


@dataclass(frozen=True)
class Stage:
    """All spans of one stage. busy: seconds in which at least one ran; work: their sum, more where several ran at once."""

    stage: str
    spans: int
    nbytes: int
    busy: float
    work: float
    first: float
    last: float


class Timeline:
    """The spans of one recording. Threads may add to it at any time."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds = 0.0
        self._spans: list[Span] = []
        self._events: list[tuple[str, str, int, str, Any, Any]] = []
        self._base: dict[int, tuple[float, Any]] = {}  # device -> host time of an event on it
        self._lock = threading.Lock()

    def add(self, stage: str, start: float, end: float, nbytes: int = 0, label: str = "", lane: str = "") -> None:
        """A finished span; start and end as time.perf_counter() gives them."""
        name = lane or threading.current_thread().name
        with self._lock:
            self._spans.append(Span(stage, name, start - self.began, end - self.began, nbytes, label))

    @contextmanager
    def host(self, stage: str, nbytes: int, label: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, started, time.perf_counter(), nbytes, label)

    @contextmanager
    def device(self, stage: str, nbytes: int, label: str) -> Iterator[None]:
        import torch

        stream = torch.cuda.current_stream()
        self._anchor(stream.device_index)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        try:
            yield
        finally:
            after.record(stream)
            lane = f"gpu {stream.device_index} stream {stream.stream_id}"
            with self._lock:
                self._events.append((stage, lane, nbytes, label, before, after))

    def _anchor(self, device: int) -> None:
        """Ties the device's clock to the host's, once."""
        import torch

        with self._lock:
            if device not in self._base:
                event = torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize(device)
                event.record()
                event.synchronize()
                self._base[device] = (time.perf_counter(), event)

    def finish(self) -> None:
        """End the recording and read the events, which waits for the GPU."""
        if self._events:
            import torch

            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.began
        for stage, lane, nbytes, label, before, after in self._events:
            base, anchor = self._base[int(lane.split()[1])]
            start, end = (base + anchor.elapsed_time(event) / 1000 for event in (before, after))
            self.add(stage, start, end, nbytes, label, lane)
        self._events.clear()

    @property
    def spans(self) -> list[Span]:
        with self._lock:
            return sorted(self._spans, key=lambda s: (s.start, s.end))

    def stages(self) -> list[Stage]:
        """One row per stage, in the order of STAGES, others after them by first appearance."""
        by_stage: dict[str, list[Span]] = {}
        for span_ in self.spans:
            by_stage.setdefault(span_.stage, []).append(span_)
        order = [name for name in STAGES if name in by_stage] + [name for name in by_stage if name not in STAGES]
        return [
            Stage(
                name,
                len(own := by_stage[name]),
                sum(s.nbytes for s in own),
                total(union(own)),
                sum(s.end - s.start for s in own),
                min(s.start for s in own),
                max(s.end for s in own),
            )
            for name in order
        ]

    def overlap(self) -> dict[str, dict[str, float]]:
        """stage -> other stage -> share of the first's busy time in which the other was busy too."""
        runs: dict[str, list[tuple[float, float]]] = {}
        for stage in self.stages():
            runs[stage.stage] = union([s for s in self.spans if s.stage == stage.stage])
        return {
            a: {b: total(common(runs[a], runs[b])) / busy if (busy := total(runs[a])) else 0.0 for b in runs if b != a}
            for a in runs
        }

    def to_json(self) -> dict[str, Any]:
        """Seconds, stages and overlaps; spans are left out, being many."""
        return {
            "seconds": self.seconds,
            "stages": [asdict(stage) for stage in self.stages()],
            "overlap": self.overlap(),
        }


def union(spans: list[Span]) -> list[tuple[float, float]]:
    """Disjoint intervals, in order, that cover the same instants as `spans`."""
    merged: list[tuple[float, float]] = []
    for span_ in sorted(spans, key=lambda s: s.start):
        if merged and span_.start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], span_.end))
        else:
            merged.append((span_.start, span_.end))
    return merged


def common(left: list[tuple[float, float]], right: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The instants in both of two lists of disjoint, ordered intervals."""
    out, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            out.append((start, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return out


def total(intervals: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


_timeline: Timeline | None = None


@contextmanager
def recording() -> Iterator[Timeline]:
    """Record every span of this process until the block ends. Raises RuntimeError where a recording runs already."""
    global _timeline
    if _timeline is not None:
        raise RuntimeError("a recording of this process runs already")
    _timeline = timeline = Timeline()
    try:
        yield timeline
    finally:
        _timeline = None
        timeline.finish()


def span(stage: str, nbytes: int = 0, label: str = "") -> AbstractContextManager[None]:
    """Work of this thread, timed from entry to exit where a recording runs. nbytes: what it moves, for a rate."""
    return _OFF if _timeline is None else _timeline.host(stage, nbytes, label)


def device_span(stage: str, nbytes: int = 0, label: str = "") -> AbstractContextManager[None]:
    """Work that is queued on the current CUDA stream inside the block, timed on the GPU; on a CPU as `span`."""
    if _timeline is None:
        return _OFF
    import torch

    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return _timeline.device(stage, nbytes, label) if on_gpu else _timeline.host(stage, nbytes, label)
