"""The ledger against a model of it, in every order that hypothesis finds, and its fairness in numbers."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from m3quant.runtime.guard.ledger import IDLE_LANES, Ledger
from m3quant.runtime.guard.prefix import block_chain
from m3quant.runtime.guard.tickets import State, Ticket

BLOCK = 16


PATIENCE = 8.0
ROUNDING = 1e-6  # of times


class LedgerMachine(RuleBasedStateMachine):
    """Requests come, run, end, hang up while waiting, are released twice; the pool shrinks and grows; time goes on.

    The guarantee of ledger.py is checked against what this machine saw itself: who ran when a block began, how long it lasted, who passed.
    """

    tickets: Bundle = Bundle("tickets")

    @initialize(blocks=st.integers(1, 40), queue=st.integers(0, 60))
    def begin(self, blocks: int, queue: int) -> None:
        self.now = 0.0
        self.ledger = Ledger(blocks * BLOCK, queue * BLOCK, BLOCK, PATIENCE, lambda: self.now)
        self.all: list[Ticket] = []
        self.shrunk = False
        self.blocking: Ticket | None = None
        self.since = 0.0
        self.open_until = 0.0
        self.before: list[Ticket] = []  # what other keys ran when the present block began
        self.resized = False

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
        waiting = [other for other in self.all if other.state is State.QUEUED]
        fits = self.ledger.cost(ticket) <= self.ledger.free
        evicted = self.ledger.offer(ticket)
        self.all.append(ticket)
        if ticket.state is State.ADMITTED:
            assert fits and not any(other.key == key for other in waiting)  # nobody passes those of the same key
        elif fits:
            assert waiting  # an empty queue holds nobody back
        assert all(other in waiting and other.state is State.DROPPED and other.key != key for other in evicted)
        if ticket.state is State.DROPPED:
            assert not evicted
        self.advance()
        return ticket

    def advance(self) -> None:
        for ticket in self.ledger.advance():
            assert ticket.state is State.ADMITTED
        self.watch()

    def watch(self) -> None:
        """Follows the block, and checks what it must never do."""
        block = self.ledger.block
        now_blocking = block.ticket if block is not None else None
        if now_blocking is not self.blocking:
            if self.blocking is not None:
                lasted = self.now - self.since
                assert lasted <= self.longest(self.blocking) + ROUNDING or self.resized
                self.open_until = min(self.now, self.since + self.longest(self.blocking)) + lasted
            if now_blocking is not None:
                assert (
                    self.now >= self.open_until - ROUNDING or self.resized
                )  # open for as long as the last one blocked
                running = [ticket for ticket in self.all if ticket.state is State.ADMITTED]
                own = sum(ticket.tokens for ticket in running if ticket.key == now_blocking.key)
                assert own + now_blocking.tokens <= self.ledger.capacity  # nobody waits for what its own key holds
                self.before = [ticket for ticket in running if ticket.key != now_blocking.key]
                self.since, self.resized = self.now, False
            self.blocking = now_blocking
        if self.blocking is not None and not self.resized:
            assert any(ticket.state is State.ADMITTED for ticket in self.before)  # else it would have started

    def longest(self, ticket: Ticket) -> float:
        return PATIENCE * self.ledger.capacity / ticket.tokens

    @rule(seconds=st.sampled_from([0.5, 3.0, 20.0]))
    def wait(self, seconds: float) -> None:
        """As the admission does: it advances the ledger at the very end of a block, too."""
        until = self.now + seconds
        while (ends := self.ledger.block_ends()) is not None and ends <= until:
            self.now = max(self.now, ends)
            blocked, start = self.blocking, self.ledger.lanes[self.blocking.key].start if self.blocking else 0
            self.advance()
            if blocked is not None and blocked.state is State.QUEUED:
                assert self.ledger.lanes[blocked.key].start == start + blocked.tokens  # it pays for having blocked
        self.now = until
        self.advance()

    @rule(ticket=tickets)
    def prefill(self, ticket: Ticket) -> None:
        before = self.ledger.reserved
        self.ledger.prefilled(ticket)
        assert self.ledger.reserved == before  # nothing new is taken, it is only named
        self.advance()  # who waits with the same beginning may fit now

    @rule(target=tickets, ticket=consumes(tickets))
    def end(self, ticket: Ticket) -> Ticket:
        held = ticket.state is State.ADMITTED
        assert self.ledger.release(ticket) is held
        assert ticket.state in (State.RELEASED, State.DROPPED)
        self.advance()
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
        self.resized = True  # sizes as they were when the block began hold no more
        lost = self.ledger.resize(blocks * BLOCK, self.ledger.queue_limit, BLOCK)
        assert all(ticket.state is State.DROPPED and ticket.tokens > blocks * BLOCK for ticket in lost)
        self.advance()

    @rule()
    def drain(self) -> None:
        self.ledger.drop_waiting()
        assert self.ledger.queued == 0 and self.ledger.waiting == 0
        self.watch()

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
        for key, lane in ledger.lanes.items():
            assert lane.running == sum(ticket.tokens for ticket in running if ticket.key == key)
            if lane.queue and ledger.block is None:
                assert ledger.cost(lane.queue[0]) > ledger.free  # without a block nothing that fits waits
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


def run_against(
    hog: str, occupant: str, patience: float = 7.5, timeout: float = 30.0, seconds: float = 300.0
) -> list[int]:
    """Answers of the key "small" for every ten seconds.

    "small" keeps eight requests of 50 tokens and half a second each in a pool of 1,000. From the start `occupant` runs one request of 200
    tokens for ever, and `hog` asks for the whole pool again and again, each time for as long as `timeout`.
    """
    now = [0.0]
    ledger = Ledger(1000, 10**6, 1, patience, lambda: now[0])
    ledger.offer(Ticket(occupant, 200))
    big, deadline = Ticket(hog, 1000), timeout
    ledger.offer(big)
    small: dict[Ticket, float] = {}
    answers = [0] * int(seconds / 10)
    while now[0] < seconds:
        while len(small) < 8:
            ticket = Ticket("small", 50)
            small[ticket] = 0.0
            ledger.offer(ticket)
        if now[0] >= deadline:
            assert big.state is State.QUEUED
            ledger.release(big)
            big, deadline = Ticket(hog, 1000), now[0] + timeout
            ledger.offer(big)
        ledger.advance()
        now[0] += 0.05
        for ticket in list(small):
            if ticket.state is State.ADMITTED:
                small[ticket] += 0.05
            if small[ticket] > 0.49:
                del small[ticket]
                ledger.release(ticket)
                answers[min(len(answers) - 1, int(now[0] / 10))] += 1
        ledger.advance()
    return answers


def test_a_whole_pool_request_that_cannot_start_does_not_starve_another_key() -> None:
    alone = run_against("hog", "hog", patience=0)  # nobody may block
    whole = sum(alone) / len(alone)
    own = run_against("hog", "hog")
    assert own == alone, own  # what its own key holds gives it no right to block
    other = run_against("hog", "third")
    assert sum(other) >= 0.45 * whole * len(other), other  # held back at most half the time
    assert min(other) >= 0.2 * whole, other  # and not for ten seconds at a stretch


def test_a_whole_pool_request_starts_between_short_ones() -> None:
    now = [0.0]
    ledger = Ledger(1000, 10**6, 1, 7.5, lambda: now[0])
    running = [Ticket("small", 100) for _ in range(10)]
    for ticket in running:
        ledger.offer(ticket)
    large = Ticket("large", 1000)
    ledger.offer(large)
    waiting = [Ticket("small", 100) for _ in range(5)]
    for ticket in waiting:
        ledger.offer(ticket)
    for ticket in running:
        now[0] += 0.5
        ledger.release(ticket)
        ledger.advance()
    assert large.state is State.ADMITTED and all(ticket.state is State.QUEUED for ticket in waiting)


def test_smaller_requests_pass_a_blocking_one_without_delaying_it() -> None:
    ledger = Ledger(1000, 10**6)
    old = [Ticket("a", 300) for _ in range(3)]
    for ticket in old:
        ledger.offer(ticket)
    large = Ticket("b", 600)
    ledger.offer(large)
    ledger.advance()
    passing = [Ticket("c", 100) for _ in range(5)]
    for ticket in passing:
        ledger.offer(ticket)
    ledger.release(old[0])
    ledger.advance()
    assert [ticket.state for ticket in passing] == [State.ADMITTED] * 4 + [State.QUEUED]  # 400 beside its 600
    ledger.release(old[1])
    assert ledger.advance() == []
    ledger.release(old[2])
    assert ledger.advance() == [large]


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


def test_keys_that_are_made_up_are_forgotten() -> None:
    """A queue that is never empty, and a new key for every request: what is remembered of keys stays bounded."""
    ledger = Ledger(capacity=100, queue_limit=10_000)
    for number in range(40):
        ledger.offer(Ticket(f"waiting-{number}", 60))
    for number in range(5000):
        ticket = Ticket(f"made-up-{number}", 10)
        ledger.offer(ticket)
        ledger.release(ticket)
    assert len(ledger.lanes) <= IDLE_LANES + 50


def test_the_newest_of_the_longest_queue_make_room() -> None:
    ledger = Ledger(capacity=10, queue_limit=100)
    ledger.offer(Ticket("a", 10))
    hogs = [Ticket("hog", 10) for _ in range(10)]
    for hog in hogs:
        assert ledger.offer(hog) == []
    assert ledger.offer(Ticket("guest", 10)) == [hogs[-1]] and ledger.queued == 100
    assert ledger.offer(Ticket("guest", 10)) == [hogs[-2]]
    assert ledger.would_drop("hog", 10) and not ledger.would_drop("third", 10)
