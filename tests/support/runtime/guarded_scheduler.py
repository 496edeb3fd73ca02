"""The guard's ledger in front of the model of vLLM's scheduler, step by step, under a load of given lengths."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from m3quant.runtime.guard.growth import Growth
from m3quant.runtime.guard.ledger import Ledger
from m3quant.runtime.guard.outlook import Outlook
from m3quant.runtime.guard.tickets import State, Ticket

from .scheduler_model import BLOCK, BLOCKS, SEQUENCES, Scheduler, Sequence

CAPACITY = BLOCK * BLOCKS
STEP_S = 0.02
PATIENCE_S = 5.0
Draw = Callable[[random.Random], tuple[int, int, int]]  # prompt, length, most


def known_lengths(rng: random.Random) -> tuple[int, int, int]:
    """The load of tests/support/engine/overload.py: an answer is as long as it may be."""
    low, high = rng.choices([(4, 60), (60, 400), (400, 650)], [0.5, 0.35, 0.15])[0]
    output = rng.randint(16, 320)
    return rng.randint(low, high), output, output


def ends_by_itself(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(4, 200), min(320, 1 + int(rng.expovariate(1 / 80))), 320


@dataclass
class Run:
    """The guard's ledger before a scheduler, step by step. `deaf_from`: the step from which on no gauge changes."""

    draw: Draw
    learned: bool = True
    keys: int = 1
    seed: int = 0
    deaf_from: int = 10**9
    blocks: int = BLOCKS
    most_running: int = SEQUENCES
    delay: int = 2  # steps between admission and the scheduler's queue
    step: int = 0
    admitted: deque[tuple[int, Ticket]] = field(default_factory=deque)  # with the step, until the scheduler has them
    sequences: dict[Ticket, Sequence] = field(default_factory=dict)
    tickets: dict[Sequence, Ticket] = field(default_factory=dict)
    ended: list[Sequence] = field(default_factory=list)
    most_promised: int = 0
    next: tuple[str, int, int, int] | None = None

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)  # the same requests for every number of keys
        self.any_key = random.Random(self.seed)
        self.scheduler = Scheduler(self._end, self.blocks, self.most_running)
        self.heard: dict[str, float] = {}
        self.outlook = Outlook(lambda: self.heard, lambda: self.now)
        capacity = self.blocks * BLOCK
        self.outlook.resize(capacity, BLOCK)
        outlook = self.outlook if self.learned else None
        self.ledger = Ledger(capacity, 4 * capacity, BLOCK, PATIENCE_S, lambda: self.now, outlook)

    def steps(self, count: int) -> Run:
        for _ in range(count):
            if self.step < self.deaf_from:
                self.heard = self.scheduler.gauges()
            while self._arrive():
                pass
            self._advance()
            self._check()
            while self.admitted and self.admitted[0][0] <= self.step - self.delay:
                self.scheduler.waiting.append(self.sequences[self.admitted.popleft()[1]])
            self.scheduler.step()
            self._stream()
            self.step += 1
        return self

    @property
    def now(self) -> float:
        return self.step * STEP_S

    def _arrive(self) -> bool:
        """The next request of the load, and whether it was taken; one that is refused comes again, so that every arm serves the same requests."""
        if self.next is None:
            self.next = (f"key-{self.any_key.randrange(self.keys)}", *self.draw(self.rng))
        key, prompt, length, most = self.next
        ticket = Ticket(key, -(-(prompt + most) // BLOCK) * BLOCK, growth=Growth(prompt, most, "class"))
        sequence = Sequence(prompt, length)
        self.sequences[ticket], self.tickets[sequence] = sequence, ticket
        self.ledger.offer(ticket)
        if ticket.state is State.ADMITTED:
            self._start(ticket)
        if ticket.state is State.DROPPED:
            return False
        self.next = None
        return True

    def _advance(self) -> None:
        for ticket in self.ledger.advance():
            self._start(ticket)

    def _start(self, ticket: Ticket) -> None:
        self.admitted.append((self.step, ticket))

    def _stream(self) -> None:
        """Seven of ten answers are streams, whose tokens are seen as they come."""
        for sequence in self.scheduler.running:
            ticket = self.tickets[sequence]
            assert ticket.growth is not None
            if ticket.growth.prompt % 10 < 7:
                ticket.growth.tally.events = sequence.written
                if sequence.written == 1:
                    self.outlook.first_token(ticket)

    def _end(self, sequence: Sequence) -> None:
        ticket = self.tickets[sequence]
        assert ticket.growth is not None
        ticket.growth.tally.usage = sequence.written
        self.outlook.learn(ticket.growth, finished=True)
        assert self.ledger.release(ticket)
        self.ended.append(sequence)

    def _check(self) -> None:
        ledger = self.ledger
        self.sequences = {
            ticket: one for ticket, one in self.sequences.items() if ticket.state in (State.QUEUED, State.ADMITTED)
        }
        running = [ticket for ticket in self.sequences if ticket.state is State.ADMITTED]
        assert ledger.reserved == sum(ticket.tokens for ticket in running)
        assert ledger.reserved >= self.scheduler.used * BLOCK
        assert ledger.promised <= ledger.reserved
        assert set(self.outlook.running) == (set(running) if self.learned else set())
        if not self.learned:
            assert ledger.reserved <= ledger.capacity
        self.most_promised = max(self.most_promised, ledger.reserved)

    @property
    def preempted_share(self) -> float:
        return sum(sequence.preempted > 0 for sequence in self.ended) / len(self.ended)


def plain(
    draw: Draw, steps: int, seed: int = 0, blocks: int = BLOCKS, most_running: int = SEQUENCES
) -> tuple[int, float]:
    """Tokens and preempted share without a guard, with requests always waiting: those of `Run` with the same seed."""
    rng, ended = random.Random(seed), []
    scheduler = Scheduler(ended.append, blocks, most_running)
    for _ in range(steps):
        while len(scheduler.waiting) < blocks:
            prompt, length, _ = draw(rng)
            scheduler.waiting.append(Sequence(prompt, length))
        scheduler.step()
    return scheduler.written, sum(sequence.preempted > 0 for sequence in ended) / len(ended)
