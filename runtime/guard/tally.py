"""How many tokens an answer has, read from its bytes as they pass: what the engine says in `usage`, else the events of a stream.

Inside a JSON string every quote has a backslash, so no text that a model writes can look like a member.
"""

from __future__ import annotations

import re

USAGE = re.compile(rb'"(?:completion|output)_tokens": ?([0-9]{1,12})')
CUT = re.compile(rb'"(?:(?:finish|stop)_reason": ?"(?:length|max_tokens)"|status": ?"incomplete")')
EVENT = b"\ndata:"


class Tally:
    """`tokens` so far: exact where the engine says so, else the events, each of which holds at least one token (but the first and last few)."""

    def __init__(self) -> None:
        self.events = 0
        self.usage = 0
        self.cut = False  # the engine says that the answer ended at its limit

    def see(self, body: bytes) -> None:
        self.events += body.startswith(EVENT[1:]) + body.count(EVENT)
        if b'_tokens"' in body and (found := USAGE.findall(body)):
            self.usage = int(found[-1])
        if not self.cut and CUT.search(body):
            self.cut = True

    @property
    def tokens(self) -> int:
        return self.usage or self.events  # 0 is what a message says of itself at its start
