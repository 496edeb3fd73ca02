"""How many downloads are let in, before a network that is simulated on a clock of its own."""

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from m3quant.checkpoint import download_gate
from m3quant.checkpoint.download_gate import DownloadGate
from m3quant.checkpoint.shard_cache import Abandoned

MB, GB = 10**6, 10**9
STEP = 0.02
PATIENCE = 20.0


class Client:
    """A download on a thread of its own, which ends when it is told to."""

    def __init__(self, gate: DownloadGate, size: int, order: float, left: Callable[[], bool] = lambda: False) -> None:
        self.size, self.order, self.got, self.told = size, order, 0, 0
        self.inside, self.over = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self._gate, self._left = gate, left
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self._gate.download(self.size, self.order, self._left) as self.came:
                self.inside.set()
                assert self.over.wait(PATIENCE)
        except Abandoned as error:
            self.error = error


class Network:
    """So many bytes per second in all, and on each connection at most; downloads of one size, in order, until the clock says `seconds`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: float, each: float, size: int, most: int = 4) -> None:
        monkeypatch.setattr(download_gate, "POLL_SECONDS", 0.01)
        self.now, self.total, self.each, self.size = 0.0, total, each, size
        self.gate = DownloadGate(most, clock=lambda: self.now)
        self.clients = [Client(self.gate, size, number) for number in range(most + 1)]
        self.finished: list[tuple[float, int]] = []
        self.course: list[int] = []
        self.allowed: list[int] = []
        self.standing = set[int]()  # orders of downloads to which nothing comes
        self.leap = 1  # bytes that are told together

    def settle(self) -> list[Client]:
        """Those inside, once all that are let in have come in."""
        for _ in range(2000):
            with self.gate._changed:
                waits = self.gate._waiting and not self.gate._full()
            if not waits:
                break
            threading.Event().wait(0.005)
        return [client for client in self.clients if client.inside.is_set()]

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            inside = self.settle()
            self.course.append(len(inside))
            self.allowed.append(self.gate.allowed)
            self.now += STEP
            served = [client for client in inside if client.order not in self.standing]
            share = min(self.each, self.total / max(1, len(served)))
            for client in served:
                client.got += min(int(share * STEP), client.size - client.got)
                if client.got - client.told >= self.leap or client.got == client.size:
                    client.came(client.got - client.told)
                    client.told = client.got
                if client.got == client.size:
                    self.end(client)

    @property
    def received(self) -> int:
        return len(self.finished) * self.size + sum(client.got for client in self.clients)

    def end(self, client: Client) -> None:
        self.finished.append((self.now, int(client.order)))
        client.over.set()
        client.thread.join(PATIENCE)
        self.clients.remove(client)
        self.clients.append(Client(self.gate, self.size, max(c.order for c in self.clients) + 1))

    def close(self) -> None:
        for client in self.clients:
            client._left = lambda: True
            client.over.set()
        for client in self.clients:
            client.thread.join(PATIENCE)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float, float, int], Network]]:
    with ExitStack() as stack:

        def of(total: float, each: float, size: int) -> Network:
            made = Network(monkeypatch, total, each, size)
            stack.callback(made.close)
            return made

        yield of


def test_where_one_fills_the_network_shards_come_one_after_the_other(network: Callable[..., Network]) -> None:
    # Four at once would all be there after 20 s.
    simulated = network(total=1000 * MB, each=1000 * MB, size=5000 * MB)
    simulated.run(24)
    (first, _), (second, _), (third, _) = simulated.finished[:3]
    assert [order for _, order in simulated.finished[:4]] == [0, 1, 2, 3]
    # The trial of a second one takes half of the first one's speed for a while.
    assert first <= 9.0 and second <= 11.0 and third <= 16.0
    assert simulated.gate.allowed == 1


def test_where_each_connection_is_limited_all_come_at_once(network: Callable[..., Network]) -> None:
    simulated = network(total=1000 * MB, each=200 * MB, size=5000 * MB)
    simulated.run(20)
    assert simulated.gate.allowed == 4 and simulated.course[-1] == 4


def test_as_many_as_bring_something(network: Callable[..., Network]) -> None:
    simulated = network(total=1000 * MB, each=490 * MB, size=5000 * MB)
    simulated.run(60)
    assert simulated.gate.allowed == 2


def test_the_next_connects_before_the_last_bytes_have_come(network: Callable[..., Network]) -> None:
    simulated = network(total=1000 * MB, each=1000 * MB, size=5000 * MB)
    simulated.run(50)
    # Of the settled part: one at a time, with another one beside it for the half second before its end.
    assert set(simulated.course[1250:]) == {1, 2}
    assert simulated.course[1250:].count(2) / len(simulated.course[1250:]) < 0.25


def test_of_two_the_next_connects_as_long_before_the_end(network: Callable[..., Network]) -> None:
    simulated = network(total=1000 * MB, each=490 * MB, size=5000 * MB)
    simulated.run(60)
    # Half a second of each of the two, which take ten.
    assert 0.05 < simulated.course[1500:].count(3) / len(simulated.course[1500:]) < 0.15


def test_short_files_do_not_wait_for_a_window_that_never_ends(network: Callable[..., Network]) -> None:
    # Each is over before a window is: measured across them, a connection that is slow alone lets more in.
    simulated = network(total=1000 * MB, each=50 * MB, size=100 * MB)
    simulated.leap = 10 * MB
    simulated.run(60)
    assert simulated.course[-1] == 4
    assert len(network(total=1000 * MB, each=10 * MB, size=5 * MB).settle()) == 4  # too short to tell a rate


def test_a_network_that_becomes_slow_per_connection_is_tried_again(network: Callable[..., Network]) -> None:
    simulated = network(total=1000 * MB, each=1000 * MB, size=5000 * MB)
    simulated.run(20)
    assert simulated.gate.allowed == 1
    simulated.each = 200 * MB
    simulated.run(60)
    assert simulated.gate.allowed == 4


def test_one_more_is_tried_again_after_a_while(
    network: Callable[..., Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_gate, "MORE_SECONDS", 20.0)
    simulated = network(total=500 * MB, each=500 * MB, size=5000 * MB)
    simulated.run(10)
    assert simulated.gate.allowed == 1
    simulated.total = 4000 * MB  # what one gets stays the same
    simulated.run(60)
    assert simulated.gate.allowed == 4


def test_who_waits_leaves_when_nobody_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_gate, "POLL_SECONDS", 0.01)
    gate, over = DownloadGate(4), threading.Event()
    first = Client(gate, GB, 0)
    assert first.inside.wait(PATIENCE)
    second = Client(gate, GB, 1, over.is_set)
    assert not second.inside.wait(0.1)
    over.set()
    second.thread.join(PATIENCE)
    assert isinstance(second.error, Abandoned) and not second.inside.is_set()
    first.over.set()
    first.thread.join(PATIENCE)
    third = Client(gate, GB, 2)
    assert third.inside.wait(PATIENCE)
    third.over.set()


def test_a_download_that_fails_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_gate, "POLL_SECONDS", 0.01)
    gate = DownloadGate(4)
    with pytest.raises(ConnectionError), gate.download(GB, 0, lambda: False):
        raise ConnectionError
    with gate.download(GB, 1, lambda: False) as came:
        came(GB)


def not_for_long() -> Callable[[], bool]:
    """A wait for a place that is there at once, or never."""
    looks = 0

    def left() -> bool:
        nonlocal looks
        looks += 1
        return looks > 20

    return left


def test_two_downloads_of_one_size_are_two() -> None:
    """The one that fails takes its own place away, not that of its twin, which goes on and ends."""
    gate = DownloadGate(4, clock=lambda: 0.0)
    gate.allowed = 2
    with gate.download(100, 0, not_for_long()) as came:
        with pytest.raises(ConnectionError), gate.download(100, 1, not_for_long()):
            raise ConnectionError
        came(50)
        assert [running.left for running in gate._running] == [50]
    assert gate._running == []


def test_after_a_signal_nothing_begins_even_where_there_is_room() -> None:
    with pytest.raises(Abandoned), DownloadGate(4).download(100, 0, lambda: True):
        raise AssertionError("it began")


@pytest.mark.parametrize("begun", [False, True])
def test_a_download_that_stands_still_keeps_nobody_out(
    monkeypatch: pytest.MonkeyPatch, network: Callable[..., Network], begun: bool
) -> None:
    simulated = network(total=1000 * MB, each=1000 * MB, size=5000 * MB)
    if begun:
        simulated.run(3)
    simulated.standing = {0}
    simulated.run(30)
    assert [order for _, order in simulated.finished[:3]] == [1, 2, 3]
    simulated.standing = {4, 5, 6, 7}  # all that will be inside: then as many as may be
    simulated.run(60)
    assert len(simulated.settle()) == 4
    simulated.standing = set()
    simulated.run(60)
    assert {order for _, order in simulated.finished} >= set(range(8)) and simulated.gate.allowed == 1


def test_a_pause_in_which_nothing_came_is_no_rate(network: Callable[..., Network]) -> None:
    """The disk was full for a minute, or the server asked for a pause: the network is what it was before."""
    simulated = network(total=1000 * MB, each=1000 * MB, size=5000 * MB)
    simulated.run(20)
    assert simulated.gate.allowed == 1
    for _ in range(5):
        simulated.now += 15  # less than after which one more is tried anyway
        simulated.run(4)
        assert simulated.gate.allowed == 1


def test_a_short_dip_changes_nothing_and_a_lasting_one_does(network: Callable[..., Network]) -> None:
    simulated = network(total=1000 * MB, each=1000 * MB, size=5000 * MB)
    simulated.run(20)
    for _ in range(8):
        simulated.total = 100 * MB
        simulated.run(0.5)
        simulated.total = 1000 * MB
        simulated.run(3)
        assert simulated.gate.allowed == 1
    simulated.each = 100 * MB
    simulated.run(15)
    assert simulated.gate.allowed >= 2


def test_more_than_are_of_use_become_fewer(network: Callable[..., Network], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that grew faster while one more was tried, by no merit of that one."""
    simulated = network(total=1000 * MB, each=200 * MB, size=5000 * MB)
    simulated.run(20)
    assert simulated.gate.allowed == 4
    simulated.each = 1000 * MB
    simulated.run(download_gate.LESS_SECONDS + 60)
    assert simulated.gate.allowed == 1
    assert set(simulated.allowed[simulated.allowed.index(1, 500) :]) == {1}  # that two bring no more was known of late


def test_as_many_as_bring_something_stay_over_hours(network: Callable[..., Network]) -> None:
    simulated = network(total=1000 * MB, each=300 * MB, size=5000 * MB)
    simulated.run(60)
    before = simulated.received
    simulated.run(1500)
    assert simulated.course.count(4) >= 0.95 * len(simulated.course)
    # Trying with one less costs little.
    assert simulated.received - before >= 0.98 * 1500 * 1000 * MB


@pytest.mark.parametrize(
    ("each", "leap", "expected"),
    [
        (1000 * MB, 64 * MB, 1000 * MB),
        (1000 * MB, 5000 * MB, 1000 * MB),
        (200 * MB, 64 * MB, 800 * MB),
        # Of 25 s a file, while one more is let in after each 10 s in which nothing came.
        (200 * MB, 5000 * MB, 480 * MB),
    ],
)
def test_progress_in_leaps(network: Callable[..., Network], each: int, leap: int, expected: int) -> None:
    """Xet tells of what lies on the disk, some ten MB at a time; another client maybe of whole files."""
    simulated = network(total=1000 * MB, each=each, size=5000 * MB)
    simulated.leap = leap
    simulated.run(60)
    before = simulated.received
    simulated.run(60)
    assert simulated.received - before >= 0.99 * 60 * expected


def test_lost_bytes_are_no_rate(network: Callable[..., Network]) -> None:
    """A library begins a file anew, and takes back what it told: less than nothing comes in a second."""
    simulated = network(total=1000 * MB, each=1000 * MB, size=5000 * MB)
    simulated.run(20)
    for _ in range(25):
        simulated.run(1.3)
        client = simulated.settle()[0]
        client.came(-client.got)
        client.got = client.told = 0
        assert simulated.gate._rate >= 0 and simulated.gate.allowed == 1


def brings(
    gate: DownloadGate, rates: list[float], came: list[Callable[[int], None]], clock: list[float], seconds: float
) -> None:
    """So many bytes per second on each download."""
    until = clock[0] + seconds
    while clock[0] < until:
        clock[0] += STEP
        for rate, tell in zip(rates, came, strict=True):
            tell(int(rate * STEP))


def test_only_downloads_that_have_begun_are_measured() -> None:
    """A process starts, and asks for the address, for some seconds: what comes meanwhile is not what two bring."""
    clock = [0.0]
    gate = DownloadGate(4, clock=lambda: clock[0])
    with gate.download(1000 * GB, 0, not_for_long()) as first:
        brings(gate, [100.0 * MB], [first], clock, 3)
        assert gate.allowed == 2
        brings(gate, [100.0 * MB], [first], clock, 8)  # nobody wants the second place
        assert gate.allowed == 2
        with gate.download(1000 * GB, 1, not_for_long()) as second:
            brings(gate, [100.0 * MB], [first], clock, 8)
            assert gate.allowed == 2
            second(10 * MB)
            second(-10 * MB)  # and connects anew
            brings(gate, [100.0 * MB], [first], clock, 8)
            assert gate.allowed == 2
            brings(gate, [100.0 * MB] * 2, [first, second], clock, 3)
            assert gate.allowed == 3


def test_who_does_not_count_adds_nothing_to_the_rate_of_the_others() -> None:
    """Two that bring no more than one, while a short one is let go on beside them."""
    clock = [0.0]
    gate = DownloadGate(4, clock=lambda: clock[0])
    with ExitStack() as stack:
        first = stack.enter_context(gate.download(1000 * GB, 0, not_for_long()))
        brings(gate, [100.0 * MB], [first], clock, 3)
        with gate.download(60 * MB, 2, not_for_long()) as short:
            second = stack.enter_context(gate.download(1000 * GB, 1, not_for_long()))
            brings(gate, [50.0 * MB, 50.0 * MB, 10.0 * MB], [first, second, short], clock, 5)
            assert gate.allowed == 2
        brings(gate, [50.0 * MB, 50.0 * MB], [first, second], clock, 3)
        assert gate.allowed == 1


def test_downloads_that_fail_lie_and_leave_at_random_never_block_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_gate, "POLL_SECONDS", 0.005)
    chance, most = random.Random(7), 3
    gate, ended = DownloadGate(most), Counter[str]()
    lock, inside, peak = threading.Lock(), 0, 0

    def work(plan: list[tuple[int, int, str]]) -> None:
        nonlocal inside, peak
        for size, order, how in plan:
            try:
                with gate.download(size, order, lambda how=how: how == "left") as came:
                    with lock:
                        inside += 1
                        peak = max(peak, inside)
                    try:
                        for count in {
                            "all": (size,),
                            "none": (),
                            "more": (size, size),
                            "back": (size, -2 * size, 0),
                        }.get(how, ()):
                            came(count)
                        if how == "fails":
                            raise ConnectionError
                    finally:
                        with lock:
                            inside -= 1
            except (ConnectionError, Abandoned) as error:
                how = type(error).__name__
            with lock:
                ended[how] += 1

    plans = [
        [
            (chance.choice((0, 100, GB, GB)), chance.randint(0, 3), chance.choice(("all", "none", "more", "back", "fails", "left")))
            for _ in range(100)
        ]
        for _ in range(12)
    ]  # fmt: skip
    threads = [threading.Thread(target=work, args=(plan,), daemon=True) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    wanted = Counter(how for plan in plans for _, _, how in plan)
    renamed = {"fails": "ConnectionError", "left": "Abandoned"}
    assert ended == {renamed.get(how, how): count for how, count in wanted.items()}
    assert 1 <= peak <= most and not gate._running and not gate._waiting and 1 <= gate.allowed <= most
