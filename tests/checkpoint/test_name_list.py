"""Lists of modules in files from other people: what each entry covers, and what a comparison may cost."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import product

import pytest

from m3quant.checkpoint.name_list import GLOB_CHARACTERS, MOST_PATTERNS, NameList
from m3quant.checkpoint.patterns import Allowance, T
from m3quant.errors import CheckpointError

NAME = "model.layers.31.block_sparse_moe.experts.127.down_proj"


class Counting(Allowance):
    """Counts what is compared."""

    def __init__(self) -> None:
        super().__init__("config.json, ignore", "Restore the release's own file.", CheckpointError)
        self.compared = 0

    def timed(self, items: Iterable[T]) -> Iterator[T]:
        for item in super().timed(items):
            self.compared += 1
            yield item


def test_entries_cover_what_a_plain_search_finds() -> None:
    rng = random.Random()
    words = ["a", "b", "ab", "layers", "*", "l*s", "?b", "[ab]", "*a*"]
    names = [".".join(parts) for count in (1, 2, 3, 4) for parts in product(("a", "b", "ab", "layers"), repeat=count)]
    for _ in range(30):
        entries = [".".join(rng.choices(words, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 6))]
        listed = NameList(entries, Counting(), globs=True)
        plain = [entry for entry in entries if "*" not in entry]
        for name in rng.sample(names, 40):
            globs = [entry for entry in entries if "*" in entry]
            assert listed.names(name) == (name in entries or any(fnmatchcase(name, glob) for glob in globs)), entries
            assert listed.has_run(name) == any(f".{entry}." in f".{name}." for entry in plain), entries
            assert listed.has_piece(name) == any(entry in name for entry in entries), entries


def test_what_is_no_pattern_here_is_a_name() -> None:
    entries = ["re:.*layers.*", "*layers*"]
    assert not NameList(entries, Counting()).names(NAME)
    assert NameList(entries[:1], Counting(), regexes=True).names(NAME)
    assert not NameList(entries[:1], Counting(), globs=True).names(NAME)
    assert NameList(entries[1:], Counting(), globs=True).names(NAME)
    assert not NameList(entries[1:], Counting(), regexes=True).names(NAME)


def test_whole_names_cost_the_same_however_many_are_listed() -> None:
    for count in (10, 100_000):
        allowance = Counting()
        listed = NameList([f"model.layers.{n}.mlp.gate" for n in range(count)], allowance, globs=True, regexes=True)
        assert not listed.names(NAME) and not listed.has_run(NAME)
        assert allowance.compared <= len(NAME.split("."))


def test_globs_that_begin_otherwise_are_not_compared() -> None:
    allowance = Counting()
    listed = NameList([f"model.layers.{n}.self_attn*" for n in range(5000)] + ["*lm_head*"], allowance, globs=True)
    made = allowance.compared
    assert listed.names("model.layers.4999.self_attn.q_proj") and not listed.names(NAME)
    assert allowance.compared - made <= 3


def test_more_patterns_than_any_release_has_are_a_sentence() -> None:
    at_most = [f"*a{n}*" for n in range(MOST_PATTERNS // 2)] + [f"re:a{n}" for n in range(MOST_PATTERNS // 2)]
    NameList(at_most, Counting(), globs=True, regexes=True)
    NameList([f"a{n}" for n in range(2 * MOST_PATTERNS)], Counting(), globs=True, regexes=True)
    words = (
        r"^config\.json, ignore: 10,001 patterns in one list .* more than 10,000\. Restore the release's own file\.$"
    )
    with pytest.raises(CheckpointError, match=words):
        NameList([*at_most, "*"], Counting(), globs=True, regexes=True)


def test_a_long_glob_is_a_sentence() -> None:
    glob = "*a" * (GLOB_CHARACTERS // 2)
    NameList([glob], Counting(), globs=True)
    with pytest.raises(
        CheckpointError, match=r"^config\.json, ignore: a pattern of 1,001 .* more than 1,000\. Restore"
    ):
        NameList([f"{glob}b"], Counting(), globs=True)


@pytest.mark.parametrize("entries", [["*a*"], ["a.b"], ["re:.*b"]], ids=["globs", "runs", "regexes"])
def test_nothing_is_compared_once_the_time_is_used_up(entries: list[str]) -> None:
    allowance = Counting()
    listed = NameList(entries, allowance, globs=True, regexes=True)
    assert listed.names("a.b") or listed.has_run("a.b")
    allowance.left = 0.0
    with pytest.raises(
        CheckpointError, match=r"^config\.json, ignore: to compare its lists .* more than 120 s\. Restore"
    ):
        listed.names("x.y.a.b") or listed.has_run("x.y.a.b")


def test_pieces_are_compared_within_the_time() -> None:
    allowance = Counting()
    listed = NameList(["x", "y"], allowance)
    assert not listed.has_piece("a.b") and allowance.compared == 2
    allowance.left = 0.0
    with pytest.raises(CheckpointError, match="to compare its lists"):
        listed.has_piece("a.b")
