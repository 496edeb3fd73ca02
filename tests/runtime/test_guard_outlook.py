"""RESERVE=learned against a model of vLLM's scheduler: what is promised stays above what is used, and what a wrong forecast costs."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3quant.runtime.guard.growth import Growth
from m3quant.runtime.guard.ledger import Ledger
from m3quant.runtime.guard.outlook import TOLERANCE, Outlook
from m3quant.runtime.guard.referee import STALE_S
from m3quant.runtime.guard.tickets import State, Ticket
from tests.support.runtime.guarded_scheduler import (
    CAPACITY,
    PATIENCE_S,
    STEP_S,
    Draw,
    Run,
    ends_by_itself,
    known_lengths,
    plain,
)
from tests.support.runtime.scheduler_model import BLOCK, SEQUENCES, Scheduler


def test_lengths_that_are_known_cost_next_to_nothing() -> None:
    """In steps of the model, not in seconds: the same requests through each of the three."""
    steps = 2500
    tokens, preempted = plain(known_lengths, steps)
    full = Run(known_lengths, learned=False).steps(steps)
    learned = Run(known_lengths).steps(steps)
    assert preempted > 0.3 and full.preempted_share == 0
    assert full.scheduler.written < 0.85 * tokens
    assert learned.scheduler.written > 0.95 * tokens and learned.preempted_share < 0.03
    assert learned.most_promised > 1.3 * CAPACITY  # what may be used at most passes the pool, and is said


def test_lengths_are_learned_once_enough_answers_have_ended() -> None:
    def short(rng: random.Random) -> tuple[int, int, int]:
        return rng.randint(4, 200), rng.randint(30, 60), 800

    run = Run(short).steps(1500)
    cold, ended = run.scheduler.written, len(run.ended)
    assert cold > 0 and ended >= 16
    run.steps(1500)
    assert run.scheduler.written - cold > 3 * 1500  # two of 800 tokens fit in full
    assert sum(one.preempted > 0 for one in run.ended[ended:]) <= 0.05 * len(run.ended[ended:])


class Turning:
    """Answers of 8 tokens, of 700 that are asked for; from the 300th on, of all 700."""

    def __init__(self) -> None:
        self.drawn = 0

    def __call__(self, rng: random.Random) -> tuple[int, int, int]:
        self.drawn += 1
        return rng.randint(4, 100), 8 if self.drawn < 300 else 700, 700


def test_a_client_that_trains_short_answers_and_sends_long_ones() -> None:
    """The first long ones are taken for short and preempt each other, as without a guard; what comes later is not mistaken again."""
    run = Run(Turning()).steps(6000)
    assert all(one.written == one.length for one in run.ended) and run.ended[-1].length == 700
    mistaken = [one for one in run.tickets if one.preempted]
    assert 0 < len(mistaken) <= 3 * SEQUENCES
    ended = len(run.ended)
    run.steps(6000)
    later = [one for one in run.ended[ended:] if one not in mistaken]
    assert len(later) > 10 and sum(one.preempted > 0 for one in later) <= 1


def test_a_referee_that_hears_nothing_falls_back_to_full_reservation() -> None:
    run = Run(known_lengths, deaf_from=500).steps(500 + int(STALE_S / STEP_S) + 50)
    assert run.outlook.referee.against == "stale" and not run.ledger.forecasting
    for _ in range(20):  # from here on a request starts only where all it may use fits
        before = run.ledger.reserved
        run.steps(20)
        assert run.ledger.reserved <= max(before, CAPACITY)
    assert run.scheduler.preempted <= 2


def test_after_a_restart_nothing_is_known_and_all_is_reserved() -> None:
    run = Run(ends_by_itself).steps(1500)
    growth = Growth(100, 320, "class")
    ticket = Ticket("key", 448, growth=growth)
    assert run.outlook.course(ticket, 0).left < 320
    fresh = Outlook(lambda: {})
    fresh.resize(CAPACITY, BLOCK)
    assert fresh.course(Ticket("key", 448, growth=Growth(100, 320, "class")), 0).left == 320
    assert not fresh.open  # and without gauges no forecast counts


def test_a_request_that_waits_is_judged_by_what_is_learned_meanwhile() -> None:
    outlook = Outlook(lambda: {})
    outlook.resize(CAPACITY, BLOCK)
    waiting, other = (Ticket("key", 448, growth=Growth(100, 320, name)) for name in ("class", "other class"))
    assert outlook.course(waiting, 0).left == outlook.course(other, 0).left == 320
    for _ in range(40):
        outlook.learn(answer(10), finished=True)
    assert outlook.course(waiting, 0).left == 10 and outlook.course(other, 0).left == 320
    for _ in range(400):  # the longer ones come to be the rule
        outlook.learn(answer(60), finished=True)
    assert outlook.course(waiting, 0).left > 50


def test_a_request_that_starts_is_judged_anew_however_it_was_judged_before() -> None:
    """One that starts because all it may use fits is not asked for its course when it starts."""
    outlook = Outlook(lambda: {})
    outlook.resize(CAPACITY, BLOCK)
    ticket = Ticket("key", 448, growth=Growth(100, 320, "class"))
    assert outlook.course(ticket, 0).left == 320
    for _ in range(40):
        outlook.learn(answer(10), finished=True)
    outlook.begin(ticket)
    assert outlook.course(ticket, 0).left == 10
    for _ in range(400):
        outlook.learn(answer(60), finished=True)
    assert outlook.course(ticket, 0).left == 10  # while it runs, at its own lengths alone


def answer(tokens: int) -> Growth:
    """One that ended by itself, of which the engine said its tokens."""
    growth = Growth(100, 320, "class")
    growth.tally.usage = tokens
    return growth


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    keys=st.integers(1, 12),
    draw=st.sampled_from([known_lengths, ends_by_itself]),
    deaf_from=st.sampled_from([0, 100, 10**9]),
    delay=st.integers(0, 20),
)
def test_what_is_promised_is_never_below_what_is_used(
    seed: int, keys: int, draw: Draw, deaf_from: int, delay: int
) -> None:
    """`Run._check` looks at every step; here for any load, gauges that stop, and an engine that is slow to take requests."""
    run = Run(draw, keys=keys, seed=seed, deaf_from=deaf_from, delay=delay).steps(300)
    assert all(one.written == one.length for one in run.ended)
    for ticket in list(run.sequences):
        run.ledger.release(ticket)
    assert (run.ledger.reserved, run.ledger.queued, run.ledger.admitted) == (0, 0, 0) and not run.outlook.running


def test_the_first_of_a_key_is_not_passed_for_ever() -> None:
    """A request of most of the pool, before a stream of small ones of its own key."""
    now = [0.0]
    heard = dict.fromkeys(Scheduler(lambda _: None).gauges(), 0.0)
    outlook = Outlook(lambda: heard, lambda: now[0])
    outlook.resize(CAPACITY, BLOCK)
    ledger = Ledger(CAPACITY, 100 * CAPACITY, BLOCK, PATIENCE_S, lambda: now[0], outlook)
    running: list[Ticket] = []

    def small() -> Ticket:
        return Ticket("key", 2 * BLOCK, growth=Growth(BLOCK, BLOCK, "class"))

    for _ in range(20):
        ledger.offer(ticket := small())
        running.append(ticket)
    large = Ticket("key", CAPACITY, growth=Growth(CAPACITY - 2 * BLOCK, 2 * BLOCK, "class"))
    ledger.offer(large)
    for _ in range(200):
        ledger.offer(small())
        now[0] += 0.1
        heard["vllm:generation_tokens_total"] += 1
        if running and large.state is not State.ADMITTED:
            ledger.release(running.pop(0))
        running += ledger.advance()
    assert large.state is State.ADMITTED


def test_what_the_engine_holds_beyond_the_forecast_is_added_to_it() -> None:
    heard = dict.fromkeys(Scheduler(lambda _: None).gauges(), 0.0) | {"vllm:kv_cache_usage_perc": 0.8}
    outlook = Outlook(lambda: heard, lambda: 0.0)
    outlook.resize(CAPACITY, BLOCK)
    outlook.begin(Ticket("key", 4 * BLOCK, growth=Growth(BLOCK, 3 * BLOCK, "class")))
    assert outlook.open
    assert pytest.approx(outlook.forecast(0).peak) == 0.8 * CAPACITY + 3 * BLOCK - TOLERANCE * CAPACITY
