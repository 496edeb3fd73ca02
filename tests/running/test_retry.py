"""Asking again: which failures, how long, as late as the server says, and never in silence."""

from __future__ import annotations

import email.utils
import time
from types import SimpleNamespace

import pytest

from m3quant.running import retry
from m3quant.running.retry import LONGEST_PAUSE_SECONDS, again, retry_after


class Busy(Exception):
    def __init__(self, **headers: str) -> None:
        super().__init__("busy")
        self.response = SimpleNamespace(headers={name.replace("_", "-"): value for name, value in headers.items()})


class Server:
    """Fails with each of `failures` in turn, then answers."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)

    def __call__(self) -> str:
        if self.failures:
            raise self.failures.pop(0)
        return "answer"


def passing(error: Exception) -> str | None:
    return "the server is busy" if isinstance(error, Busy) else None


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    return waits


def test_every_wait_is_shown_and_as_long_as_the_server_asks(slept: list[float]) -> None:
    said: list[str] = []
    server = Server(Busy(), Busy(Retry_After="7"), Busy(Retry_After="0"), Busy())
    assert again(server, passing, (1.0, 2.0, 4.0, 8.0), said.append) == "answer"
    assert slept == [1.0, 7.0, 0.0, 8.0]
    assert said == [f"the server is busy; again in {seconds} s" for seconds in (1, 7, 0, 8)]


def test_the_failure_itself_is_raised_where_waiting_does_not_help(
    slept: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    last = Busy()
    with pytest.raises(Busy) as raised:
        again(Server(Busy(), last), passing, (1.0,))
    assert raised.value is last and slept == [1.0]
    assert capsys.readouterr().err == "the server is busy; again in 1 s\n"
    with pytest.raises(KeyError):
        again(Server(KeyError("x")), passing)
    with pytest.raises(Busy):
        again(Server(Busy(Retry_After=str(int(LONGEST_PAUSE_SECONDS) + 1))), passing)
    assert slept == [1.0]


def test_what_a_server_may_say() -> None:
    assert retry_after(Busy(Retry_After="12")) == 12.0
    assert retry_after(Busy(RateLimit='"api";r=0;t=9')) == 9.0
    assert retry_after(Busy(RateLimit='"api";r=3;t=9')) is None
    assert retry_after(Busy(Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")) == 0.0
    soon = retry_after(Busy(Retry_After=email.utils.formatdate(time.time() + 60, usegmt=True)))
    assert soon is not None and 50 < soon <= 60
    for text in ("", "soon", "-1", "1.5", "9" * 400, "Wed, 99 Oct 2015", "²"):
        assert retry_after(Busy(Retry_After=text)) is None, text
    assert retry_after(ValueError()) is None
    try:
        try:
            raise Busy(Retry_After="3")
        except Busy as error:
            raise ValueError("a sentence") from error
    except ValueError as error:
        assert retry_after(error) == 3.0
