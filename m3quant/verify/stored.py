"""What is wrong with stored tensors by themselves: NaN, Inf, or a zero scale. By bit patterns, in pieces, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..checkpoint import TensorInfo
from ..planning.engine_kept import PASSED_THROUGH
from ..planning.unit import Unit

PIECE_BYTES = 16 * 2**20
_SCALE_LEAVES = ("weight_scale", "weight_scale_inv", "scales")


@dataclass(frozen=True)
class _Float:
    """How a floating point number lies in memory. It is NaN or Inf where `bits & mask == special`."""

    view: str  # NumPy's name of the unsigned integer of its width
    mask: int
    special: int
    sign: int
    infinite: bool = True  # whether the format has infinities


_FLOATS = {
    "F64": _Float("<u8", 0x7FF << 52, 0x7FF << 52, 1 << 63),
    "F32": _Float("<u4", 0xFF << 23, 0xFF << 23, 1 << 31),
    "F16": _Float("<u2", 0x1F << 10, 0x1F << 10, 1 << 15),
    "BF16": _Float("<u2", 0xFF << 7, 0xFF << 7, 1 << 15),
    "F8_E5M2": _Float("u1", 0x1F << 2, 0x1F << 2, 1 << 7),
    "F8_E4M3": _Float("u1", 0x7F, 0x7F, 1 << 7, infinite=False),  # OCP's E4M3: one NaN per sign
    "F8_E5M2FNUZ": _Float("u1", 0xFF, 0x80, 0, infinite=False),  # the pattern of -0 is the only NaN
    "F8_E4M3FNUZ": _Float("u1", 0xFF, 0x80, 0, infinite=False),
}


class Stored(Protocol):
    """Tensors that can be read: a checkpoint, or one shard of it (`one_shard`)."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def peek(self, ranges: Iterable[tuple[TensorInfo, int, memoryview]]) -> None: ...


def unit_stored_problems(unit: Unit, converted: Stored) -> Iterator[str]:
    """A sentence per tensor of the unit that holds what no weight may. Tensors whose meaning is unknown are left alone."""
    for planned in unit.tensors:
        if planned.role.kind in PASSED_THROUGH:
            continue
        for output in planned.outputs:
            if (info := converted.tensors.get(output.name)) is not None:
                yield from stored_problems(converted, info, dead_allowed=planned.role.kind == "router_bias")


def stored_problems(checkpoint: Stored, info: TensorInfo, dead_allowed: bool = False) -> Iterator[str]:
    """What is wrong with one tensor. dead_allowed: -inf stands for an expert that is switched off, and is no fault."""
    form = _FLOATS.get(info.dtype)
    if form is None:
        return
    is_scale = info.name.rpartition(".")[2] in _SCALE_LEAVES and info.dtype != "F8_E4M3"
    zero = False
    for bits in _pieces(checkpoint, info, form):
        special = bits & form.mask == form.special
        if dead_allowed:
            special &= bits != (form.special | form.sign)
        if special.any():
            yield f"tensor '{info.name}' holds NaN{' or Inf' if form.infinite else ''}"
            return
        zero = zero or (is_scale and not (bits & ~np.array(form.sign, bits.dtype)).all())
    if zero:
        yield f"scale '{info.name}' holds a zero"


def _pieces(checkpoint: Stored, info: TensorInfo, form: _Float) -> Iterator[np.ndarray]:
    """The tensor's numbers as unsigned integers, at most PIECE_BYTES at a time."""
    buffer = np.empty(min(PIECE_BYTES, info.nbytes), np.uint8)
    for begin in range(0, info.nbytes, PIECE_BYTES):
        piece = buffer[: min(PIECE_BYTES, info.nbytes - begin)]
        checkpoint.peek([(info, begin, piece.data)])
        yield piece.view(form.view)
