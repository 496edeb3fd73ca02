"""The recorder of stages: exact unions and overlaps, many threads, and nothing at all when off."""

from __future__ import annotations

import itertools
import random
import threading
import time

import pytest

from m3quant.running import timing
from m3quant.running.timing import Span, Timeline, common, device_span, recording, span, total, union


def spans_of(*stretches: tuple[str, float, float]) -> Timeline:
    timeline = Timeline()
    for stage, start, end in stretches:
        timeline.add(stage, timeline.began + start, timeline.began + end, nbytes=10)
    return timeline


def test_stages_count_busy_time_once_and_work_in_full() -> None:
    timeline = spans_of(("write", 4, 6), ("read", 0, 2), ("read", 1, 3), ("read", 5, 6), ("own", 0, 1))
    read, write, own = timeline.stages()
    assert (read.stage, read.spans, read.nbytes, read.first, read.last) == (
        "read",
        3,
        30,
        pytest.approx(0),
        pytest.approx(6),
    )
    assert (read.busy, read.work) == (pytest.approx(4), pytest.approx(5))
    assert (write.stage, own.stage) == ("write", "own")
    assert timeline.overlap()["write"]["read"] == pytest.approx(0.5)
    assert timeline.overlap()["read"]["write"] == pytest.approx(0.25)


def test_union_and_common_agree_with_counting_instants() -> None:
    generator = random.Random(5)
    for _ in range(50):
        sets = []
        for _ in range(2):
            drawn = [(a, a + generator.randint(1, 6)) for a in (generator.randint(0, 40) for _ in range(8))]
            sets.append([Span("s", "t", float(a), float(b)) for a, b in drawn])
        instants = [{i for s in group for i in range(int(s.start), int(s.end))} for group in sets]
        left, right = (union(group) for group in sets)
        assert total(left) == len(instants[0])
        assert total(common(left, right)) == len(instants[0] & instants[1])
        assert all(a[1] < b[0] for a, b in itertools.pairwise(left))


def test_spans_of_several_threads_and_of_failing_work_are_recorded() -> None:
    def work() -> None:
        with span("read", 7, "x"):
            time.sleep(0.01)

    with recording() as timeline:
        threads = [threading.Thread(target=work, name=f"reader-{i}") for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(ValueError), device_span("search"):
            raise ValueError
        with pytest.raises(RuntimeError, match="runs already"), recording():
            pass
    assert {s.lane for s in timeline.spans if s.stage == "read"} == {f"reader-{i}" for i in range(3)}
    read, search = timeline.stages()
    assert (read.nbytes, read.spans, search.stage) == (21, 3, "search")
    assert read.busy <= read.work and timeline.seconds >= read.last


def test_nothing_is_kept_when_off() -> None:
    assert span("read", 3) is span("write", 4) is device_span("search")
    with span("read"):
        pass
    assert timing._timeline is None
