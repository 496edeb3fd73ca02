"""Progress lines without a terminal: from the first second, with step and time left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from m3quant.cli import progress as module
from m3quant.cli.verbosity import NORMAL, QUIET, VERBOSE, set_verbosity
from m3quant.running import steps


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(module.time, "monotonic", lambda: own.now)
    return own


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_the_first_line_comes_at_once_and_no_time_left_is_told_from_the_first_bytes(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with module.BytesProgress("awq") as progress:
        progress.start(2 * 10**9, 10**9)
        assert told(capsys) == ["awq: 1.00 of 2.00 GB, 0 MB/s; ETA not known yet"]
        clock.now = 20.0
        progress.advance(10**8)
        clock.now = 40.0
        progress.advance(4 * 10**8)
    assert told(capsys) == [
        "awq: 1.10 of 2.00 GB; ETA not known yet",
        "awq: 1.50 of 2.00 GB, 20 MB/s; ETA 25 s",
    ]


def test_what_was_planned_is_the_time_left_until_something_was_measured(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with module.BytesProgress("awq") as progress:
        progress.expected = 4 * 3600.0
        progress.start(2 * 10**9, 10**9)  # half of the work is done
        clock.now = 60.0
        steps.step("layer 3 (4 of 60): quantizing")
        clock.now = 72.0
        steps.part(16, 64)
    assert told(capsys)[1:] == [
        "awq: layer 3 (4 of 60): quantizing; 1.00 of 2.00 GB, 0 MB/s; ETA about 1 h 59 min, as planned",
        "awq: layer 3 (4 of 60): quantizing, 25%; 1.00 of 2.00 GB, 0 MB/s; ETA about 1 h 59 min, as planned",
    ]


def test_a_step_without_bytes_has_a_time_of_its_own(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with module.BytesProgress("verify"):
        clock.now = 11.0
        steps.step("values")
        clock.now = 31.0
        steps.part(1, 4)
    assert told(capsys)[1] == "verify: values, 25%; ETA of this step 60 s"


@pytest.mark.parametrize(("level", "lines"), [(QUIET, 0), (NORMAL, 2), (VERBOSE, 4)])
def test_quiet_tells_nothing_and_verbose_every_step(
    clock: Clock, capsys: pytest.CaptureFixture[str], level: int, lines: int
) -> None:
    set_verbosity(level)
    try:
        with module.BytesProgress("awq") as progress:
            steps.step("one")
            steps.step("two")
            progress.say("note: of any length")
    finally:
        set_verbosity(NORMAL)
    assert len(told(capsys)) == lines


def test_a_share_of_a_step_is_told_to_who_counts_it() -> None:
    heard: list[float] = []
    with steps.parts(heard.append):
        steps.part(1, 2)
        with steps.parts(lambda share: None):
            steps.part(9, 9)
    steps.part(2, 2)
    assert heard == [0.5]


def test_streams_beside_are_told_with_it_and_what_came_and_was_lost_is_no_rate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with module.BytesProgress("awq") as progress:
        progress.start(10**9, 0, "convert")
        fetched = progress.beside("fetch", 2 * 10**9)
        clock.now = 20.0
        fetched(10**9)
        clock.now = 30.0
        fetched(-(10**9))  # what came was not the file
        clock.now = 40.0
        fetched(15 * 10**8)
        clock.now = 50.0
        fetched(5 * 10**8)
        progress.advance(2 * 10**8)
        clock.now = 60.0
        progress.advance(4 * 10**8)
        clock.now = 70.0
        progress.advance(4 * 10**8)
    assert told(capsys)[1:] == [
        "awq: fetch 1.00 of 2.00 GB; convert 0.00 of 1.00 GB, 0 MB/s; ETA not known yet",
        "awq: fetch 0.00 of 2.00 GB, 0 MB/s; convert 0.00 of 1.00 GB, 0 MB/s; ETA not known yet",
        "awq: fetch 1.50 of 2.00 GB, 25 MB/s; convert 0.00 of 1.00 GB, 0 MB/s; ETA at least 20 s",
        "awq: fetch 2.00 of 2.00 GB; convert 0.00 of 1.00 GB, 0 MB/s; ETA not known yet",
        "awq: fetch 2.00 of 2.00 GB; convert 0.60 of 1.00 GB, 40 MB/s; ETA 10 s",
        "awq: fetch 2.00 of 2.00 GB; convert 1.00 of 1.00 GB",
    ]


def test_the_time_left_is_that_of_the_slowest_stream(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with module.BytesProgress("awq") as progress:
        progress.start(10**9, 0, "convert")
        fetched = progress.beside("fetch", 10**9)
        for _ in range(2):
            clock.now += 10.0
            fetched(10**8)
            progress.advance(4 * 10**8)
        clock.now += 5.0
        progress.advance(10**8)
        clock.now += 5.0
        fetched(10**8)
    assert told(capsys)[-1] == "awq: fetch 0.30 of 1.00 GB, 10 MB/s; convert 0.90 of 1.00 GB, 33 MB/s; ETA 70 s"


def test_a_plan_that_is_over_is_no_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with module.BytesProgress("fp8") as progress:
        progress.start(10**9, 0)
        steps.expect(15.0)
        for _ in range(2):
            clock.now += 10.0
            steps.step("fetching")
    assert told(capsys)[1:] == [
        "fp8: fetching; 0.00 of 1.00 GB, 0 MB/s; ETA about 5 s, as planned",
        "fp8: fetching; 0.00 of 1.00 GB, 0 MB/s; ETA not known yet",
    ]


def test_what_finished_work_waits_for_is_told_beside_the_step(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with module.BytesProgress("fp8"):
        clock.now = 10.0
        steps.step("4 of 63 shards are finished")
        clock.now = 20.0
        with steps.waiting("uploads lag behind"):
            clock.now = 30.0
    assert told(capsys) == [
        "fp8: 4 of 63 shards are finished; 10 s so far",
        "fp8: 4 of 63 shards are finished; uploads lag behind; 20 s so far",
        "fp8: 4 of 63 shards are finished; 30 s so far",
    ]


def test_a_terminal_has_a_bar_for_each_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120))
    with module.BytesProgress("awq") as progress:
        fetched = progress.beside("fetch", 1000)
        progress.start(1000, 0)
        fetched(500)
        progress.advance(500)
    last = "".join(screen.getvalue().splitlines()[-3:])
    assert "awq" in last and "fetch" in last and last.count("ETA") == 1


def test_many_small_counts_lay_out_a_bar_ten_times_a_second(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen, drawn = io.StringIO(), list[float]()
    monkeypatch.setattr(module, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120))
    redraw = module.BytesProgress._redraw

    def counted(self: module.BytesProgress, bar: Progress, now: float) -> None:
        drawn.append(now)
        redraw(self, bar, now)

    monkeypatch.setattr(module.BytesProgress, "_redraw", counted)
    with module.BytesProgress("awq") as progress:
        fetched = progress.beside("fetch", 4000 * 10**6)
        progress.start(10**9, 0)
        drawn.clear()
        for number in range(1, 4001):
            clock.now = number // 1000 * 0.25
            fetched(10**6)
        assert set(drawn) - {0.0} == {0.25, 0.5, 0.75, 1.0}
        assert len(drawn) < 400  # the thread that draws each second may add to the four
        bar = progress._bar
        assert bar is not None
    assert bar.tasks[1].completed == 4000 * 10**6, "what came last is shown at the end"
