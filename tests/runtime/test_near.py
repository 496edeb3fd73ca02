"""What a plan takes from measured speeds: the curve of a checkpoint on a node, how far it is trusted, and another GPU of the same chip."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from m3quant.cli import cli
from m3quant.engines.device import Gpu
from m3quant.runtime.cost import decode_bound, decode_speed, decode_step
from m3quant.runtime.fit import Fit
from m3quant.runtime.hardware import GPUS, Node
from m3quant.runtime.measured import MeasuredSet, measured_sets
from m3quant.runtime.near import GAP, LEAST_SPREAD, SPREAD, Curve, Near, Span, curves, near, share_on, span_of
from m3quant.runtime.serving_table import measured_speeds
from tests.support.paths import ROOT
from tests.support.runtime.speeds import CONFIGS, fit_of


def near_to(fit: Fit, context: int, requests: int) -> Near | None:
    step = decode_step(fit, context, requests)
    return near(fit, context, requests, step.gpu if step else 1.0)


def a_set(*figures: tuple[int, int, float, float], **changes: Any) -> MeasuredSet:
    known = {
        "model_type": "minimax_m2", "recipe": "fit-m2.7-1xh100", "weights": "int", "stored_bytes": 69_052_198_784, "gpu": "H100", "gpus": 1,
        "source": "an H100", "figures": list(figures),
    }  # fmt: skip
    return MeasuredSet.model_validate(known | changes)


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> list[MeasuredSet]:
    """The sets that `near` sees, to be changed; those that ship with m3quant at first."""
    found = list(measured_sets())
    monkeypatch.setattr("m3quant.runtime.near.measured_sets", lambda: tuple(found))
    return found


def curve_of(*steps: tuple[float, float], requests: int = 1) -> Curve:
    """A curve of steps of that many least and measured milliseconds, of 100 tokens."""
    return Curve((a_set(*((requests, 100, requests * 1000 / time, requests * 1000 / least) for least, time in steps)),))


def span(curve: Curve, least_ms: float, context: int = 100, requests: int = 1, spread: float = 1.0) -> Span | None:
    return span_of(curve, context, requests, least_ms / 1000, spread)


def test_a_time_between_two_close_figures_is_interpolated_on_logarithmic_axes() -> None:
    """By hand: halfway from 2 to 4.5 ms (by ratio) is 3, and from 8 to 18 ms is 12; 10 % more or less is the spread."""
    found = span(curve_of((2, 8), (4.5, 18)), 3, spread=1.1)
    assert found is not None and (found.count, found.close) == (2, True)
    assert (found.low * 1000, found.high * 1000) == pytest.approx((12 / 1.1, 12 * 1.1))
    at_one = span(curve_of((2, 8), (4.5, 18)), 4.5)
    assert at_one is not None and (at_one.low, at_one.high) == pytest.approx((0.018, 0.018))


def test_a_time_between_two_far_figures_grows_by_no_larger_ratio_than_what_is_read() -> None:
    """By hand, 10 % of spread: half as much again as by the first takes at most 12 ms, half of what the second reads at least 9 of its 18."""
    curve = curve_of((2, 8), (6.1, 18))
    for least, low, high in ((3, 18 * 3 / 6.1, 12), (3.05, 9, 12.2), (2.2, 8, 8.8), (5.5, 18 * 5.5 / 6.1, 18)):
        found = span(curve, least, spread=1.1)
        assert found is not None and (found.count, found.close) == (2, False)
        assert (found.low * 1000, found.high * 1000) == pytest.approx((low / 1.1, high * 1.1))


def test_a_range_in_a_gap_meets_the_figures_at_its_ends() -> None:
    """One token more must not make a range another: 0.1 % beyond a figure or before it, the range is its time within 0.1 %. Also of figures
    that a curve of such times cannot give: a shorter time for more, and one that grows by more than what is read."""
    for first, last in ((8, 18), (8, 7), (8, 40)):
        curve = curve_of((2, first), (7, last))
        near_first, near_last = span(curve, 2.002), span(curve, 6.993)
        assert near_first is not None and near_last is not None
        if (first, last) == (8, 18):
            assert (near_first.low * 1000, near_first.high * 1000) == pytest.approx((8, 8), rel=1.1e-3)
            assert (near_last.low * 1000, near_last.high * 1000) == pytest.approx((18, 18), rel=1.1e-3)
        assert near_first.low <= near_first.high and near_last.low <= near_last.high


@pytest.mark.parametrize("curve", curves(), ids=lambda curve: curve.known.recipe)
def test_figures_that_are_left_out_lie_in_the_ranges_of_far_ones(curve: Curve) -> None:
    """The evidence for what is said of wide gaps: all pairs of a curve's figures that are far apart, and all figures between."""
    points = curve.points
    for below in points:
        for above in (point for point in points if point[0] > GAP * below[0]):
            pair = curve_of(*((least * 1000, time * 1000) for least, time in (below, above)))
            for least, time in (point for point in points if below[0] < point[0] < above[0]):
                found = span(pair, least * 1000, spread=curve.spread)
                assert found is not None and found.low <= time <= found.high


def test_beyond_the_figures_a_time_is_between_the_same_and_as_much_as_is_read() -> None:
    """By hand: 20 % less than the first is read in 6.4 to 8 ms; half as much again as by the last in 18 to 27 ms."""
    curve = curve_of((2, 8), (4.5, 18))
    for least, low, high in ((1.6, 6.4, 8), (6.75, 18, 27)):
        found = span(curve, least)
        assert found is not None and (found.count, found.close) == (1, False)
        assert (found.low * 1000, found.high * 1000) == pytest.approx((low, high))
    assert span(curve, 0.99) is None and span(curve, 1.01) is not None
    assert span(curve, 9.01) is None and span(curve, 8.99) is not None


def test_more_requests_or_longer_ones_than_were_measured_are_near_up_to_twice() -> None:
    """By hand: three requests where two were measured may take half as long again."""
    curve = curve_of((2, 8), (4.5, 18), requests=2)
    found = span(curve, 3, requests=3)
    assert found is not None and not found.close
    assert (found.low * 1000, found.high * 1000) == pytest.approx((12, 18))
    assert span(curve, 3, requests=4) is not None and span(curve, 3, requests=5) is None
    assert span(curve, 3, context=16_384) is not None and span(curve, 3, context=16_385) is None


def test_no_time_is_less_than_the_least() -> None:
    found = span(curve_of((2, 2.02), (4.5, 4.6)), 3, spread=1.1)
    assert found is not None and found.low == 0.003 < found.high


@given(st.floats(0, 20), st.floats(1, 10), st.floats(1.01, GAP), st.floats(0, 1))
def test_a_step_of_fixed_time_and_reading_is_interpolated_within_four_percent(
    fixed: float, factor: float, gap: float, part: float
) -> None:
    """Seconds in units of the first figure's least time; a step takes `fixed`, and `factor` times as long as memory needs."""

    def time(least: float) -> float:
        return fixed + factor * least

    found = span(curve_of((1, time(1)), (gap, time(gap))), least := gap**part)
    assert found is not None and found.low * 1000 == pytest.approx(time(least), rel=0.04)


@given(st.floats(0, 20), st.floats(1, 10), st.floats(0.51, 1.99), st.floats(1, 20))
def test_outside_and_in_gaps_such_a_step_lies_in_the_range(
    fixed: float, factor: float, beyond: float, gap: float
) -> None:
    def time(least: float) -> float:
        return fixed + factor * least

    curve = curve_of((1, time(1)), (gap, time(gap)))
    for least in (min(1.0, beyond), gap * max(1.0, beyond), math.sqrt(gap)):
        found = span(curve, least, spread=1.04)
        assert (
            found is not None
            and found.low * 1000 <= time(least) * (1 + 1e-9)
            and time(least) <= found.high * 1000 * (1 + 1e-9)
        )


@pytest.mark.parametrize("curve", curves(), ids=lambda curve: curve.known.recipe)
def test_every_figure_is_within_its_curves_spread_of_the_others(curve: Curve) -> None:
    """The evidence for SPREAD, and that a set measured again later joins the curve that it belongs to."""
    assert all(1 <= error <= SPREAD for error in curve.errors)
    assert LEAST_SPREAD <= curve.spread <= SPREAD
    assert all(error <= curve.spread for error in curve.errors)


def test_the_page_says_the_spreads() -> None:
    page = " ".join((ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split())
    words = {
        "fit-m3-1xh200": "(M3 {}",
        "fit-m3-2xh100": "on two GPUs, {}",
        "fp8": "M2.7's FP8 {}",
        "awq": "and {} where they are few (M2.7's `awq`)",
    }
    for curve in curves():
        recipe = curve.known.recipe
        said = words.get(recipe, f"`{recipe}` {{}}").format(f"{(curve.spread - 1) * 100:.0f} %")
        assert said in page, said


def test_a_curve_of_few_figures_has_the_widest_spread() -> None:
    assert curve_of((1, 5), (2, 6), (3, 7), (4, 8)).spread == SPREAD  # two have others on both sides
    assert curve_of((1, 5), (2, 6), (3, 7), (4, 8), (5, 9)).spread == LEAST_SPREAD
    assert curve_of((1, 5), (2, 7.2), (3, 7), (4, 8), (5, 9)).spread > 1.1


def test_the_spread_of_a_curve_is_of_its_recipe_alone(sets: list[MeasuredSet]) -> None:
    fit = fit_of("minimax_m3_vl", "fit-m3-1xh200")
    (curve,) = (curve for curve in curves() if curve.known.recipe == "fit-m3-1xh200")
    found = near_to(fit, 4096, 1)
    assert found is not None and found.high / found.low == pytest.approx(curve.spread**2) and curve.spread < 1.06
    for factor, high in ((1.2, SPREAD), (1 / 1.2, SPREAD), (1.3, None), (1 / 1.3, None)):
        sets[:] = [one.model_copy(update={"stored_bytes": int(fit.model.stored_bytes * factor)}) for one in curve.sets]
        wider = near_to(fit, 4096, 1)
        assert (wider is None) == (high is None)
        assert wider is None or wider.high / wider.low == pytest.approx(SPREAD**2)


def test_a_plans_range_is_that_of_its_step_whatever_makes_it_as_long() -> None:
    """Contexts and numbers of requests that were never measured: M3 on two H200s reads as much as where 16 requests of 8,048 decode at 1,002."""
    fit = fit_of("minimax_m3_vl", "fit-m3-2xh100", "2xH200")
    for context, requests in ((4096, 17), (32_768, 12), (65_536, 8)):
        step, speed = decode_step(fit, context, requests), decode_speed(fit, context, requests)
        assert step is not None and 5.5e-3 < step.gpu < 7.5e-3
        assert speed.low < requests / 15.97e-3 < speed.high and speed.high < 1.13 * speed.low


def test_what_was_not_measured_has_no_range() -> None:
    fit = fit_of("minimax_m2", "awq")
    assert near_to(fit, 1000, 200) is None and near_to(fit, 10**6, 1) is None and near_to(fit, 1000, 0) is None
    whole = replace(fit.setup.split, expert_parallel=True)
    for other in (
        *(
            fit_of("minimax_m2", "awq", node)
            for node in ("2xH200", "2xH100", "1xA100", "1xB200", "1x139.8GiB", "cpu:64GiB")
        ),
        fit_of("minimax_m2", "fp8"),
        fit_of("minimax_m3_vl", "awq"),
        replace(fit, model=replace(fit.model, schemes=frozenset())),
        replace(fit, setup=replace(fit.setup, split=whole)),
        replace(fit, setup=replace(fit.setup, split=replace(fit.setup.split, tp=2))),
    ):
        assert near_to(other, 1000, 1) is None
        assert decode_speed(other, 1000, 1).low == 0.0


def test_another_gpu_of_the_chip_gives_a_range_from_both_sides(sets: list[MeasuredSet]) -> None:
    """By hand. An H200's 109.2 of 463.1 tokens/s are 23.58 %; with 15 % of spread 20.50 to 27.12 %. The H100's bound is 3.35 / 4.8 of it,
    323.2: at least 66.3 and, as fast as an H200 at best, 125.6."""
    sets[:] = [a_set((1, 32_704, 109.2, 463.1), gpu="H200", source="an H200")]
    fit = fit_of("minimax_m2", "fit-m2.7-1xh100", "1xH100")
    speed = decode_speed(fit, 32_704, 1)
    assert speed.near is not None and (speed.near.count, speed.near.others) == (1, ("H200",))
    assert (speed.near.low, speed.near.high) == pytest.approx((0.2050, 0.3885), abs=1e-4)
    assert (speed.bound, speed.low, speed.high) == pytest.approx((323.2, 66.3, 125.6), abs=0.1)
    assert speed.near.sources == (
        "fit-m2.7-1xh100 on 1xH200, not on 1xH100, which has the same chip (GH100, 132 SMs) and 0.70 times the memory bandwidth: an H200",
    )


def test_a_slower_memory_bounds_a_faster_one(sets: list[MeasuredSet]) -> None:
    """By hand: an H100's 97 of 323.2 tokens/s, 30.01 %, are on an H200 at least the same speed, 3.35 / 4.8 of the share, 20.95 %, and at most the
    same share; 15 % of spread."""
    sets[:] = [a_set((1, 32_704, 97, 323.2))]
    found = near_to(fit_of("minimax_m2", "fit-m2.7-1xh100"), 32_704, 1)
    assert found is not None and (found.count, found.others) == (1, ("H100",))
    assert (found.low, found.high) == pytest.approx((0.2095 / 1.15, 0.3001 * 1.15), abs=1e-4)


def test_figures_of_the_gpu_itself_come_first(sets: list[MeasuredSet]) -> None:
    fit = fit_of("minimax_m2", "fit-m2.7-1xh100", "1xH100")
    bound = decode_bound(fit, 8192, 1)
    sets.append(a_set((1, 8192, 0.2 * bound, bound)))
    own = near_to(fit, 8192, 1)
    assert own is not None and (own.low, own.high) == pytest.approx((0.2 / 1.15, 0.2 * 1.15))
    assert (own.count, own.others, own.sources) == (1, (), ("fit-m2.7-1xh100 on 1xH100: an H100",))
    many = near_to(fit, 8192, 8)  # of which the H100 has no figure
    assert many is not None and many.others == ("H200",) and many.count == 2
    h200 = near_to(fit_of("minimax_m2", "fit-m2.7-1xh100"), 8192, 1)
    assert h200 is not None and h200.others == () and "an H100" not in h200.sources


def test_a_close_curve_comes_before_one_that_ends_there(sets: list[MeasuredSet]) -> None:
    fit = fit_of("minimax_m2", "fit-m2.7-1xh100", "1xH100")
    bound = decode_bound(fit, 8192, 1)
    sets[:] = [
        a_set((1, 8192, 0.2 * bound, bound)),
        a_set((1, 128, 0.5 * bound, 0.99 * bound), recipe="int3", source="short"),
    ]
    found = near_to(fit, 8192, 1)
    assert found is not None and found.sources == ("fit-m2.7-1xh100 on 1xH100: an H100",)
    sets[:] = sets[1:]
    found = near_to(fit, 8192, 1)
    assert found is not None and found.sources == ("int3 on 1xH100: short",)


def test_the_plans_own_recipe_comes_before_another(sets: list[MeasuredSet]) -> None:
    """Where both interpolate and where neither does; one that interpolates comes before the own that does not."""
    fit = fit_of("minimax_m2", "fit-m2.7-1xh100", "1xH100")
    bound = decode_bound(fit, 8192, 1)
    bounds = {"close": (0.9 * bound, 1.1 * bound), "far": (1.1 * bound, 1.2 * bound)}

    def sources(own: str, other: str) -> tuple[str, ...]:
        both = (("own", own, 69_052_198_784), ("int3", other, 75_000_000_000))
        sets[:] = [
            a_set(*((1, 8192, 0.2 * at, at) for at in bounds[where]), recipe=name, source=name, stored_bytes=size)
            for name, where, size in both
        ]
        found = near_to(fit, 8192, 1)
        assert found is not None
        return tuple(source.rpartition(" ")[2] for source in found.sources)

    assert sources("close", "close") == sources("far", "far") == sources("close", "far") == ("own",)
    assert sources("far", "close") == ("int3",)


def test_sets_of_one_recipe_and_node_are_one_curve(sets: list[MeasuredSet]) -> None:
    sets[:] = [a_set((1, 128, 90, 500)), a_set((1, 128, 90, 500), gpus=2), a_set((4, 128, 200, 900), source="later")]
    one, two = curves()
    assert len(one.points) == 2 and one.most == 4 and one.longest == 8192 and len(two.points) == 1


def test_as_many_gpus_of_another_name_and_no_other_number(sets: list[MeasuredSet]) -> None:
    two = fit_of("minimax_m2", "fit-m2.7-1xh100", "2xH100")
    bound = decode_bound(two, 8192, 1)
    sets[:] = [a_set((1, 8192, 0.2 * bound, bound), gpu="H200", gpus=2)]
    found = near_to(two, 8192, 1)
    assert found is not None and found.others == ("H200",) and "on 2xH200, not on 2xH100," in found.sources[0]
    assert near_to(fit_of("minimax_m2", "fit-m2.7-1xh100", "1xH100"), 8192, 1) is None


@pytest.mark.parametrize("known", measured_sets(), ids=lambda known: known.recipe)
def test_every_range_is_in_order_and_within_the_bound(known: MeasuredSet) -> None:
    """On the GPU that was measured, and on the other of its chip, whose share may be all that lies between."""
    for gpu in ("H100", "H200"):
        fit = fit_of(known.model_type, known.recipe, f"{known.gpus}x{gpu}")
        for requests, context, speed, bound in known.figures:
            found = near_to(fit, context, requests)
            assert found is not None and 0 < found.low <= speed / bound <= found.high <= 1


def test_gpus_of_no_chip_are_alike_to_none(sets: list[MeasuredSet]) -> None:
    """Two GPUs whose chip is not known have the same empty name for it."""
    fit = fit_of("minimax_m2", "fit-m2.7-1xh100", "1xA100")
    bound = decode_bound(fit, 8192, 1)
    sets[:] = [a_set((1, 8192, 0.2 * bound, bound), gpu="A100")]
    assert near_to(fit, 8192, 1) is not None
    for gpu in (GPUS["b200"], replace(GPUS["h200"], chip="")):
        assert near_to(replace(fit, node=Node(1, gpu)), 8192, 1) is None


def test_the_cards_speeds_name_the_gpu_they_are_from() -> None:
    fit = fit_of("minimax_m2", "fit-m2.7-1xh100", "1xH100")
    one, speed = measured_speeds(fit)[0], decode_speed(fit, 4096, 1)
    assert (one.requests, one.context, one.low, one.high) == (1, 4096, speed.low, speed.high) and one.low > 0
    assert all(" on 1xH200, not on 1xH100, " in source for speed in measured_speeds(fit) for source in speed.sources)


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


def plan(*options: str, to: str = "awq") -> str:
    done = CliRunner().invoke(cli, ["plan", str(CONFIGS["minimax_m2"]), "--to", to, "--kv-dtype", "fp8", *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_plan_says_what_was_measured_and_what_was_not() -> None:
    text = plan("--on", "1xH200", "--context", "60000")
    assert "tokens/s decoding" in text and "measured: fit-m2.7-1xh200 on 1xH200: vLLM 0.33.0" in text
    assert "by 2 figures measured near this\n" in text and "of the same chip" not in text
    text = plan("--on", "2xH100")
    assert "nothing near this was measured" in text and "at least" in text
    price = json.loads(plan("--on", "1xH200", "--context", "60000", "--json"))["price"]
    low, high = price["measured"]["per_million_output"]["low"], price["measured"]["per_million_output"]["high"]
    assert price["per_million_output_floor"] < low < high and price["measured"]["figures"] == 2
    assert price["measured"]["other_gpus"] == []
    assert json.loads(plan("--on", "2xH100", "--json"))["price"]["measured"] is None


def test_plan_says_that_a_range_is_from_another_gpu(sets: list[MeasuredSet]) -> None:
    """By hand: 66.3 to 125.6 tokens/s (above); at 3.00 USD an hour 12.58 to 6.64 USD for a million tokens."""
    sets[:] = [a_set((1, 32_704, 109.2, 463.1), gpu="H200", source="an H200")]
    asked = ("--on", "1xH100", "--context", "32704")
    text = plan(*asked, to="fit-m2.7-1xh100")
    assert "66 to 126 tokens/s decoding, 21% to 39% of the bandwidth's 323" in text
    assert "by one figure measured near this on H200, of the same chip; none on H100" in text
    source = "fit-m2.7-1xh100 on 1xH200, not on 1xH100, which has the same chip"
    assert f"  measured: {source}" in text and "; 6.64 to 12.58 per million output tokens" in text
    table = plan(*asked, "--all", to="fit-m2.7-1xh100")
    assert " 6.64 - 12.58" in table and f"\nmeasured: {source}" in table
    found = json.loads(plan(*asked, "--json", to="fit-m2.7-1xh100"))["price"]["measured"]
    assert found["other_gpus"] == ["H200"] and found["figures"] == 1 and found["sources"][0].startswith(source)
    assert (found["tokens_per_s"]["low"], found["tokens_per_s"]["high"]) == pytest.approx((66.3, 125.6), abs=0.1)
