"""How many tokens an answer has, read from its bytes as they pass: what the engine says in `usage`, else the events of a stream.

Inside a JSON string every quote has a backslash, so no text that a model writes can look like a member. What /v1/responses repeats of the
request can (a tool's schema): such events come before the engine counts, with a usage of null.
"""

from __future__ import annotations

import re

USAGE = re.compile(rb'"(?:completion|output)_tokens": ?([0-9]{1,12})')
NO_USAGE = re.compile(rb'"usage": ?null')
CUT = re.compile(
    rb'"(?:(?:finish|stop)_reason": ?"(?:length|max_tokens|abort|error)"|status": ?"(?:incomplete|failed|cancelled)")'
)
FAILED = (b'data: {"error"', b'data: {"type":"error"')  # an answer that has begun keeps its status of 200
EVENT = b"\ndata:"


class Tally:
    """`tokens` so far: exact where the engine says so, else the events, each of which holds at least one token (but the first and last few)."""

    def __init__(self) -> None:
        self.events = 0
        self.usage = 0
        self.cut = False  # the engine says that the answer ended at its limit, or that it failed

    def see(self, body: bytes) -> None:
        self.events += body.startswith(EVENT[1:]) + body.count(EVENT)
        if b'_tokens"' in body:
            for event in body.split(EVENT):
                if (found := USAGE.findall(event)) and not NO_USAGE.search(event):
                    self.usage = int(found[-1])
        if not self.cut and (any(start in body for start in FAILED) or CUT.search(body)):
            self.cut = True

    @property
    def tokens(self) -> int:
        return self.usage or self.events  # 0 is what a message says of itself at its start
