"""The rate of a stream and the time that it still takes, against streams whose rate is known: early, late, in leaps, stalled."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from m3quant.running.pace import KNOWN_SHARE, LEAST_SECONDS, MARK_SECONDS, MARK_SHARE, Pace

GB = 10**9
TOTAL = 230 * GB
SEED = random.SystemRandom().randrange(2**32)


def arrivals(total: int, rate: float, begins: float, leap: int) -> Iterator[tuple[float, int]]:
    """Seconds and bytes of every arrival; the last one is what is left."""
    for done in range(0, total, leap):
        count = min(leap, total - done)
        yield begins + (done + count) / rate, count


@pytest.mark.parametrize("leap", [100 * 10**6, 3_700 * 10**6])
@pytest.mark.parametrize("rate", [50e6, 300e6, 1e9])
@pytest.mark.parametrize("begins", [0.0, 25.0, 600.0])
@pytest.mark.parametrize("total", [TOTAL, 40 * GB])
def test_a_constant_rate_is_told_exactly_over_the_whole_course(
    total: int, leap: int, rate: float, begins: float
) -> None:
    pace, end = Pace(total), begins + total / rate
    known_at = None
    coming = list(arrivals(total, rate, begins, leap))
    assert pace.rate(begins) == 0 and pace.seconds_left(begins) is None
    for (at, count), following in zip(coming, [*(at for at, _ in coming[1:]), end], strict=True):
        pace.advance(count, at)
        for now in (at, (at + following) / 2, following):
            left = pace.seconds_left(now)
            if left is None:
                assert known_at is None, "what was known once stays known"
                continue
            known_at = pace.done if known_at is None else known_at
            assert pace.rate(now) == pytest.approx(rate, rel=1e-6)
            assert left == pytest.approx(end - now, rel=0.01, abs=2.0) or pace.done == total
    # It is known once enough came after the first arrivals that count as one.
    first = max(leap + MARK_SHARE * total, leap + MARK_SECONDS * rate)
    assert known_at is not None and known_at <= first + leap + max(KNOWN_SHARE * total, LEAST_SECONDS * rate)
    assert pace.seconds_left(end) == 0


def test_unequal_leaps_at_unequal_times_stay_within_a_factor_of_two_after_a_tenth() -> None:
    chance, rate = random.Random(SEED), 400e6
    pace, now = Pace(TOTAL), 40.0
    while pace.done < TOTAL:
        count = min(TOTAL - pace.done, chance.randrange(GB, 4 * GB))
        now += count / rate
        # It is told up to three seconds late.
        pace.advance(count, now + chance.uniform(0, 3))
        left, truth = pace.seconds_left(now + 3), (TOTAL - pace.done) / rate - 3
        if pace.done >= TOTAL / 10 and truth > 10:
            assert left is not None and truth / 2 < left < truth * 2, SEED


def test_several_files_at_once_arrive_at_once() -> None:
    pace, end = Pace(TOTAL), TOTAL / 1e9
    for number in range(TOTAL // (15 * GB)):
        for part in range(4):
            at = 15.0 * (number + 1) + 0.2 * part
            pace.advance(15 * GB // 4, at)
            left = pace.seconds_left(at + 0.1)
            assert left is None or (end - at) / 2 < left < (end - at) * 2 + 15
    assert pace.seconds_left(end) is not None


def test_a_stalled_stream_slows_down_without_end() -> None:
    for leap in (100 * 10**6, 3_700 * 10**6):
        pace = Pace(TOTAL)
        for at, count in arrivals(TOTAL // 2, 1e9, 25.0, leap):
            pace.advance(count, at)
        stalls = 25.0 + TOTAL / 2 / 1e9
        told = [pace.seconds_left(stalls + seconds) for seconds in (0, 10, 60, 600, 3600)]
        assert None not in told
        left = [seconds for seconds in told if seconds is not None]
        assert left[0] == pytest.approx(115, rel=0.05)
        assert left == sorted(left) and left[2] > 1.5 * left[0] and left[3] > 10 * left[0] and left[4] > 60 * left[0]
        rate = pace.rate(stalls + 600)
        assert rate is not None and rate < 0.1e9
        # Once it goes on, what was lost is forgotten.
        for at, count in arrivals(TOTAL // 4, 1e9, stalls + 3600, leap):
            pace.advance(count, at)
        last = stalls + 3600 + TOTAL / 4 / 1e9
        assert pace.rate(last) == pytest.approx(1e9, rel=0.01)


def test_another_rate_is_told_after_a_tenth_of_the_work() -> None:
    pace, at = Pace(TOTAL), 0.0
    for rate, share in ((2e9, 0.3), (50e6, 0.12)):
        for _ in range(int(share * TOTAL / GB)):
            at += GB / rate
            pace.advance(GB, at)
    assert pace.rate(at) == pytest.approx(50e6, rel=0.02)


def test_bytes_that_are_lost_again_are_no_rate_below_nothing() -> None:
    pace = Pace(TOTAL)
    pace.advance(4 * GB, 10.0)
    pace.advance(3 * GB, 20.0)
    pace.advance(-7 * GB, 21.0)
    assert pace.rate(22.0) == 0 and pace.seconds_left(22.0) is None and pace.done == 0


def test_what_is_kept_is_bounded_however_long_it_takes() -> None:
    pace = Pace(TOTAL)
    for second in range(40_000):
        pace.advance(TOTAL // 40_000, float(second))
    assert len(pace._marks) < 1000


def test_what_is_kept_is_bounded_while_the_same_bytes_are_lost_and_come_again() -> None:
    pace = Pace(TOTAL)
    for second in range(20_000):
        pace.advance(TOTAL // 100 if second % 2 == 0 else -(TOTAL // 100), float(second))
    assert len(pace._marks) < 200
    # Once they stay, the rate is theirs.
    for second in range(20_000, 20_060):
        pace.advance(TOTAL // 100, float(second))
    assert pace.rate(20_060.0) == pytest.approx(TOTAL / 100, rel=0.01)
