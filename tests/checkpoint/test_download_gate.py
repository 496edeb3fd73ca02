"""How many downloads are let in, before a network that is simulated on a clock of its own."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from m3quant.checkpoint import download_gate
from m3quant.checkpoint.download_gate import DownloadGate
from m3quant.checkpoint.shard_cache import Abandoned

MB = 10**6
STEP = 0.02
PATIENCE = 20.0


class Client:
    """A download on a thread of its own, which ends when it is told to."""

    def __init__(self, gate: DownloadGate, size: int, order: float, left: Callable[[], bool] = lambda: False) -> None:
        self.size, self.order, self.got = size, order, 0
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
            self.now += STEP
            share = min(self.each, self.total / len(inside))
            for client in inside:
                count = min(int(share * STEP), client.size - client.got)
                client.got += count
                client.came(count)
                if client.got == client.size:
                    self.end(client)

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
    assert (
        first <= 9.0 and second <= 11.0 and third <= 16.0
    )  # the trial of a second one takes the first half of its speed for a while
    assert simulated.gate.allowed == 1


def test_where_each_connection_is_limited_all_come_at_once(network: Callable[..., Network]) -> None:
    simulated = network(total=1000 * MB, each=200 * MB, size=5000 * MB)
    simulated.run(20)
    assert simulated.gate.allowed == 4 and simulated.course[-1] == 4


def test_as_many_as_bring_something(network: Callable[..., Network]) -> None:
    simulated = network(total=1000 * MB, each=480 * MB, size=5000 * MB)
    simulated.run(60)
    assert simulated.gate.allowed == 2


def test_the_next_connects_before_the_last_bytes_have_come(network: Callable[..., Network]) -> None:
    simulated = network(total=1000 * MB, each=1000 * MB, size=5000 * MB)
    simulated.run(50)
    # Of the settled part: one at a time, with another one beside it for the half second before its end.
    assert set(simulated.course[1250:]) == {1, 2}
    assert simulated.course[1250:].count(2) / len(simulated.course[1250:]) < 0.25


def test_short_files_do_not_wait_for_a_window_that_never_ends(network: Callable[..., Network]) -> None:
    # Each is over before a window is: measured across them, a connection that is slow alone lets more in.
    simulated = network(total=1000 * MB, each=10 * MB, size=5 * MB)
    simulated.run(15)
    assert simulated.course[-1] == 4


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
    monkeypatch.setattr(download_gate, "AGAIN_SECONDS", 20.0)
    simulated = network(total=500 * MB, each=500 * MB, size=5000 * MB)
    simulated.run(10)
    assert simulated.gate.allowed == 1
    simulated.total = 4000 * MB  # what one gets stays the same
    simulated.run(60)
    assert simulated.gate.allowed == 4


def test_who_waits_leaves_when_nobody_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_gate, "POLL_SECONDS", 0.01)
    gate, over = DownloadGate(4), threading.Event()
    first = Client(gate, 100, 0)
    assert first.inside.wait(PATIENCE)
    second = Client(gate, 100, 1, over.is_set)
    assert not second.inside.wait(0.1)
    over.set()
    second.thread.join(PATIENCE)
    assert isinstance(second.error, Abandoned) and not second.inside.is_set()
    first.over.set()
    first.thread.join(PATIENCE)
    third = Client(gate, 100, 2)
    assert third.inside.wait(PATIENCE)
    third.over.set()


def test_a_download_that_fails_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_gate, "POLL_SECONDS", 0.01)
    gate = DownloadGate(4)
    with pytest.raises(ConnectionError), gate.download(100, 0, lambda: False):
        raise ConnectionError
    with gate.download(100, 1, lambda: False) as came:
        came(100)
