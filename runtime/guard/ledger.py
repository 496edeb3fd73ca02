"""Which request holds how many KV cache tokens, and which is next: the guard's bookkeeping, without I/O or tasks; time is what `clock` says.

Reservations never exceed the capacity. What does not fit waits in one first-come queue per API key; across keys the next request is the
one whose key has been served the fewest tokens (start-time fair queuing, Goyal, Vin and Cheng 1996, with the request's tokens as its
length). The queue is bounded in tokens; when it is full, the newest request of the key with most tokens queued has to go (longest queue
drop), so one key's burst cannot fill the queue against the others.

When the next request does not fit, it may hold its room back for a while: it *blocks*. The guarantee, for a pool of C tokens:

- A blocking request of h tokens starts at the latest when the requests that other keys were running when it began to block have ended.
  Requests of other keys pass it meanwhile, as long as they and what its own key runs hold at most C - h tokens: they do not delay it.
- It blocks for at most `patience` x C / h seconds. Then everything that fits passes it, and no request blocks for as long as it blocked:
  for a request of the whole pool others are held back at most half the time, and never longer than `patience` at a stretch.
- It does not block at all for what its own key holds: what would not fit although all other keys' requests ended waits, and is passed.
- A request that blocked without starting is charged its tokens as if it had run, so its key is not next again until others were served as much.

With an outlook (RESERVE=learned, outlook.py) a request also starts where it fits by forecast. `reserved` is then the most that the engine may use,
and may be above the capacity. The guarantee holds as far as the forecast does; and the first `LOOK` requests of a key may pass each other, the first
of them until `PASSING` pools of tokens have passed it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import islice

from .outlook import Outlook
from .tickets import Block, Lane, State, Ticket

IDLE_LANES = (
    1024  # keys without requests that are remembered: whoever needs no key can make up a new one for every request
)
LOOK = 16  # waiting requests of a key that are tried by forecast,
MOST_LOOKS = 64  # and of all keys at one time: each costs a search
PASSING = 4  # pools of tokens of its own key that may pass a request which waits as the first


class Ledger:
    """Reservations of KV cache tokens against `capacity`, and a fair queue of at most `queue_limit` tokens.

    `reserved` is the sum of the admitted tickets' private tokens and of the blocks they share, each counted once: the most that they may use.
    """

    def __init__(
        self,
        capacity: int,
        queue_limit: int,
        block_size: int = 1,
        patience: float = math.inf,
        clock: Callable[[], float] = lambda: 0.0,
        outlook: Outlook | None = None,
    ) -> None:
        self.patience = patience
        self.outlook = outlook
        self.clock = clock
        self.block: Block | None = None
        self.open_until = 0.0  # no request blocks before this
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

    @property
    def forecasting(self) -> bool:
        """Whether requests may start by forecast now."""
        return self.outlook is not None and self.outlook.open

    @property
    def promised(self) -> int:
        """Tokens that are spoken for: by forecast where that is less than all that may be used."""
        if not self.forecasting or self.outlook is None:
            return self.reserved
        return min(self.reserved, math.ceil(self.outlook.forecast(self.block_size * len(self.held)).peak))

    def fits(self, ticket: Ticket) -> bool:
        """Whether there is room for the ticket now: for all it may use, or by forecast."""
        if self.cost(ticket) <= self.free:
            return True
        shared = self.block_size * len(self.held)
        return self.outlook is not None and self.outlook.admits(ticket, self.capacity, shared, self._hits(ticket))

    def offer(self, ticket: Ticket) -> list[Ticket]:
        """Admits, queues or drops a new ticket; returns the others that were dropped to make room for it."""
        if ticket.state is not State.NEW:
            raise ValueError(f"a ticket is offered once, this one is {ticket.state.value}")
        if self.fits_now(ticket):
            lane = self._lane(ticket.key)
            lane.start = max(lane.start, self.virtual)
            self._admit(ticket, lane)
            return []
        evicted = self._room_for(ticket.key, ticket.tokens)
        if evicted is None or ticket.tokens > self.capacity:
            ticket.state = State.DROPPED
            return []
        for other in evicted:
            self._remove(other)
        self._push(ticket)
        return evicted

    def fits_now(self, ticket: Ticket) -> bool:
        """Whether a new request would start on arrival: it fits, nothing of its key waits, and no request holds it back."""
        self._end_block()
        lane = self.lanes.get(ticket.key)
        return not (lane and lane.queue) and self.fits(ticket) and self._may_pass(ticket)

    def would_drop(self, key: str, tokens: int) -> bool:
        """Whether a request of that many tokens would be dropped on arrival."""
        return not self.fits_now(Ticket(key, tokens)) and self._room_for(key, tokens) is None

    def advance(self) -> list[Ticket]:
        """Admits waiting tickets, those of the keys served least first; one that does not fit blocks, or is passed."""
        self._end_block()
        admitted: list[Ticket] = []
        while (ticket := self._next_to_start()) is not None:
            lane = self.lanes[ticket.key]
            self._remove(ticket, keep_lane=True)
            self._admit(ticket, lane)
            admitted.append(ticket)
        return admitted

    def _next_to_start(self) -> Ticket | None:
        forecasting = self.forecasting
        if self.block is not None:
            if self.fits(self.block.ticket):
                return self.block.ticket
            if self._beside(self.block) <= 0 and not forecasting:
                return None
        heads = [lane for lane in self.lanes.values() if lane.queue]
        if not heads:
            return None
        first = min(heads, key=lambda lane: lane.start)
        if self.cost(first.queue[0]) > self.free and self.free <= 0 and not forecasting:
            self._begin_block(first)  # a full pool: no other request fits either
            return None
        heads.sort(key=lambda lane: lane.start)
        if forecasting:
            return self._next_by_forecast(heads)
        for lane in heads:
            ticket = lane.queue[0]
            if self.fits(ticket) and self._may_pass(ticket):
                return ticket
            self._begin_block(lane)
        return None

    def _next_by_forecast(self, lanes: list[Lane]) -> Ticket | None:
        """As in full reservation, with the first few requests of each key instead of the first."""
        looks = MOST_LOOKS
        for lane in lanes:
            for number, ticket in enumerate(islice(lane.queue, LOOK)):
                if number and lane.passed + ticket.tokens > PASSING * self.capacity:
                    continue
                looks -= 1
                if self.fits(ticket) and self._may_pass(ticket):
                    return ticket
                if not number:
                    self._begin_block(lane)
                if not looks:
                    return None
        return None

    def _begin_block(self, lane: Lane) -> None:
        """The lane's first request does not fit: it blocks, unless another one does, none may now, or its own key holds the room."""
        ticket = lane.queue[0]
        allowed = self.block is None and self.patience > 0 and self.clock() >= self.open_until
        if allowed and (
            lane.running + ticket.tokens <= self.capacity or self._fits_beside(ticket, self._run_by(ticket.key))
        ):
            self.block = Block(ticket, self.clock())

    def _run_by(self, key: str) -> list[Ticket]:
        return [] if self.outlook is None else [ticket for ticket in self.outlook.running if ticket.key == key]

    def _fits_beside(self, ticket: Ticket, others: Iterable[Ticket]) -> bool:
        """Whether the ticket fits by forecast next to the others, as if all else had ended."""
        shared = self.block_size * len(self.held)
        return self.outlook is not None and self.outlook.admits_beside(ticket, others, self.capacity, shared)

    def _beside(self, block: Block) -> int:
        """Tokens that requests may still take next to the one that blocks without delaying it."""
        held = self.lanes[block.ticket.key].running + sum(block.passed.values())
        return self.capacity - block.ticket.tokens - held

    def _may_pass(self, ticket: Ticket) -> bool:
        """Whether a request may start without delaying the one that blocks, and before that one's key would be served again."""
        if self.block is None:
            return True
        blocking = self.block.ticket
        passing = self.lanes.get(ticket.key)
        ahead = max(self.virtual, passing.start if passing else 0) - self.lanes[blocking.key].start
        if ahead >= blocking.tokens:
            return False
        if ticket.key != blocking.key and ticket.tokens <= self._beside(self.block):
            return True
        return self._fits_beside(ticket, dict.fromkeys([blocking, *self._run_by(blocking.key), *self.block.passed]))

    def block_ends(self) -> float | None:
        """When, by the clock, the present block ends if nothing else ends it: `advance` is due then."""
        if self.block is None:
            return None
        return self.block.since + self.patience * self.capacity / self.block.ticket.tokens

    def _end_block(self, leaving: bool = False) -> None:
        """Ends a block that has lasted long enough or whose request leaves; it pays, and for as long as it blocked no other request will."""
        block, ends = self.block, self.block_ends()
        if block is None or ends is None or not (leaving or self.clock() >= ends):
            return
        self.block = None
        self.open_until = self.clock() + min(self.clock(), ends) - block.since
        lane = self.lanes[block.ticket.key]
        lane.start += block.ticket.tokens
        block.ticket.paid = True

    def release(self, ticket: Ticket) -> bool:
        """Gives back what a ticket holds. True the first time, False for a ticket that holds nothing (any more)."""
        if ticket.state is State.QUEUED:
            self._remove(ticket)
        if ticket.state is not State.ADMITTED:
            return False
        ticket.state = State.RELEASED
        self.lanes[ticket.key].running -= ticket.tokens
        if self.outlook is not None:
            self.outlook.end(ticket)
        if self.block is not None:
            self.block.passed.pop(ticket, None)
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

    def _admit(self, ticket: Ticket, lane: Lane) -> None:
        if not ticket.paid:  # the start was set when the lane began to wait: what passed it meanwhile does not move it
            self.virtual = max(self.virtual, lane.start)
            lane.start += ticket.tokens
        lane.running += ticket.tokens
        if self.outlook is not None:
            self.outlook.begin(ticket)
        if self.block is not None:
            if self.block.ticket is ticket:
                self.open_until = self.clock() + self.clock() - self.block.since
                self.block = None
            else:
                self.block.passed[ticket] = ticket.tokens
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
        if self.outlook is not None:
            self.outlook.first_token(ticket)
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
        if self.block is not None and self.block.ticket is ticket and not keep_lane:
            self._end_block(leaving=True)
        lane.passed = 0 if lane.queue[0] is ticket else lane.passed + keep_lane * ticket.tokens
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
        if excess <= 0:
            return []
        share = {name: lane.queued_tokens for name, lane in self.lanes.items() if lane.queue}
        own = share.pop(key, 0) + tokens
        newest = dict.fromkeys(share, -1)
        evicted: list[Ticket] = []
        while excess > 0:
            longest = max(share, key=share.__getitem__, default=None)
            if longest is None or share[longest] <= own:
                return None
            ticket = self.lanes[longest].queue[newest[longest]]
            newest[longest] -= 1
            share[longest] -= ticket.tokens
            excess -= ticket.tokens
            evicted.append(ticket)
        return evicted

    def _forget_idle(self) -> None:
        """Keys come from the outside: a lane without requests is kept only while it is ahead of the others."""
        if not self.queued and not self.admitted:
            self.lanes.clear()
            self.virtual = 0
            return
        if not self.queued:  # no request competes, so past service gives no claim
            self.virtual = 0
            for lane in self.lanes.values():
                lane.start = 0
        behind = [
            key
            for key, lane in self.lanes.items()
            if not lane.queue and not lane.running and lane.start <= self.virtual
        ]
        for key in behind:
            del self.lanes[key]
        idle = [key for key, lane in self.lanes.items() if not lane.queue and not lane.running]
        if len(idle) > IDLE_LANES:  # the least ahead have the least to lose
            for key in sorted(idle, key=lambda key: self.lanes[key].start)[: -IDLE_LANES // 2]:
                del self.lanes[key]
