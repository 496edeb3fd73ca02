"""A chunk of GLU units computed as batched products over padded rows, without a loop over experts: the GPU's path.

Units have unequal numbers of rows. They are cut into blocks of `WIDTH` rows per unit; a block holds the units
that still have rows, padded to the longest of them, so that a unit with ten times the rows costs ten blocks of one unit
rather than padding for all. Products read float32 as TF32 (10 bits of mantissa); BF16 activations and weights are
exact in it, rounded weights and gated activations are rounded to it beforehand, to nearest. docs/speed_awq.md bounds
what that does to a loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from m3quant.calibration.ops import gated
from m3quant.calibration.precision import tf32
from m3quant.families.spec import Activation

WIDTH = 256  # rows of a unit in a block, at least: fewer pad less, and feed the tensor cores worse
_BLOCK_ROWS = 1 << 15  # and more of them while there are few units

Rows = Sequence[tuple[torch.Tensor, torch.Tensor]]  # per unit: row numbers into h [n] int64, gate weights [n] float32


def batched_on(tensor: torch.Tensor) -> bool:
    """Whether feed-forward blocks over this tensor are computed in batches, by kernels."""
    return tensor.is_cuda


@dataclass(frozen=True)
class Block:
    """Rows of some units of a chunk. units: their slots, None for all; tokens, gates [u, n], gate 0 in padding.

    kept [m]: which of the u * n rows are not padding; pairs [m]: their positions among the chunk's rows.
    """

    units: torch.Tensor | None
    tokens: torch.Tensor
    gates: torch.Tensor
    kept: torch.Tensor
    pairs: torch.Tensor

    def of(self, stack: torch.Tensor) -> torch.Tensor:
        """The block's matrices of a stack [e, N, K], float32."""
        part = stack if self.units is None else stack[self.units]
        return part if part.dtype == torch.float32 else part.float()


def row_blocks(rows: Rows, width: int = WIDTH) -> list[Block]:
    """Cut the rows of a chunk's units (at least one) into blocks; units without rows are in none."""
    width = max(width, _BLOCK_ROWS // len(rows))
    device = rows[0][0].device
    sizes = [len(tokens) for tokens, _ in rows]
    flat_tokens, flat_gates = torch.cat([t for t, _ in rows]), torch.cat([g for _, g in rows])
    length = torch.tensor(sizes, device=device)
    first = length.cumsum(0) - length
    blocks = []
    for start in range(0, max(sizes), width):
        active = [slot for slot, size in enumerate(sizes) if size > start]
        longest = min(width, max(sizes[slot] for slot in active) - start)
        units = None if len(active) == len(sizes) else torch.tensor(active, device=device)
        own, begin = (length, first) if units is None else (length[units], first[units])
        offset = start + torch.arange(longest, device=device)
        real = offset < own[:, None]
        pairs = torch.where(real, begin[:, None] + offset, 0)
        gates = torch.where(real, flat_gates[pairs], 0.0)
        kept = real.flatten().nonzero()[:, 0]
        blocks.append(Block(units, flat_tokens[pairs], gates, kept, pairs.flatten()[kept]))
    return blocks


def times(x: torch.Tensor, weight: torch.Tensor, exact: bool = False) -> torch.Tensor:
    """x [u, n, K] times weight [u, N, K] transposed, float32 -> [u, n, N]. exact: in float32 on a GPU too."""
    if exact:
        return torch.bmm(x, weight.transpose(1, 2))
    with tf32():
        return torch.bmm(x, weight.transpose(1, 2))


def gated_rows(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: Activation, exact: bool = False
) -> torch.Tensor:
    """What the down-projections read: x [u, n, H], gate and up [u, I, H] -> [u, n, I] float32, exact in TF32 on a GPU."""
    g, u = times(x, gate, exact), times(x, up, exact)
    if not batched_on(g):
        return gated(g, u, act)
    from m3quant.calibration import kernels

    return kernels.gate_rows(g, u, act)


class PairSum:
    """Sums weighted outputs of units over the tokens of a sample in one order, however the units are chunked.

    A scatter-add would be shorter and differ from run to run. Holds one float32 row per (token, unit) pair, which
    every pass over the units overwrites.
    """

    def __init__(self, rows: Rows, h: torch.Tensor) -> None:
        device, (tokens, width) = h.device, h.shape
        flat = torch.cat([t for t, _ in rows])
        self._outputs = torch.zeros(len(flat) + 1, width, device=device)  # the last row is what absent pairs add
        order = torch.argsort(flat, stable=True)
        count = torch.bincount(flat, minlength=tokens)
        rank = torch.arange(len(flat), device=device) - (count.cumsum(0) - count)[flat[order]]
        most = int(count.max()) if len(flat) else 0
        self._position = torch.full((most, tokens), len(flat), device=device)
        self._position[rank, flat[order]] = order

    def put(self, first: int, outputs: torch.Tensor) -> None:
        """Store a chunk's outputs [m, H], already times their gates; first: where the chunk's pairs begin."""
        self._outputs[first : first + len(outputs)] = outputs

    def total(self) -> torch.Tensor:
        out = self._outputs.new_zeros(self._position.shape[1], self._outputs.shape[1])
        for positions in self._position:
            out += self._outputs[positions]
        return out
