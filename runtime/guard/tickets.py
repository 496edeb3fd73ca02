"""The records of the ledger: a request and its state, the requests of a key, and a request that holds its room back."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

from .growth import Growth


class State(enum.Enum):
    NEW = "new"
    QUEUED = "queued"
    ADMITTED = "admitted"
    RELEASED = "released"  # held tokens, and gave them back
    DROPPED = "dropped"  # never held any: refused, cancelled, expired or evicted


@dataclass(eq=False)
class Ticket:
    """One request: its tokens (whole blocks), its key, and its state.

    `chain` names the blocks of its prompt that may be shared (prefix.py); `shared` are those it shares now, `private` its other tokens.
    """

    key: str
    tokens: int
    chain: tuple[bytes, ...] = ()
    state: State = State.NEW
    shared: list[bytes] = field(default_factory=list)
    private: int = 0
    paid: bool = False  # its tokens were charged when it blocked in vain
    growth: Growth | None = None  # of one sequence, for forecasts


@dataclass
class Lane:
    """One key: its waiting requests, the virtual time at which it is next served, and the tokens of its running requests."""

    queue: deque[Ticket] = field(default_factory=deque)
    queued_tokens: int = 0
    start: int = 0
    running: int = 0
    passed: int = 0  # tokens of its own requests that passed the first one


@dataclass
class Block:
    """A request that holds its room back: since when, and the running requests that passed it meanwhile."""

    ticket: Ticket
    since: float
    passed: dict[Ticket, int] = field(default_factory=dict)
