"""Retrying a request: how long to wait after a temporary failure, which the server may state itself."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import TypeVar

T = TypeVar("T")

PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)
# A server that asks for a longer pause than this is shown to the user, who can come back.
LONGEST_PAUSE_SECONDS = 300.0
# None: no answer at all, such as a dropped connection.
TRANSIENT_STATUS = frozenset({None, 408, 429, 500, 502, 503, 504})


def on_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def again(
    request: Callable[[], T],
    passing: Callable[[Exception], str | None],
    pauses: Sequence[float] = PAUSES_SECONDS,
    say: Callable[[str], None] = on_stderr,
    sleep: Callable[[float], None] | None = None,
) -> T:
    """`request()`, repeated after a pause where its failure may pass.

    passing: what happened, in words, for a failure that may pass; None for any other. The pause is what the server asks for,
    else the next of `pauses`, and `say` is given every one before it begins. The failure itself is raised where it does not
    pass, where no pause is left, and where the server asks for more than LONGEST_PAUSE_SECONDS. sleep: in place of time.sleep, for
    who must be able to stop meanwhile.
    """
    for pause in pauses:
        try:
            return request()
        except Exception as error:
            words, asked = passing(error), retry_after(error)
            if words is None or (asked or 0.0) > LONGEST_PAUSE_SECONDS:
                raise
            wait = pause if asked is None else asked
            say(f"{words}; again in {wait:.0f} s")
        (sleep or time.sleep)(wait)
    return request()


def retry_after(error: BaseException) -> float | None:
    """Seconds that the answer behind a failure asks to wait, None if it does not say.

    `Retry-After` in seconds or as a date (RFC 9110, section 10.2.3), else `RateLimit` (draft-ietf-httpapi-ratelimit-headers). A failure that
    came from another process, without its answer, has `pause_seconds`.
    """
    for link in causes(error):
        if (asked := getattr(link, "pause_seconds", None)) is not None:
            return float(asked)
        headers = getattr(getattr(link, "response", None), "headers", None)
        if headers is not None:
            text = headers.get("Retry-After")
            return _limit_reset(headers.get("RateLimit")) if text is None else _pause(text.strip())
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """A failure, what caused it, and so on."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _pause(text: str) -> float | None:
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _limit_reset(header: str | None) -> float | None:
    """Seconds until requests are taken again, from `"api";r=0;t=120`, None without."""
    found = re.search(r";\s*r=0\b[^,]*;\s*t=(\d{1,6})\b", header or "")
    return float(found[1]) if found else None
