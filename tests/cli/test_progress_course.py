"""The lines of long runs from the first to the last, their streams simulated: late, in leaps, on slow networks, resumed, stalled."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from m3quant.cli import progress as module
from m3quant.running import steps

GB, MB = 10**9, 10**6
SHARD = 3_700 * MB
SIZES = {"s": 1, "min": 60, "h": 3600}


@dataclass
class Stream:
    """bytes a second from `begins` on; told in leaps. stalls: the second from which nothing comes. before: in an earlier run."""

    label: str
    rate: float
    begins: float = 0.0
    leap: int = 50 * MB
    total: int = 230 * GB
    before: int = 0
    stalls: float = float("inf")
    told: int = 0

    @property
    def ends(self) -> float:
        return self.begins + (self.total - self.before) / self.rate

    def come(self, now: float) -> int:
        """Bytes that are told at `now` and were not before."""
        work = self.total - self.before
        done = min(work, int(self.rate * max(0.0, min(now, self.stalls) - self.begins)))
        whole = work if done == work else done - done % self.leap
        self.told, new = whole, whole - self.told
        return new


@dataclass
class Line:
    """A progress line and when it came. rates: label -> bytes a second, of streams that have one. eta: seconds."""

    at: float
    text: str

    @property
    def rates(self) -> dict[str, float]:
        found = re.findall(r"(\w+) [\d.]+ of [\d.]+ GB, (\d+) MB/s", self.text)
        return {label: float(rate) * MB for label, rate in found}

    @property
    def eta(self) -> float | None:
        """None where it is planned, a least one or not known."""
        found = re.search(r"ETA ((?:\d+ (?:h|min|s) ?)+)$", self.text)
        pairs = re.findall(r"(\d+) (h|min|s)", found[1]) if found else []
        return sum(int(count) * SIZES[unit] for count, unit in pairs) if pairs else None


Run = Callable[..., list[Line]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Lines of a run of these streams, the first being the command's own, until the last ends or `until`."""

    def lines(*streams: Stream, planned: float | None = 240.0, until: float | None = None) -> list[Line]:
        now, found = 0.0, []
        monkeypatch.setattr(module.time, "monotonic", lambda: now)
        own, *others = streams
        with module.BytesProgress("fp8") as progress:
            tell = [progress.beside(one.label, one.total - one.before) for one in others]
            progress.start(own.total, own.before, own.label)
            if planned is not None:
                steps.expect(planned)
            capsys.readouterr()
            while now < (until or max(one.ends for one in streams)):
                now += 0.25
                for one, advance in zip(streams, [progress.advance, *tell], strict=True):
                    advance(one.come(now))
                found += [Line(now, text) for text in capsys.readouterr().err.splitlines()]
        return found

    return lines


def check(lines: list[Line], *streams: Stream) -> None:
    """Rates are right wherever told, and the time left from a tenth of the work on; before, nothing is said that is far off."""
    end = max(one.ends for one in streams)
    tenth = max(one.begins + max((one.ends - one.begins) / 10, 2 * one.leap / one.rate) for one in streams)
    assert len(lines) > 3
    for line in lines:
        for one in streams:
            rate, early = line.rates.get(one.label), line.at < one.begins + max(10, one.leap / one.rate)
            assert early or rate is None or rate == pytest.approx(one.rate, rel=0.1), line
        left = end - line.at
        if line.eta is not None:
            assert left / 2 - 3 < line.eta < left * 2 + 3, line
        if line.at > tenth and left > 0:
            assert line.eta is not None or line.at == lines[-1].at, line


FAST = (
    Stream("convert", 1e9, 20.0),
    Stream("fetch", 1e9),
    Stream("upload", 1e9, 25.0, SHARD),
)


def test_a_published_conversion_on_a_fast_network(run: Run) -> None:
    lines = run(*FAST)
    check(lines, *FAST)
    early = [line.text for line in lines if line.at < 25]
    assert len(early) == 2 and all(line.endswith("as planned") for line in early)
    assert "; convert 0.00 of 230.00 GB, 0 MB/s; " in early[0]


def test_a_slow_network_is_told_instead_of_the_plan(run: Run) -> None:
    streams = Stream("convert", 50e6, 80.0), Stream("fetch", 50e6), Stream("upload", 50e6, 160.0, SHARD)
    lines = run(*streams)
    check(lines, *streams)
    between = [line.text for line in lines if 60 < line.at < 300]
    assert len(between) > 20 and all(re.search(r"ETA at least 7[2-7] min$", text) for text in between)


def test_an_upload_that_is_slower_than_the_rest(run: Run) -> None:
    streams = Stream("convert", 1e9, 5.0), Stream("fetch", 1e9), Stream("upload", 200e6, 30.0, SHARD)
    check(run(*streams), *streams)


def test_a_resumed_run_with_most_done(run: Run) -> None:
    streams = (
        Stream("convert", 300e6, 20.0, before=215 * GB),
        Stream("fetch", 300e6, total=15 * GB),
        Stream("upload", 100e6, 30.0, SHARD, total=18 * GB),
    )
    check(run(*streams, planned=4 * 3600.0), *streams)


def test_a_calibrated_run_that_advances_by_layers(run: Run) -> None:
    streams = (Stream("convert", 20e6, 60.0, SHARD),)
    lines = run(*streams, planned=9000.0)
    check(lines, *streams)


def test_a_stalled_stream_makes_the_time_left_grow(run: Run) -> None:
    streams = Stream("convert", 1e9, 20.0), Stream("fetch", 1e9, stalls=100.0)
    lines = run(*streams, until=700.0)
    told = [line.eta for line in lines if line.at > 105]
    assert None not in told
    left = [seconds for seconds in told if seconds is not None]
    assert left == sorted(left) and left[-1] > 10 * left[0]
    assert lines[-1].rates["fetch"] < 0.1 * 1e9
