"""Regexes in files from other people: a limit on the time of all matches, and refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from m3quant.checkpoint import patterns
from m3quant.checkpoint.patterns import Allowance, BoundedPattern
from m3quant.errors import RecipeError
from m3quant.recipe.llmcompressor import _Matcher, _Module

NAME = "model.layers.31.block_sparse_moe.experts.127.down_proj"


@pytest.mark.parametrize("pattern", [r"(.|[a-z])*[!?]$", r"(?:.|..|...)*[!?]$", r"(.+)(.+)(.+)(.+)(.+)(.+)\1[!?]"])
def test_a_pattern_that_would_run_for_years_is_a_sentence(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    with pytest.raises(
        RecipeError, match=r"^ignore: the regular expression .* takes more than 0\.2 s .* write it without"
    ):
        BoundedPattern(pattern, "ignore", RecipeError).match(NAME)
    module = _Module(NAME, "routed_experts", 31, (NAME,), "Linear")
    with pytest.raises(RecipeError, match=r"stage: the regular expression .* takes more than"):
        _Matcher([f"re:{pattern}"], "stage").first(module)


def test_the_time_of_all_names_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))  # a match takes a second by this clock, and no time at all by the library's
    monkeypatch.setattr(patterns, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(patterns, "SECONDS", 3.0)
    quick = BoundedPattern("layers", "ignore", RecipeError)
    assert [quick.match(name) for name in ("layers", "layers.0", "head")] == [True, True, False]
    with pytest.raises(RecipeError, match="takes more than 3 s"):
        quick.match("layers")


def ticking(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A clock on which a second passes whenever it is asked."""
    clock = iter(range(10_000))
    monkeypatch.setattr(patterns, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    return clock


def test_quick_patterns_share_the_time_of_their_list(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch)
    allowance = Allowance("config.json", "Write less.", RecipeError, seconds=3.0)
    quick = [BoundedPattern("layers", "ignore", RecipeError, allowance) for _ in range(4)]
    assert [pattern.match("layers") for pattern in quick[:3]] == [True, True, True]
    words = r"^config\.json: to compare its lists of modules .* takes more than 3 s\. Write less\.$"
    with pytest.raises(RecipeError, match=words):
        quick[3].match("layers")


def test_regexes_of_a_recipe_share_the_time_of_its_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch)
    allowance = Allowance("mine.yaml", "Write less.", RecipeError, seconds=3.0)
    module = _Module(NAME, "routed_experts", 31, (NAME,), "Linear")
    with pytest.raises(RecipeError, match=r"^mine\.yaml: to compare its lists"):
        _Matcher([f"re:layers{n}" for n in range(5)], "stage", allowance).first(module)


def test_a_pattern_that_uses_up_its_own_time_is_named_and_not_its_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    allowance = Allowance("config.json", "Write less.", RecipeError)
    with pytest.raises(RecipeError, match=r"^ignore: the regular expression '\(\.\|"):
        BoundedPattern(r"(.|[a-z])*[!?]$", "ignore", RecipeError, allowance).match(NAME)


def test_time_of_an_allowance_is_counted_once_and_not_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ticking(monkeypatch)
    allowance = Allowance("config.json", "Write less.", RecipeError, seconds=100.0)
    pattern = BoundedPattern("layers", "ignore", RecipeError, allowance)
    for _ in allowance.timed(range(5)):  # a tick for the item, two for the match
        pattern.match("layers")
    assert allowance.left == 100 - 5 * 3 - 1
    next(clock)
    assert not any(item == 2 for item in allowance.timed([1])) and allowance.left == 100 - 5 * 3 - 1 - 2


@pytest.mark.parametrize("pattern", ["(", "(.*", "a**", "[z-a]", "(?P<a", "(" * 5000, "a" * 100_001, "\\"])
def test_what_is_no_pattern_is_a_sentence(pattern: str) -> None:
    with pytest.raises(RecipeError, match=r"^ignore: .*regular expression") as caught:
        BoundedPattern(pattern, "ignore", RecipeError)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "pattern", [".*self_attn.*", r"model\.layers\.(1|31)\..*", "layers", ".*gate$", r"model\.layers\.\d+\.", ""]
)
def test_plain_patterns_match_as_pythons_do(pattern: str) -> None:
    bounded = BoundedPattern(pattern, "ignore", RecipeError)
    for name in (NAME, "model.layers.1.self_attn.q_proj", "lm_head", "model.layers.1.mlp.gate"):
        assert bounded.match(name) == (re.match(pattern, name) is not None)
