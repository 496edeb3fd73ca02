# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernel of the refit's small systems: b_g H b_h^T of every row of a weight, without the intermediate results in memory.

By products of whole matrices (`refit.plain_gram`) each group's H b^T is written and read again, [E, K, N] for every group.
Points are small integers, exact in BF16; H is rounded to BF16, which moves a sum over 128 x 128 of its entries by less than 1e-4
of itself. Sums are in float32.
"""

import torch
import triton
import triton.language as tl

_TILE = 64
_WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def _gram(points, second, out, rows, GROUPS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr):
    """One group against it and every earlier one, TILE rows of one expert's weight."""
    expert, group = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[None, :]
    line = tl.arange(0, SIZE)
    columns = GROUPS * SIZE
    points += expert * columns * rows
    second += (expert * columns + group * SIZE) * columns
    out += (expert * rows + row) * GROUPS * GROUPS
    own = tl.load(points + (group * SIZE + line)[:, None] * rows + row[None, :], mask=inside, other=0.0).to(tl.float32)
    for other in range(0, group + 1):
        block = tl.load(second + line[:, None] * columns + other * SIZE + line[None, :])
        theirs = tl.load(points + (other * SIZE + line)[:, None] * rows + row[None, :], mask=inside, other=0.0)
        value = tl.sum(tl.dot(block, theirs) * own, 0)
        tl.store(out + group * GROUPS + other, value, mask=row < rows)
        tl.store(out + other * GROUPS + group, value, mask=row < rows)


def gram(points: torch.Tensor, second: torch.Tensor, size: int) -> torch.Tensor:
    """`refit.plain_gram`: points [E, K, N], second [E, K, K] -> [E, N, G, G] float32, G = K / size; size 32, 64 or 128."""
    experts, columns, rows = points.shape
    count = columns // size
    out = torch.empty(experts, rows, count, count, dtype=torch.float32, device=points.device)
    grid = (triton.cdiv(rows, _TILE), count, experts)
    narrow = torch.bfloat16 if points.is_cuda else torch.float32  # Triton's interpreter has no products in BF16
    _gram[grid](
        points.to(narrow).contiguous(), second.to(narrow).contiguous(), out, rows,
        GROUPS=count, SIZE=size, TILE=_TILE, num_warps=_WARPS,
    )  # fmt: skip
    return out
