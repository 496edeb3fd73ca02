"""Progress lines without a terminal: what they say of the time left."""

from __future__ import annotations

import pytest

from m3quant.cli import progress as module


def test_no_time_left_is_told_from_the_first_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with module.BytesProgress("awq") as progress:
        progress.start(2 * 10**9, 10**9)
        now = 20.0
        progress.advance(10)
        now = 40.0
        progress.advance(5 * 10**8 - 10)
    assert capsys.readouterr().err.splitlines() == [
        "awq: 1.00 of 2.00 GB, 0 MB/s, ETA not known yet",
        "awq: 1.50 of 2.00 GB, 12 MB/s, ETA 40 s",
    ]
