"""Who holds how many KV cache tokens, and who is next: the guard's bookkeeping, without I/O, clocks or tasks.

Reservations never exceed the capacity. What does not fit waits in one first-come queue per API key; across keys the next request is the
one whose key has been served the fewest tokens (start-time fair queuing, Goyal, Vin and Cheng 1996, with the request's tokens as its
length). The next request blocks those behind it until it fits, so a large request cannot starve behind small ones. The queue is
bounded in tokens; when it is full, the newest request of the key with most tokens queued has to go (longest queue drop), so one key's
burst cannot fill the queue against the others.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field


class State(enum.Enum):
    NEW = "new"
    QUEUED = "queued"
    ADMITTED = "admitted"
    RELEASED = "released"  # held tokens, and gave them back
    DROPPED = "dropped"  # never held any: refused, cancelled, expired or evicted


@dataclass(eq=False)
class Ticket:
    """One request: its tokens (whole blocks), whose it is, and where it stands.

    `chain` names the blocks of its prompt that may be shared (prefix.py); `shared` are those it shares now, `private` its other tokens.
    """

    key: str
    tokens: int
    chain: tuple[bytes, ...] = ()
    state: State = State.NEW
    shared: list[bytes] = field(default_factory=list)
    private: int = 0


@dataclass
class Lane:
    """One key: its waiting requests and the virtual time at which it is next served."""

    queue: deque[Ticket] = field(default_factory=deque)
    queued_tokens: int = 0
    start: int = 0


class Ledger:
    """Reservations of KV cache tokens against `capacity`, and a fair queue of at most `queue_limit` tokens.

    `reserved` is the sum of the admitted tickets' private tokens and of the blocks they share, each counted once.
    """

    def __init__(self, capacity: int, queue_limit: int, block_size: int = 1) -> None:
        self.capacity = capacity
        self.queue_limit = queue_limit
        self.block_size = block_size
        self.held: dict[bytes, int] = {}  # shared blocks and how many tickets hold each
        self.reserved = 0
        self.queued = 0
        self.admitted = 0
        self.lanes: dict[str, Lane] = {}
        self.virtual = 0

    @property
    def free(self) -> int:
        return self.capacity - self.reserved

    @property
    def waiting(self) -> int:
        return sum(len(lane.queue) for lane in self.lanes.values())

    def cost(self, ticket: Ticket) -> int:
        """Tokens that admitting the ticket would take now: all but those of leading blocks that others hold already."""
        return ticket.tokens - self.block_size * self._hits(ticket)

    def _hits(self, ticket: Ticket) -> int:
        for number, block in enumerate(ticket.chain):
            if block not in self.held:
                return number
        return len(ticket.chain)

    def offer(self, ticket: Ticket) -> list[Ticket]:
        """Admits, queues or drops a new ticket; returns the others that were dropped to make room for it."""
        if ticket.state is not State.NEW:
            raise ValueError(f"a ticket is offered once, this one is {ticket.state.value}")
        if not self.queued and self.cost(ticket) <= self.free:
            self._admit(ticket, self._lane(ticket.key))
            return []
        evicted = self._room_for(ticket.key, ticket.tokens)
        if evicted is None or ticket.tokens > self.capacity:
            ticket.state = State.DROPPED
            return []
        for other in evicted:
            self._remove(other)
        self._push(ticket)
        return evicted

    def would_drop(self, key: str, tokens: int) -> bool:
        """Whether a request of that many tokens would be dropped on arrival."""
        return not (not self.queued and tokens <= self.free) and self._room_for(key, tokens) is None

    def advance(self) -> list[Ticket]:
        """Admits waiting tickets in turn while the next one fits."""
        admitted = []
        while (lane := self._next()) is not None and self.cost(lane.queue[0]) <= self.free:
            ticket = lane.queue[0]
            self._remove(ticket, keep_lane=True)
            self._admit(ticket, lane)
            admitted.append(ticket)
        return admitted

    def release(self, ticket: Ticket) -> bool:
        """Gives back what a ticket holds. True the first time, False for a ticket that holds nothing (any more)."""
        if ticket.state is State.QUEUED:
            self._remove(ticket)
        if ticket.state is not State.ADMITTED:
            return False
        ticket.state = State.RELEASED
        self.reserved -= ticket.private
        for block in ticket.shared:
            self.held[block] -= 1
            if not self.held[block]:
                del self.held[block]
                self.reserved -= self.block_size
        self.admitted -= 1
        self._forget_idle()
        return True

    def resize(self, capacity: int, queue_limit: int, block_size: int = 1) -> list[Ticket]:
        """A new pool size. Returns the waiting tickets that can no longer fit at all; they are dropped."""
        self.capacity, self.queue_limit = capacity, queue_limit
        if not self.held:  # blocks in use keep the size they were counted with
            self.block_size = block_size
        lost = [ticket for lane in self.lanes.values() for ticket in lane.queue if ticket.tokens > capacity]
        for ticket in lost:
            self._remove(ticket)
        return lost

    def drop_waiting(self) -> list[Ticket]:
        """Empties the queue, for a server that is going down."""
        lost = [ticket for lane in self.lanes.values() for ticket in lane.queue]
        for ticket in lost:
            self._remove(ticket)
        return lost

    def _lane(self, key: str) -> Lane:
        return self.lanes.setdefault(key, Lane(start=self.virtual))

    def _next(self) -> Lane | None:
        waiting = [lane for lane in self.lanes.values() if lane.queue]
        return min(waiting, key=lambda lane: lane.start, default=None)

    def _admit(self, ticket: Ticket, lane: Lane) -> None:
        self.virtual = max(self.virtual, lane.start)
        lane.start = self.virtual + ticket.tokens
        ticket.state = State.ADMITTED
        ticket.shared = list(ticket.chain[: self._hits(ticket)])
        ticket.private = ticket.tokens - self.block_size * len(ticket.shared)
        for block in ticket.shared:
            self.held[block] += 1
        self.reserved += ticket.private
        self.admitted += 1

    def prefilled(self, ticket: Ticket) -> None:
        """The ticket's prompt is computed, so from now on others may share its blocks.

        Blocks that another ticket brought in meanwhile stay private: vLLM computed them twice and holds both.
        """
        if ticket.state is not State.ADMITTED:
            return
        for block in ticket.chain[len(ticket.shared) :]:
            if block not in self.held:
                self.held[block] = 1
                ticket.shared.append(block)
                ticket.private -= self.block_size

    def _push(self, ticket: Ticket) -> None:
        lane = self._lane(ticket.key)
        if not lane.queue:
            lane.start = max(lane.start, self.virtual)
        lane.queue.append(ticket)
        lane.queued_tokens += ticket.tokens
        self.queued += ticket.tokens
        ticket.state = State.QUEUED

    def _remove(self, ticket: Ticket, keep_lane: bool = False) -> None:
        lane = self.lanes[ticket.key]
        lane.queue.remove(ticket)
        lane.queued_tokens -= ticket.tokens
        self.queued -= ticket.tokens
        ticket.state = State.DROPPED
        if not keep_lane:
            self._forget_idle()

    def _room_for(self, key: str, tokens: int) -> list[Ticket] | None:
        """The tickets to evict so that `tokens` more fit in the queue; None when the arrival itself is the one to refuse."""
        excess = self.queued + tokens - self.queue_limit
        if tokens > self.queue_limit:
            return None
        share = {name: lane.queued_tokens for name, lane in self.lanes.items() if lane.queue}
        own = share.pop(key, 0) + tokens
        left = {name: list(self.lanes[name].queue) for name in share}
        evicted: list[Ticket] = []
        while excess > 0:
            longest = max(share, key=share.__getitem__, default=None)
            if longest is None or share[longest] <= own:
                return None
            ticket = left[longest].pop()
            share[longest] -= ticket.tokens
            excess -= ticket.tokens
            evicted.append(ticket)
        return evicted

    def _forget_idle(self) -> None:
        """Keys come from the outside: a lane without waiting requests is kept only while it is ahead of the others."""
        if not self.queued:  # nobody competes, so past service gives no one a claim
            self.lanes.clear()
            self.virtual = 0
            return
        behind = [key for key, lane in self.lanes.items() if not lane.queue and lane.start <= self.virtual]
        for key in behind:
            del self.lanes[key]
