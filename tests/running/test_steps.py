"""What a listener hears of work that waits, on several threads."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from m3quant.running import steps


class Heard:
    def __init__(self) -> None:
        self.words: list[str] = []

    def expect(self, seconds: float) -> None: ...

    def step(self, words: str) -> None: ...

    def waiting(self, words: str) -> None:
        self.words.append(words)

    def part(self, share: float) -> None: ...


@pytest.mark.parametrize(
    ("ends", "heard"), [([0, 1], ["b", ""]), ([1, 0], ["a", ""])], ids=["first ends first", "last ends first"]
)
@pytest.mark.parametrize("same", [False, True])
def test_a_wait_that_ends_leaves_the_others(ends: list[int], heard: list[str], same: bool) -> None:
    """They overlap as on two threads."""
    listener = Heard()
    words = ("a", "a") if same else ("a", "b")
    with steps.listening(listener):
        waits = [ExitStack(), ExitStack()]
        for wait, said in zip(waits, words, strict=True):
            wait.enter_context(steps.waiting(said))
        assert listener.words == list(words)
        for number in ends:
            waits[number].close()
    assert listener.words[2:] == (["a", ""] if same else heard)


def test_each_listener_hears_of_its_own_waits() -> None:
    outer, inner = Heard(), Heard()
    with steps.listening(outer), steps.waiting("outside"), steps.listening(inner), steps.waiting("inside"):
        pass
    assert outer.words == ["outside", ""] and inner.words == ["inside", ""]


def test_a_wait_that_fails_is_over_and_nobody_need_listen() -> None:
    listener = Heard()
    with steps.listening(listener), pytest.raises(OSError), steps.waiting("a"):
        raise OSError
    with steps.waiting("b"):
        pass
    assert listener.words == ["a", ""]
