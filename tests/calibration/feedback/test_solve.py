"""A stack of weights solved: better than rounding to nearest, what it says it is, and the same however it is stacked."""

from dataclasses import replace

import pytest
import torch

from m3quant.calibration.feedback.grids import Grid
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.feedback.solve import Solver
from m3quant.quant.integer import int_range
from m3quant.schemes import Scheme
from tests.support.calibration.feedback_cases import SCHEMES, moment, normal, objective

SETTINGS = FeedbackSettings(rounds=2)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_solved_better_than_rounded(name: str) -> None:
    scheme = SCHEMES[name]
    target, second = normal(2, 256, 128, seed=1), moment(2, 128, seed=2)
    found = Solver(target, second, scheme, SETTINGS).solve()
    stored = found.stored
    loss = objective(target, stored.dequantized(), second)
    assert torch.allclose(loss, found.loss.double(), rtol=1e-4)
    assert bool((found.loss <= found.nearest).all())
    assert float(found.loss.sum()) < 0.75 * float(found.nearest.sum())
    if scheme.kind == "int":
        low, high = int_range(scheme)
        assert stored.codes.dtype == torch.int8
        assert int(stored.codes.min()) >= low and int(stored.codes.max()) <= high
        assert torch.equal(stored.scale, stored.scale.bfloat16().float())
        assert tuple(stored.scale.shape) == (2, 256, 128 // (scheme.group_size or 128))
        assert (stored.zero_point is None) == scheme.symmetric
    else:
        assert stored.codes.dtype == torch.float8_e4m3fn
        assert tuple(stored.scale.shape) == ((2, 2, 1) if scheme.block else (2, 256, 1))


@pytest.mark.parametrize("name", ["int4-g64", "int2-g64-asym", "fp8-channel"])
def test_a_weight_is_the_same_alone_and_in_a_stack(name: str) -> None:
    target, second = normal(5, 48, 128, seed=3), moment(5, 128, seed=4)
    whole = Solver(target, second, SCHEMES[name], SETTINGS).solve().stored
    for expert in range(5):
        part = slice(expert, expert + 1)
        alone = Solver(target[part], second[part], SCHEMES[name], SETTINGS).solve().stored
        assert torch.equal(alone.codes.view(torch.uint8), whole.codes[part].view(torch.uint8))
        assert torch.equal(alone.scale, whole.scale[part])


def test_each_part_lowers_the_loss() -> None:
    target, second = normal(2, 64, 128, seed=5), moment(2, 128, seed=6)
    losses = []
    for settings in (
        replace(SETTINGS, rounds=0),
        replace(SETTINGS, refit=False),
        SETTINGS,
        replace(SETTINGS, rounds=6),
    ):
        losses.append(float(Solver(target, second, SCHEMES["int3-g64"], settings).solve().loss.sum()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_two_bits_search_both_ends_of_the_range() -> None:
    """Skewed groups: one factor for both ends keeps the zero point of the full range."""
    weight = torch.exp(normal(1, 64, 128, seed=7))
    scheme, importance = Scheme("int", 2, 64, symmetric=False), torch.ones(1, 128)
    grid = Grid(scheme)
    levels = grid.start(weight, importance, torch.bfloat16, True)
    target = weight.transpose(1, 2)
    wide = levels.columns(grid.groups(128)[None])
    error = float((target - grid.values(grid.codes(target, wide), wide)).square().sum())
    from m3quant.calibration.ranges import fake_quantize, search_range

    single = fake_quantize(weight, scheme, search_range(weight, scheme, importance))
    assert error < float((weight - single).square().sum())


def test_the_same_problem_gives_the_same_bytes() -> None:
    target, second = normal(3, 32, 128, seed=8), moment(3, 128, seed=9)
    first, again = (Solver(target, second, SCHEMES["int4-g64"], SETTINGS).solve().stored for _ in range(2))
    assert torch.equal(first.codes, again.codes) and torch.equal(first.scale, again.scale)
