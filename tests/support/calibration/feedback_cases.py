"""Random problems for the tests of feedback, and plain float64 forms of what is tested."""

from collections.abc import Sequence

import torch

from m3quant.calibration.feedback.grids import Grid, Levels
from m3quant.calibration.feedback.moments import Moments, MomentSum, halves_of
from m3quant.schemes import Scheme

SCHEMES = {
    **{f"int{bits}-g64": Scheme("int", bits, 64) for bits in range(2, 9)},
    **{f"int{bits}-g64-asym": Scheme("int", bits, 64, symmetric=False) for bits in (2, 3, 4, 8)},
    "int4-channel": Scheme("int", 4),
    "int8-channel": Scheme("int", 8),
    "int3-channel-asym": Scheme("int", 3, symmetric=False),
    "fp8-channel": Scheme("fp8", 8),
    "fp8-block": Scheme("fp8", 8, block=True),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(experts: int, count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs [E, n, K] whose channels differ in size."""
    mix = normal(experts, width, width, seed=seed) / width**0.5 + 0.5 * torch.eye(width)
    return (
        normal(experts, count, width, seed=seed + 1) @ mix * torch.exp(0.5 * normal(experts, 1, width, seed=seed + 2))
    )


def moment(experts: int, width: int, seed: int = 0, damping: float = 0.05) -> torch.Tensor:
    """A second moment [E, K, K] float32, positive definite."""
    x = rows(experts, 3 * width, width, seed)
    second = x.transpose(1, 2) @ x / x.shape[1]
    second.diagonal(dim1=1, dim2=2).add_(damping * second.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
    return second


def moments_of(x: torch.Tensor, error: torch.Tensor, weight: torch.Tensor, half: torch.Tensor) -> Moments:
    """Of one unit; half: [n] bool, True for rows of the second."""
    order = torch.argsort(half.int(), stable=True)
    total = MomentSum(1, x.shape[1], error.shape[1], "cpu")
    total.add(x[order], error[order], weight[order], halves_of(0, len(x), int((~half).sum())))
    return total.total()


def stacked(parts: Sequence[Moments]) -> Moments:
    """Moments of several units."""
    sums = [torch.cat([getattr(part, name) for part in parts], 1) for name in ("second", "cross", "mass", "squares")]
    return Moments(*sums, torch.cat([part.dropped for part in parts]))


def levels_in_float64(grid: Grid, weight: torch.Tensor, importance: torch.Tensor) -> Levels:
    levels = grid.start(weight, importance, torch.bfloat16, True)
    return Levels(levels.scale.double(), None if levels.zero is None else levels.zero.double())


def objective(target: torch.Tensor, values: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(t - q) H (t - q)^T of every row [E, N], float64."""
    difference = target.double() - values.double()
    return ((difference @ second.double()) * difference).sum(-1)


def plain_gptq(
    weight: torch.Tensor, second: torch.Tensor, order: list[int], grid: Grid, levels: Levels
) -> torch.Tensor:
    """Codes [N, K] of one weight as the paper has it: the inverse's Cholesky factor, errors spread to later columns."""
    width = len(order)
    inverse = torch.linalg.inv(second[order][:, order].double())
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, codes = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    groups = grid.groups(width)
    for step, column in enumerate(order):
        level = Levels(levels.scale[0, groups[column]], None if levels.zero is None else levels.zero[0, groups[column]])
        codes[:, column] = grid.codes(left[:, column], level)
        error = (left[:, column] - grid.values(codes[:, column], level)) / factor[step, step]
        for later in range(step + 1, width):
            left[:, order[later]] -= error * factor[step, later]
    return codes
