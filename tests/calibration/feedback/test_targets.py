"""Targets minimise what they say: the error of the source's output, with a ridge to the weight."""

import pytest
import torch

from m3quant.calibration.feedback.targets import targets
from tests.support.calibration.feedback_cases import normal, rows


@pytest.mark.parametrize("ridge", [0.01, 1.0, 100.0])
def test_targets_minimise_the_ridged_output_error(ridge: float) -> None:
    x, gates = rows(2, 200, 32), normal(2, 200, seed=9).square()
    weight = normal(2, 11, 32, seed=8)
    wanted = x @ weight.transpose(1, 2) + 0.3 * x @ normal(2, 32, 11, seed=7) + normal(2, 200, 11, seed=6)
    error = wanted - x @ weight.transpose(1, 2)
    second = (x * gates[..., None]).transpose(1, 2) @ x
    cross = (error * gates[..., None]).transpose(1, 2) @ x
    found, failed = targets(weight, cross, second, torch.full((2,), ridge))
    assert not bool(failed.any())
    wide = [value.double().requires_grad_(name == "t") for name, value in (("t", found), ("w", weight))]
    residual = wanted.double() - x.double() @ wide[0].transpose(1, 2)
    loss = (residual.square() * gates.double()[..., None]).sum() + ridge * (wide[0] - wide[1]).square().sum()
    (slope,) = torch.autograd.grad(loss, wide[0])
    assert float(slope.abs().max()) < 1e-4 * float(cross.abs().max())


def test_without_an_error_the_target_is_the_weight() -> None:
    weight, second = normal(1, 4, 16), torch.eye(16)[None]
    assert torch.equal(targets(weight, torch.zeros(1, 4, 16), second, torch.ones(1))[0], weight)


def test_a_system_that_cannot_be_solved_leaves_the_weight() -> None:
    weight, cross = normal(3, 4, 16), normal(3, 4, 16, seed=1)
    second = torch.eye(16).repeat(3, 1, 1)
    second[1, 0, 0] = -5.0
    second[2, 0, 0] = torch.nan
    found, failed = targets(weight, cross, second, torch.full((3,), 0.5))
    assert failed.tolist() == [False, True, True]
    assert torch.equal(found[1:], weight[1:]) and not torch.equal(found[0], weight[0])
