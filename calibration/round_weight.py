"""One weight, or a stack of them, through fold, range search and rounding: in one kernel where there is one.

`reference` is the plain form; the Triton kernel of `kernels.round_groups` gives the same numbers bit for bit, except for the
order in which a group's errors are summed (tests/calibration/test_kernels.py), and is used on a GPU for groups of 32 to
256 with BF16 scales. Other schemes take the reference there too.
"""

from dataclasses import dataclass

import torch

from m3quant.calibration.ranges import FACTORS, fake_quantize, fused, search_range, weighted_error
from m3quant.schemes import Scheme


@dataclass
class RoundedWeight:
    """acting [E, N, K] float32: as the rounded weight acts on unfolded inputs. shrink [E, N, G]: searched factors.

    before, after: sums of activation-weighted squared rounding errors at full range and at the searched ranges.
    """

    acting: torch.Tensor
    shrink: torch.Tensor | None = None
    before: float = 0.0
    after: float = 0.0


def round_weight(
    weight: torch.Tensor,
    scheme: Scheme,
    column: torch.Tensor,
    row: torch.Tensor | None = None,
    moment: torch.Tensor | None = None,
    shrink: torch.Tensor | None = None,
    *,
    factors: tuple[float, ...] = FACTORS,
    scale_dtype: torch.dtype = torch.bfloat16,
    signed: bool = True,
    errors: bool = True,
    difference: bool = False,
) -> RoundedWeight:
    """Round weight [E, N, K] folded by column ([K], [1, K] or [E, K]) and 1 / row [E, N], for an integer scheme.

    moment ([K], [1, K] or [E, K]): of the folded input, to search ranges by; without it the range is shrink
    [E, N, G] or full. errors: report before and after of a search. difference: acting minus weight instead of acting. On a GPU acting is
    rounded to TF32 for the product that reads it. Column, row, moment and shrink are float32.
    """
    column = column.expand(1, -1) if column.dim() == 1 else column
    moment = moment.expand(1, -1) if moment is not None and moment.dim() == 1 else moment
    if not fused(weight, scheme, scale_dtype):
        found = reference(weight, scheme, column, row, moment, shrink, factors, scale_dtype, signed, errors)
        return RoundedWeight(found.acting - weight, found.shrink, found.before, found.after) if difference else found
    from m3quant.calibration import kernels

    acting, chosen, before, after = kernels.round_groups(
        weight, scheme, column, row, moment, factors, shrink, signed, errors=errors, difference=difference, tf32=True
    )
    assert acting is not None
    sums = [0.0 if e is None else float(e.sum(dtype=torch.float64)) for e in (before, after)]
    return RoundedWeight(acting, chosen, *sums)


def reference(
    weight: torch.Tensor,
    scheme: Scheme,
    column: torch.Tensor,
    row: torch.Tensor | None,
    moment: torch.Tensor | None,
    shrink: torch.Tensor | None,
    factors: tuple[float, ...] = FACTORS,
    scale_dtype: torch.dtype = torch.bfloat16,
    signed: bool = True,
    errors: bool = True,
) -> RoundedWeight:
    """`round_weight` in plain steps; column [1 or E, K], moment [1 or E, K]."""
    column = column[:, None, :]
    folded = weight.float() * column
    if row is not None:
        folded = folded / row[..., None]
    before = after = 0.0
    if moment is not None:
        second = moment.expand(len(weight), -1)
        shrink = search_range(folded, scheme, second, factors, scale_dtype, signed)
    rounded = fake_quantize(folded, scheme, 1.0 if shrink is None else shrink, scale_dtype)
    if moment is not None and errors:
        full = fake_quantize(folded, scheme, scale_dtype=scale_dtype)
        before, after = (
            float(weighted_error(folded, q, second[:, None, :], scheme).sum(dtype=torch.float64))
            for q in (full, rounded)
        )
    acting = rounded if row is None else rounded * row[..., None]
    return RoundedWeight(acting / column, None if moment is None else shrink, before, after)
