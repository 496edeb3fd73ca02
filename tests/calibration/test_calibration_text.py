"""How many calibration tokens `plan` advises, in windows of which lengths, and how sources are mixed."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from m3quant.calibration.corpus import Loaded, load_tokenizer
from m3quant.calibration.documents import Document
from m3quant.calibration.mixture import Part, deal, mixed_windows, parse_mixture
from m3quant.calibration.windows import tokenize_windows
from m3quant.cli import cli
from m3quant.cli.options import TokenCount
from m3quant.errors import CalibrationError
from m3quant.planning.calibration_text import (
    FEWEST_TOKENS,
    calibration_lines,
    described,
    groups_line,
    token_choice,
    tokens_for_rows,
    window_groups,
)
from m3quant.planning.headers import from_config
from m3quant.planning.plan import Plan, make_plan
from m3quant.planning.resources import resources
from m3quant.planning.timing_model import load_rates
from m3quant.recipe.recipe import build_recipe, named_recipe
from tests.support.paths import FIXTURES, TESTS

CONFIGS = {"m2": TESTS / "data/minimax-m2.7/config.json", "m3": TESTS / "data/minimax-m3/config.json"}


@cache
def awq_plan(config: Path) -> Plan:
    return make_plan(from_config(config), build_recipe(named_recipe("awq"), settings=(), format=None))


class TestTokens:
    @pytest.mark.parametrize(("name", "hidden", "spread"), [("m2", 3072, 256 / 8), ("m3", 6144, 128 / 4)])
    def test_a_release_gets_rows_for_4_to_8_times_its_width(self, name: str, hidden: int, spread: float) -> None:
        choice = token_choice(awq_plan(CONFIGS[name]), load_rates())
        assert choice.rows_per_expert == choice.tokens / spread
        assert choice.rows_per_k == pytest.approx(choice.rows_per_expert / hidden)
        assert 4 <= choice.rows_per_k <= 8
        assert choice.compute_seconds <= 1.2 * choice.disk_seconds and choice.bound == "disk"

    def test_m3_gets_about_800_000(self) -> None:
        assert 0.7e6 < token_choice(awq_plan(CONFIGS["m3"]), load_rates()).tokens < 0.9e6

    def test_a_faster_gpu_takes_more_until_there_are_rows_enough(self) -> None:
        plan, rates = awq_plan(CONFIGS["m2"]), load_rates()
        fast = token_choice(plan, rates.model_copy(update={"forward": 1e18}))
        assert (fast.bound, fast.rows_per_k) == ("rows", 8.0) and fast.tokens == tokens_for_rows(8, 3072, 256, 8)
        slow = token_choice(plan, rates.model_copy(update={"forward": 1e11}))  # a CPU
        assert (slow.bound, slow.tokens) == ("least", FEWEST_TOKENS)
        unknown = token_choice(plan, rates.model_copy(update={"forward": None}))
        assert (unknown.tokens, unknown.compute_seconds) == (FEWEST_TOKENS, 0.0)

    def test_a_smaller_gpu_takes_what_it_has_room_for(self) -> None:
        plan, rates = awq_plan(CONFIGS["m3"]), load_rates()
        h100 = token_choice(plan, rates.model_copy(update={"device_memory": 85 * 10**9}))
        assert h100.bound == "memory" and FEWEST_TOKENS < h100.tokens < 400_000
        data = plan.recipe.data.model_copy(update={"windows": h100.tokens // plan.recipe.data.window_length})
        chosen = replace(plan, recipe=plan.recipe.model_copy(update={"data": data}))
        assert resources(chosen, on_gpu=True).device <= 0.95 * 85e9
        assert resources(chosen, on_gpu=True).device + 14 * 6144 * 65_536 > 0.95 * 85e9, "a step more has no room"
        none = token_choice(plan, rates.model_copy(update={"device_memory": 20 * 10**9}))
        assert (none.bound, none.tokens) == ("least", FEWEST_TOKENS)

    def test_a_narrow_model_has_rows_enough_already(self) -> None:
        plan = awq_plan(FIXTURES / "tiny-m2" / "config.json")
        assert token_choice(plan, load_rates()).tokens == FEWEST_TOKENS
        assert len(calibration_lines(plan, load_rates())) == 1, "nothing to advise"

    def test_the_cost_is_linear_in_the_tokens(self) -> None:
        plan, rates = awq_plan(CONFIGS["m3"]), load_rates()
        one, two = described(plan, rates, 100_000), described(plan, rates, 200_000)
        assert two.compute_seconds == pytest.approx(2 * one.compute_seconds) and two.disk_seconds == one.disk_seconds

    def test_plan_shows_both(self) -> None:
        arguments = ["plan", str(CONFIGS["m3"]), "--to", "awq"]
        text = CliRunner().invoke(cli, arguments, catch_exceptions=False).output
        assert "calibration text: 65,536 tokens in 128 windows of 512, and 16 windows held out" in text
        assert "0.33 times its input's 6,144" in text and "--calibration-tokens 786432" in text
        found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False).output)
        assert found["calibration_tokens"]["tokens"] == 786_432


class TestWindowGroups:
    @pytest.mark.parametrize(("rows", "length", "selected"), [
        (1536, 512, 2048), (1536, 512, 0), (1, 512, 2048), (7, 512, 2048), (15, 512, 2048), (16, 512, 2048), (144, 512, 512), (33, 16, 0),
        (100, 4096, 2048),
    ])  # fmt: skip
    def test_every_row_is_in_one_window(self, rows: int, length: int, selected: int) -> None:
        groups = window_groups(rows, length, selected)
        seen = [row for g in groups for w in range(g.windows) for row in range(g.start + w * g.rows, g.start + (w + 1) * g.rows)]  # fmt: skip
        assert seen == list(range(rows))
        assert sum(g.windows * g.rows for g in groups if g.rows == 1) >= rows / 2
        assert [g.rows for g in groups] == sorted({g.rows for g in groups})

    def test_some_pass_the_selection(self) -> None:
        groups = window_groups(1536, 512, 2048)
        assert [(g.windows, g.rows * 512) for g in groups] == [(768, 512), (96, 2048), (48, 4096)]
        assert groups_line(groups, 512) == "768 windows of 512 tokens, 96 of 2,048 and 48 of 4,096"
        assert groups_line(window_groups(3, 512, 2048), 512) == "3 windows of 512 tokens"
        ids = np.arange(1536 * 512).reshape(1536, 512)
        last = groups[-1]
        joined = ids[last.start : last.start + last.windows * last.rows].reshape(last.windows, -1)
        assert joined.shape == (48, 4096) and bool((np.diff(joined) == 1).all()), "consecutive text"


class TestMixture:
    @pytest.mark.parametrize(("values", "expected"), [
        ((), [("bundled", 1.0)]),
        (("a.jsonl",), [("a.jsonl", 1.0)]),
        (("a.jsonl=0.7", "bundled=0.3"), [("a.jsonl", 0.7), ("bundled", 0.3)]),
        (("a", "b=3"), [("a", 0.25), ("b", 0.75)]),
        (("org/name:config:train=2", "b=2"), [("org/name:config:train", 0.5), ("b", 0.5)]),
    ])  # fmt: skip
    def test_sources_and_weights(self, values: tuple[str, ...], expected: list[tuple[str, float]]) -> None:
        assert [(part.spec, pytest.approx(part.share)) for part in parse_mixture(values)] == expected

    def test_a_file_may_have_an_equals_sign_in_its_name(self, tmp_path: Path) -> None:
        path = tmp_path / "lr=0.1"
        path.mkdir()
        assert parse_mixture((str(path),)) == (Part(str(path), 1.0),)

    @pytest.mark.parametrize("value", ["a=0", "a=-1", "a=nan", "a=inf", "a=", "a=lots"])
    def test_a_weight_that_is_none_is_refused(self, value: str) -> None:
        with pytest.raises(CalibrationError, match="--calibration '"):
            parse_mixture((value,))

    def test_a_source_named_twice_is_refused(self) -> None:
        with pytest.raises(CalibrationError, match="names 'a' twice"):
            parse_mixture(("a=1", "a=2"))

    @pytest.mark.parametrize("shares", [(1.0,), (0.7, 0.3), (0.5, 0.5), (0.9, 0.07, 0.03), (1 / 3, 1 / 3, 1 / 3)])
    def test_any_prefix_has_the_shares_to_one_window(self, shares: tuple[float, ...]) -> None:
        order = deal(500, shares)
        for number in range(1, 501):
            taken = np.bincount(order[:number], minlength=len(shares))
            assert (np.abs(taken - number * np.array(shares)) < 1 + 1e-9).all()

    def mixed(self, parts: list[Part], windows: int) -> Any:
        texts = {"a": ("text", "alpha beta "), "b": ("code", "x = 1\n"), "short": ("text", "few")}
        sources = {
            name: Loaded(name, (Document(kind, "en", name, "none", text=text * (300 if name != "short" else 1)),), (f"{name} note",))
            for name, (kind, text) in texts.items()
        }  # fmt: skip
        return mixed_windows(parts, load_tokenizer(FIXTURES / "tiny-m2"), windows, 16, seed=0, read=sources.__getitem__)

    def test_windows_come_from_their_sources(self) -> None:
        windows = self.mixed([Part("a", 0.75), Part("b", 0.25)], 16)
        per_window = [windows.kinds[row.argmax()] for row in windows.window_kind_tokens]
        assert Counter(per_window) == {"text": 12, "code": 4} and windows.ids.shape == (16, 16)
        assert windows.kind_tokens == {"code": 64, "text": 192}
        assert windows.source == "75.0% a: 1 of 1 documents (1 text), 12 windows; 25.0% b: 1 of 1 documents (1 code), 4 windows"  # fmt: skip
        assert windows.notes == ("a note", "b note") and windows.record()["source"] == windows.source
        alone = self.mixed([Part("a", 1.0)], 12)
        assert (windows.ids[np.array(per_window) == "text"] == alone.ids).all(), "each source keeps its own order"

    def test_the_same_mixture_is_the_same_and_another_is_not(self) -> None:
        parts = [Part("a", 0.75), Part("b", 0.25)]
        hashes = [self.mixed(p, 16).sha256 for p in (parts, parts, parts[::-1], [Part("a", 0.5), Part("b", 0.5)])]
        assert len(set(hashes)) == 3 and hashes[0] == hashes[1]

    def test_too_little_of_one_source_names_it(self) -> None:
        with pytest.raises(CalibrationError, match="short: The calibration text is too short"):
            self.mixed([Part("a", 0.5), Part("short", 0.5)], 16)
        with pytest.raises(CalibrationError, match=r"'b': a share of 1.00% of 16 windows is less than one"):
            self.mixed([Part("a", 0.99), Part("b", 0.01)], 16)


def test_further_documents_are_read_only_where_the_first_are_too_short() -> None:
    tokenizer = load_tokenizer(FIXTURES / "tiny-m2")
    first = [Document("text", "en", "first", "none", text="alpha beta " * 100)]
    more = (Document("code", "en", "more", "none", text="x = 1\n" * 300),)
    plain = tokenize_windows(first, tokenizer, 4, 16, seed=0)
    with_more = tokenize_windows(first, tokenizer, 4, 16, seed=0, more=lambda: pytest.fail("not needed"))
    assert plain.sha256 == with_more.sha256 and plain.record() == with_more.record()
    longer = tokenize_windows(first, tokenizer, 40, 16, seed=0, more=lambda: more)
    assert (longer.ids[:4] == plain.ids).all() and longer.corpus_sha256 != plain.corpus_sha256
    assert longer.source == "documents: 2 of 2 documents (1 code, 1 text)"
    with pytest.raises(CalibrationError, match="too short: 2 documents"):
        tokenize_windows(first, tokenizer, 4000, 16, seed=0, more=lambda: more)


@pytest.mark.parametrize(("written", "tokens"), [("1000", 1000), ("1,000", 1000), ("1k", 1000), ("0.8M", 800_000)])
def test_a_number_of_tokens_may_be_short(written: str, tokens: int) -> None:
    assert TokenCount().convert(written, None, None) == tokens


def test_tokens_may_be_asked_for() -> None:
    arguments = ["convert", str(FIXTURES / "tiny-m2"), "out", "--dry-run", "--window-length", "16"]
    text = CliRunner().invoke(cli, [*arguments, "--calibration-tokens", "1k"], catch_exceptions=False).output
    assert "1,008 tokens in 63 windows of 16," in text
    assert "calibration text: bundled corpus: " in text, "a dry run reads the text as the run does"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--calibration-tokens", "many"], "is no number of tokens"), (["--calibration-tokens", "0"], "is not between"),
    (["--calibration-tokens", "1k", "--windows", "2"], "give one of them"), (["--calibration", "bundled=x"], "is no weight"),
    (["--calibration", "nowhere.jsonl", "--dry-run"], "no such file"), (["--to", "int4", "--calibration-tokens", "1k"], "uses no calibration data"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(cli, ["convert", str(FIXTURES / "tiny-m2"), str(tmp_path / "out"), *arguments])
    assert found.exit_code != 0 and message in found.output + str(found.exception)
    assert not (tmp_path / "out").exists()
