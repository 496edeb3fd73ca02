"""The ledger against a model of it, in every order that hypothesis finds, and its fairness in numbers."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from m3quant.runtime.guard.ledger import Ledger, State, Ticket
from m3quant.runtime.guard.prefix import block_chain

BLOCK = 16


class LedgerMachine(RuleBasedStateMachine):
    """Requests come, run, end, hang up while waiting, are released twice; the pool shrinks and grows."""

    tickets: Bundle = Bundle("tickets")

    @initialize(blocks=st.integers(1, 40), queue=st.integers(0, 60))
    def begin(self, blocks: int, queue: int) -> None:
        self.ledger = Ledger(blocks * BLOCK, queue * BLOCK, BLOCK)
        self.all: list[Ticket] = []
        self.shrunk = False
        self.given_back = 0

    @rule(
        target=tickets,
        key=st.sampled_from("abc"),
        blocks=st.integers(1, 45),
        prompt=st.lists(st.integers(0, 1), max_size=6),
    )
    def arrive(self, key: str, blocks: int, prompt: list[int]) -> Ticket:
        """Prompts are of blocks of all zeros or all ones, so that many share a beginning."""
        chain = block_chain([token for token in prompt[:blocks] for _ in range(BLOCK)] + [0], BLOCK, "")
        ticket = Ticket(key, blocks * BLOCK, chain[:blocks])
        was_waiting = [other for other in self.all if other.state is State.QUEUED]
        fits = not was_waiting and self.ledger.cost(ticket) <= self.ledger.free
        evicted = self.ledger.offer(ticket)
        self.all.append(ticket)
        assert (ticket.state is State.ADMITTED) == fits
        assert all(other in was_waiting and other.state is State.DROPPED and other.key != key for other in evicted)
        if ticket.state is State.DROPPED:
            assert not evicted
        self.ledger.advance()
        return ticket

    @rule(ticket=tickets)
    def prefill(self, ticket: Ticket) -> None:
        before = self.ledger.reserved
        self.ledger.prefilled(ticket)
        assert self.ledger.reserved == before  # nothing new is taken, it is only named

    @rule(target=tickets, ticket=consumes(tickets))
    def end(self, ticket: Ticket) -> Ticket:
        held = ticket.state is State.ADMITTED
        assert self.ledger.release(ticket) is held
        assert ticket.state in (State.RELEASED, State.DROPPED)
        self.ledger.advance()
        return ticket

    @rule(ticket=tickets)
    def end_again(self, ticket: Ticket) -> None:
        if ticket.state in (State.RELEASED, State.DROPPED):
            before = self.ledger.reserved
            assert self.ledger.release(ticket) is False
            assert self.ledger.reserved == before

    @rule(blocks=st.integers(1, 40))
    def resize(self, blocks: int) -> None:
        self.shrunk |= blocks * BLOCK < self.ledger.reserved
        lost = self.ledger.resize(blocks * BLOCK, self.ledger.queue_limit, BLOCK)
        assert all(ticket.state is State.DROPPED and ticket.tokens > blocks * BLOCK for ticket in lost)
        self.ledger.advance()

    @rule()
    def drain(self) -> None:
        self.ledger.drop_waiting()
        assert self.ledger.queued == 0 and self.ledger.waiting == 0

    @invariant()
    def books_balance(self) -> None:
        ledger = getattr(self, "ledger", None)
        if ledger is None:
            return
        running = [ticket for ticket in self.all if ticket.state is State.ADMITTED]
        waiting = [ticket for ticket in self.all if ticket.state is State.QUEUED]
        shared = {block for ticket in running for block in ticket.shared}
        assert ledger.reserved == sum(ticket.private for ticket in running) + BLOCK * len(shared)
        assert all(ticket.private + BLOCK * len(ticket.shared) == ticket.tokens for ticket in running)
        assert set(ledger.held) == shared
        assert ledger.queued == sum(ticket.tokens for ticket in waiting)
        assert (ledger.admitted, ledger.waiting) == (len(running), len(waiting))
        assert ledger.queued <= ledger.queue_limit
        self.shrunk = self.shrunk and ledger.reserved > ledger.capacity
        assert ledger.reserved <= ledger.capacity or self.shrunk
        if not running:
            assert ledger.reserved == 0 and not waiting  # an empty pool starves nobody
        assert len(ledger.lanes) <= 3

    def teardown(self) -> None:
        for ticket in self.all:
            self.ledger.release(ticket)
            self.ledger.advance()
        for ticket in self.all:
            self.ledger.release(ticket)
        assert self.ledger.reserved == 0 and not self.ledger.held and not self.ledger.lanes


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def served(ledger: Ledger, tickets: dict[str, list[int]], rounds: int) -> dict[str, int]:
    """Tokens served per key when every key always has requests waiting and one finished request frees room for the next."""
    total = dict.fromkeys(tickets, 0)
    running: list[Ticket] = []
    rng = random.Random(5)
    for _ in range(rounds):
        for key, sizes in tickets.items():
            while key not in ledger.lanes or len(ledger.lanes[key].queue) < 70:
                ticket = Ticket(key, rng.choice(sizes))
                ledger.offer(ticket)
                if ticket.state is State.ADMITTED:
                    running.append(ticket)
        running += ledger.advance()
        done = running.pop(0)
        total[done.key] += done.tokens
        ledger.release(done)
    return total


def test_keys_get_equal_tokens_however_large_their_requests() -> None:
    total = served(Ledger(2000, 10**6), {"small": [16, 32], "large": [400, 900], "mixed": [16, 900]}, 6000)
    mean = sum(total.values()) / 3
    assert all(abs(tokens - mean) < 0.02 * mean for tokens in total.values()), total


def test_a_large_request_does_not_starve_behind_small_ones() -> None:
    ledger = Ledger(1000, 10**6)
    running = [Ticket("small", 100) for _ in range(10)]
    for ticket in running:
        ledger.offer(ticket)
    large = Ticket("large", 1000)
    ledger.offer(large)
    for _ in range(5):
        ledger.offer(Ticket("small", 100))
    for ticket in running:
        assert large.state is State.QUEUED
        ledger.release(ticket)
        ledger.advance()
    assert large.state is State.ADMITTED


def test_a_key_that_was_idle_has_no_claim_on_the_past() -> None:
    """After a thousand requests of one key, a newcomer gets half, not everything until it has caught up."""
    ledger = Ledger(100, 10**6)
    served(ledger, {"old": [100]}, 1000)
    total = served(ledger, {"old": [100], "new": [100]}, 100)
    assert abs(total["old"] - total["new"]) <= 300, total


def test_a_shared_beginning_is_counted_once_and_survives_its_first_owner() -> None:
    ledger = Ledger(100 * BLOCK, 0, BLOCK)
    chain = block_chain(list(range(10 * BLOCK + 1)), BLOCK, "model")
    first, second, third = (Ticket("a", 12 * BLOCK, chain) for _ in range(3))
    ledger.offer(first)
    ledger.offer(second)
    assert ledger.reserved == 24 * BLOCK  # neither is prefilled: vLLM may compute both
    ledger.prefilled(first)
    ledger.prefilled(second)
    ledger.offer(third)
    assert ledger.reserved == 26 * BLOCK  # ten blocks are there
    ledger.release(first)
    assert ledger.reserved == 24 * BLOCK  # the third still holds them
    ledger.release(third)
    ledger.release(second)
    assert ledger.reserved == 0 and not ledger.held


def test_the_chain_covers_what_a_hit_can_cover() -> None:
    assert block_chain(list(range(BLOCK)), BLOCK, "") == ()  # the last token is always computed
    assert len(block_chain(list(range(BLOCK + 1)), BLOCK, "")) == 1
    base = list(range(10 * BLOCK))
    changed = [*base[: 3 * BLOCK], -1, *base[3 * BLOCK + 1 :]]
    same = [a == b for a, b in zip(block_chain(base, BLOCK, ""), block_chain(changed, BLOCK, ""), strict=True)]
    assert same == [True] * 3 + [False] * 6
    assert not set(block_chain(base, BLOCK, "a")) & set(block_chain(base, BLOCK, "b"))
    assert block_chain([1.5] * 40, BLOCK, "") == ()  # type: ignore[list-item]
