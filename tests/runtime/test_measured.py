"""Measured speeds: the file says what it measured, its bounds are computed again, and a plan takes only what is near."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from m3quant.cli import cli
from m3quant.engines.device import Gpu
from m3quant.errors import NodeError
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.cost import decode_bound, decode_speed
from m3quant.runtime.fit import Ask, Fit, assess
from m3quant.runtime.hardware import GPUS, Node, parse_node
from m3quant.runtime.measured import MeasuredSet, measured_sets, near, read_measured, share_on
from m3quant.runtime.model import Subject, open_subject
from m3quant.runtime.serving_table import measured_speeds
from tests.support.paths import TESTS

CONFIGS = {
    "minimax_m2": TESTS / "data" / "minimax-m2.7" / "config.json",
    "minimax_m3_vl": TESTS / "data" / "minimax-m3" / "config.json",
}


@pytest.fixture(scope="module")
def subjects() -> dict[str, Subject]:
    return {model_type: open_subject(str(path)) for model_type, path in CONFIGS.items()}


def fit_of(subjects: dict[str, Subject], model_type: str, recipe: str, node: str = "1xH200") -> Fit:
    model = subjects[model_type].converted(build_recipe(named_recipe(recipe)))
    return assess(model, parse_node(node), Ask(kv_dtype="fp8"))


@pytest.mark.parametrize("known", measured_sets(), ids=lambda known: known.recipe)
def test_every_bound_is_the_one_computed(known: MeasuredSet, subjects: dict[str, Subject]) -> None:
    fit = fit_of(subjects, known.model_type, known.recipe, f"{known.gpus}x{known.gpu}")
    assert fit.model.stored_bytes == known.stored_bytes and "vLLM" in known.source and "2026" in known.source
    for requests, context, speed, bound in known.figures:
        assert decode_bound(fit, context, requests) == pytest.approx(bound, abs=0.05)
        assert 0.1 < speed / bound < 1  # a figure above what the bandwidth allows would be of something else
        found = near(fit, context, requests)
        assert found is not None and found.low <= speed / bound <= found.high


def test_a_range_holds_the_figures_near_it_alone(subjects: dict[str, Subject]) -> None:
    fit = fit_of(subjects, "minimax_m2", "awq")
    one = near(fit, 1000, 1)
    assert (
        one is not None and one.count == 6 and len(one.sources) == 3
    )  # 128, 880, 8,048 and 8,192 tokens of awq and of the recipe of equal size
    assert one.low == pytest.approx(132.9 / 624.5) and one.high == pytest.approx(138 / 541.8)
    many = near(fit, 1000, 32)
    assert many is not None and one.high < many.low
    speed = decode_speed(fit, 1000, 1)
    assert speed.low == one.low * speed.bound < speed.high < speed.bound


def test_what_was_not_measured_has_no_range(subjects: dict[str, Subject]) -> None:
    fit = fit_of(subjects, "minimax_m2", "awq")
    assert near(fit, 1000, 200) is None and near(fit, 10**6, 1) is None and near(fit, 1000, 0) is None
    for other in (
        *(
            fit_of(subjects, "minimax_m2", "awq", node)
            for node in ("2xH200", "2xH100", "1xA100", "1xB200", "1x139.8GiB", "cpu:64GiB")
        ),
        fit_of(subjects, "minimax_m2", "fp8"),
        fit_of(subjects, "minimax_m3_vl", "awq"),
        replace(fit, model=replace(fit.model, schemes=frozenset())),
    ):
        assert near(other, 1000, 1) is None
        assert decode_speed(other, 1000, 1).low == 0.0


def test_another_gpu_of_the_chip_gives_a_range_from_both_sides(subjects: dict[str, Subject]) -> None:
    """By hand. H200, 32,704 tokens: 109.2 of 463.1 tokens/s, 23.58 %; the H100's bound is 3.35 / 4.8 of it, 323.2, so 76.2 to 109.2."""
    fit = fit_of(subjects, "minimax_m2", "fit-m2.7-1xh100", "1xH100")
    speed = decode_speed(fit, 32704, 1)
    assert speed.near is not None and (speed.near.count, speed.near.others) == (1, ("H200",))
    assert (speed.near.low, speed.near.high) == pytest.approx((0.2358, 0.3379), abs=1e-4)
    assert (speed.bound, speed.low, speed.high) == pytest.approx((323.2, 76.2, 109.2), abs=0.05)
    assert speed.near.sources == (
        "fit-m2.7-1xh100 on 1xH200, not on 1xH100, which has the same chip (GH100, 132 SMs) and 0.70 times the memory bandwidth: "
        "vLLM 0.33.0, Humming 0.1.19, torch 2.11, 2026-11-29; an H100's recipe on an H200",
    )
    # 128 and 8,192 tokens: 126.0 of 770.5 (16.35 %) and 121.3 of 661.8 (18.33 %, of an H100 26.26 %)
    short = near(fit, 4096, 1)
    assert short is not None and (short.count, len(short.sources)) == (2, 1)
    assert (short.low, short.high) == pytest.approx((0.1635, 0.2626), abs=1e-4)


def test_the_cards_speeds_name_the_gpu_they_are_from(subjects: dict[str, Subject]) -> None:
    """By hand, one request of 4,096 tokens: the least and the most of the test above, of the H100's own bound."""
    fit = fit_of(subjects, "minimax_m2", "fit-m2.7-1xh100", "1xH100")
    one = measured_speeds(fit)[0]
    bound = decode_bound(fit, 4096, 1)
    assert (one.requests, one.context) == (1, 4096)
    assert (one.low / bound, one.high / bound) == pytest.approx((0.1635, 0.2626), abs=1e-4)
    assert all(" on 1xH200, not on 1xH100, " in source for speed in measured_speeds(fit) for source in speed.sources)


def an_h100_set(**changes: Any) -> MeasuredSet:
    known = {
        "model_type": "minimax_m2", "recipe": "fit-m2.7-1xh100", "weights": "int", "stored_bytes": 69_052_198_784, "gpu": "H100", "gpus": 1,
        "source": "an H100", "figures": [(1, 8192, 100.0, 400.0), (1, 128, 90.0, 500.0)],
    }  # fmt: skip
    return MeasuredSet.model_validate(known | changes)


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> list[MeasuredSet]:
    """The sets that `near` sees, to be changed; those that ship with m3quant at first."""
    found = list(measured_sets())
    monkeypatch.setattr("m3quant.runtime.measured.measured_sets", lambda: tuple(found))
    return found


def test_a_slower_memory_bounds_a_faster_one(subjects: dict[str, Subject], sets: list[MeasuredSet]) -> None:
    """By hand: an H100's 100 of 400 is at least the same speed on an H200, 25 % x 3.35 / 4.8 = 17.45 % of its bound, and at most 25 %."""
    sets[:] = [an_h100_set(figures=[(1, 8192, 100.0, 400.0)])]
    found = near(fit_of(subjects, "minimax_m2", "fit-m2.7-1xh100"), 8192, 1)
    assert found is not None and (found.count, found.others) == (1, ("H100",))
    assert (found.low, found.high) == pytest.approx((0.1745, 0.25), abs=1e-4)
    assert found.sources == (
        "fit-m2.7-1xh100 on 1xH100, not on 1xH200, which has the same chip (GH100, 132 SMs) and 1.43 times the memory bandwidth: an H100",
    )


def test_figures_of_the_gpu_itself_come_first(subjects: dict[str, Subject], sets: list[MeasuredSet]) -> None:
    sets.append(an_h100_set())
    fit = fit_of(subjects, "minimax_m2", "fit-m2.7-1xh100", "1xH100")
    own = near(fit, 8192, 1)
    assert own is not None and (own.low, own.high, own.count, own.others) == (90 / 500, 100 / 400, 2, ())
    assert own.sources == ("fit-m2.7-1xh100 on 1xH100: an H100",)
    many = near(fit, 8192, 16)  # of which the H100 has no figure
    assert many is not None and many.others == ("H200",) and many.count == 1
    h200 = near(fit_of(subjects, "minimax_m2", "fit-m2.7-1xh100"), 8192, 1)
    assert h200 is not None and h200.others == () and "an H100" not in h200.sources


def test_as_many_gpus_of_another_name_and_no_other_number(
    subjects: dict[str, Subject], sets: list[MeasuredSet]
) -> None:
    sets[:] = [an_h100_set(gpu="H200", gpus=2)]
    two = near(fit_of(subjects, "minimax_m2", "fit-m2.7-1xh100", "2xH100"), 8192, 1)
    assert two is not None and two.others == ("H200",) and "on 2xH200, not on 2xH100," in two.sources[0]
    assert near(fit_of(subjects, "minimax_m2", "fit-m2.7-1xh100", "1xH100"), 8192, 1) is None


@pytest.mark.parametrize("known", measured_sets(), ids=lambda known: known.recipe)
def test_every_range_is_in_order_and_within_the_bound(known: MeasuredSet, subjects: dict[str, Subject]) -> None:
    for gpu in ("H100", "H200"):
        fit = fit_of(subjects, known.model_type, known.recipe, f"{known.gpus}x{gpu}")
        for requests, context, speed, bound in known.figures:
            found = near(fit, context, requests)
            assert found is not None and 0 < found.low <= speed / bound <= found.high <= 1


def test_gpus_of_no_chip_are_alike_to_none(subjects: dict[str, Subject], sets: list[MeasuredSet]) -> None:
    """Two GPUs whose chip is not known have the same empty name for it."""
    sets[:] = [an_h100_set(gpu="A100")]
    fit = fit_of(subjects, "minimax_m2", "fit-m2.7-1xh100", "1xA100")
    assert near(fit, 8192, 1) is not None
    for gpu in (GPUS["b200"], replace(GPUS["h200"], chip="")):
        assert near(replace(fit, node=Node(1, gpu)), 8192, 1) is None


def gpu_with(bandwidth: float) -> Gpu:
    return Gpu("X", 1, bandwidth, "made up", chip="X")


@given(*[st.floats(0.1, 10)] * 2, *[st.floats(1e-4, 10)] * 3)
def test_a_step_of_any_parts_lies_in_the_range_that_another_gpu_gives(
    measured: float, planned: float, least: float, memory: float, other: float
) -> None:
    """Bandwidths in TB/s. A step: TB that must be read, TB that are read beyond (or as many as slow reading amounts to), seconds of all else."""

    def share(bandwidth: float) -> float:
        return (least / bandwidth) / ((least + memory) / bandwidth + other)

    low, high = share_on(gpu_with(planned), gpu_with(measured), share(measured))
    assert 0 < low <= high <= 1
    assert low * (1 - 1e-9) <= share(planned) <= high * (1 + 1e-9)


def test_the_ends_of_a_range_are_all_memory_and_none() -> None:
    """Halved bandwidth: a share of 0.3 stays or doubles, one of 0.8 ends at the bound; doubled: it stays or is halved; the same: it stays."""
    slow, fast = gpu_with(1e12), gpu_with(2e12)
    assert share_on(slow, fast, 0.3) == (0.3, 0.6) and share_on(slow, fast, 0.8) == (0.8, 1.0)
    assert share_on(fast, slow, 0.3) == (0.15, 0.3) and share_on(slow, slow, 0.3) == (0.3, 0.3)


GOOD = {
    "model_type": "minimax_m2", "recipe": "awq", "weights": "int", "stored_bytes": 1, "gpu": "H200", "gpus": 1, "source": "vLLM", "figures": [[1, 1, 1.0, 2.0]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("document", "key"),
    [
        ({"sets": [GOOD], "version": 2}, "version"),
        ({"sets": [{**GOOD, "version": "0.34"}]}, "sets.0.version"),
        ({"sets": [{**GOOD, "figures": [[0, 1, 1.0, 2.0]]}]}, "sets.0.figures.0.0"),
        ({"sets": [{**GOOD, "figures": [[1, 1, 1.0]]}]}, "sets.0.figures.0.3"),
        ({"sets": [{**GOOD, "figures": []}]}, "sets.0.figures"),
        ({"sets": [{**GOOD, "figures": [[1, 1, 2.1, 2.0]]}]}, "sets.0.figures"),
        ({"sets": [{**GOOD, "gpu": "h200"}]}, "sets.0.gpu"),
        ({"sets": [{**GOOD, "stored_bytes": 0}]}, "sets.0.stored_bytes"),
        ({}, "sets"),
        ([], "the whole"),
    ],
)
def test_a_file_that_is_wrong_is_told_by_its_key(document: Any, key: str, tmp_path: Path) -> None:
    path = tmp_path / "measured.yaml"
    path.write_text(json.dumps({"sets": [GOOD]}))
    assert len(read_measured(path)) == 1
    path.write_text(json.dumps(document))
    with pytest.raises(NodeError, match=f"measured speeds .*, key '{re.escape(key)}': .*bench_gpu_table --yaml"):
        read_measured(path)


def plan(*options: str, to: str = "awq") -> str:
    done = CliRunner().invoke(cli, ["plan", str(CONFIGS["minimax_m2"]), "--to", to, "--kv-dtype", "fp8", *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_plan_says_what_was_measured_and_what_was_not() -> None:
    text = plan("--on", "1xH200", "--context", "60000")
    assert "tokens/s decoding" in text and "measured: awq on 1xH200: vLLM 0.33.0" in text
    assert "as in the 3 figures measured near this" in text and "of the same chip" not in text
    text = plan("--on", "1xH200", "--context", "32704", "--max-num-seqs", "1", to="fit-m2.7-1xh100")
    assert (
        "about 109 tokens/s decoding, 24% of the bandwidth's 463, as in the one figure, so without a spread, measured near this"
        in text
    )
    assert "; about 10.1" in text
    text = plan("--on", "2xH100")
    assert "nothing near this was measured" in text and "at least" in text
    price = json.loads(plan("--on", "1xH200", "--context", "60000", "--json"))["price"]
    low, high = price["measured"]["per_million_output"]["low"], price["measured"]["per_million_output"]["high"]
    assert price["per_million_output_floor"] < low <= high and price["measured"]["figures"] >= 1
    assert price["measured"]["other_gpus"] == []
    assert json.loads(plan("--on", "2xH100", "--json"))["price"]["measured"] is None


def test_plan_says_that_a_range_is_from_another_gpu() -> None:
    """109.2 tokens/s on an H200 at most, 3.35 / 4.8 of it at least: at 3.00 USD an hour, 7.63 to 10.9 USD for a million tokens."""
    asked = ("--on", "1xH100", "--context", "32704")
    text = plan(*asked, to="fit-m2.7-1xh100")
    assert "76 to 109 tokens/s decoding, 24% to 34% of the bandwidth's 323" in text
    assert "by the one figure measured near this on H200, of the same chip; none on H100" in text
    source = "fit-m2.7-1xh100 on 1xH200, not on 1xH100, which has the same chip"
    assert f"  measured: {source}" in text and "; 7.63 to 10.9" in text
    table = plan(*asked, "--all", to="fit-m2.7-1xh100")
    assert " 7.63 - 10.9" in table and f"\nmeasured: {source}" in table and "~ " not in table
    found = json.loads(plan(*asked, "--json", to="fit-m2.7-1xh100"))["price"]["measured"]
    assert found["other_gpus"] == ["H200"] and found["figures"] == 1 and found["sources"][0].startswith(source)
    assert (found["tokens_per_s"]["low"], found["tokens_per_s"]["high"]) == pytest.approx((76.2, 109.2), abs=0.05)
