"""When the engine's gauges let forecasts count, and when they no longer do."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from m3quant.runtime.guard.referee import (
    AIM,
    BACK,
    EDGE,
    FIRST_SHARE,
    FORGET_S,
    HEARD,
    LEAST_SHARE,
    LESSON,
    MARGIN,
    MOST_LESSONS,
    MOST_SHARE,
    STALE_S,
    Referee,
)

NAMES = dict(zip(("waiting", "running", "usage", "preempted", "written"), HEARD, strict=True))


class Engine:
    """Gauges that change with every look unless the test holds them still."""

    def __init__(self) -> None:
        self.now = 100.0
        self.referee = Referee(lambda: self.now)
        self.gauges = {"waiting": 0.0, "running": 4.0, "usage": 0.5, "preempted": 0.0, "written": 0.0}

    def look(self, inside: int = 4, moves: bool = True, after_s: float = 0.1, **changes: Any) -> str:
        self.now += after_s
        if moves:
            self.gauges["written"] += 4.0
        self.gauges.update(changes)
        self.referee.see({NAMES[name]: value for name, value in self.gauges.items() if value is not None}, inside)
        return self.referee.against


def test_before_the_first_look_nothing_is_forecast() -> None:
    assert Engine().referee.against == "gauges"


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -1.0, 1e300])
def test_a_gauge_that_is_missing_or_no_such_number_closes(name: str, value: float | None) -> None:
    engine = Engine()
    assert engine.look() == ""
    before = engine.gauges[name]
    assert engine.look(moves=False, **{name: value}) == "gauges"
    assert engine.look(moves=False, **{name: before}) == ""


def test_gauges_that_stand_still_close_only_while_requests_are_inside() -> None:
    engine = Engine()
    engine.look()
    assert engine.look(moves=False, after_s=STALE_S - 0.1) == ""
    assert engine.look(moves=False, after_s=0.2) == "stale"
    assert engine.look() == ""
    for _ in range(5):
        assert engine.look(inside=0, moves=False, after_s=STALE_S) == ""
    assert engine.look(inside=1, moves=False, after_s=0.1) == ""  # it has just come in


def test_a_full_cache_closes_until_it_has_room_again() -> None:
    engine = Engine()
    assert engine.look(usage=EDGE - 0.01) == ""
    assert engine.look(usage=EDGE) == "full"
    assert engine.look(usage=BACK) == "full"
    assert engine.look(usage=BACK - 0.01) == ""
    assert engine.look(usage=BACK + 0.01) == ""


def test_a_preemption_closes_and_leaves_a_margin_that_fades() -> None:
    engine = Engine()
    engine.look()
    assert engine.look(preempted=1.0, usage=0.7) == "preempted"
    assert engine.referee.margin == pytest.approx(MARGIN + LESSON)
    assert engine.look(usage=BACK + 0.01) == "preempted"
    assert engine.look(usage=BACK - 0.01) == ""
    engine.now += FORGET_S
    assert engine.referee.margin == pytest.approx(MARGIN + LESSON / math.e, rel=0.01)
    engine.look(preempted=1e6)
    assert engine.referee.margin == pytest.approx(MARGIN + MOST_LESSONS)


def test_preemptions_before_the_start_count_for_nothing() -> None:
    engine = Engine()
    assert engine.look(preempted=100.0) == "" and engine.referee.margin == MARGIN


def test_steps_are_the_tokens_of_a_request_that_runs_all_the_time() -> None:
    rng, engine, true = random.Random(), Engine(), 0
    engine.look(running=8.0, written=0.0, moves=False)
    for _ in range(300):
        before = engine.gauges["running"]
        running = max(1.0, before + rng.choice([-1, 0, 1]))
        steps = rng.randint(1, 3)
        true += steps
        written = engine.gauges["written"] + steps * (before + running) / 2
        engine.look(running=running, written=written, moves=False)
    assert engine.referee.steps == pytest.approx(true)


def test_counters_that_start_again_move_nothing_backwards() -> None:
    engine = Engine()
    engine.look(written=1000.0, preempted=5.0)
    steps = engine.referee.steps
    assert engine.look(moves=False, written=0.0, preempted=0.0) == ""
    assert engine.referee.steps == steps and engine.referee.margin == MARGIN


def test_the_expected_quantile_comes_to_rest_at_the_share_that_is_aimed_at() -> None:
    """As if fewer answers were preempted, the higher the quantile: a tenth at the lowest, none at the highest."""
    rng, engine, preempted, answers = random.Random(3), Engine(), 0, 20_000
    engine.look()
    assert engine.referee.share == FIRST_SHARE
    for _ in range(answers):
        if rng.random() < 0.1 * (MOST_SHARE - engine.referee.share):
            preempted += 1
            engine.look(preempted=float(preempted))
        engine.referee.answered()
        assert LEAST_SHARE <= engine.referee.share <= MOST_SHARE
    assert 0.5 * AIM < preempted / answers < 2 * AIM
