"""Regexes in files from other people: a limit on the time of all matches, and refusals."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from m3quant.checkpoint import patterns
from m3quant.checkpoint.patterns import BoundedPattern
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
