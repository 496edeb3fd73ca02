"""Min-max rounding of a BF16 weight straight into the bytes of its shard: one read of the weight, one write of codes.

The same bytes as `formats.compress`, which is the reference, on a CPU in blocks of rows that stay in its cache. What
makes it fast: the largest magnitude of a row or group is an integer maximum over the BF16 bits without their sign (which
finds NaN and Inf too, since those are the largest of all), no float32 copy of a whole weight, and a weight is passed over
once. `gpu_kernels` does the same on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..planning.layout import COMPRESSED_TENSORS, check_divisible
from ..schemes import FP8_BLOCK, Scheme
from .fp8 import E4M3_MAX
from .integer import _SCALE_FLOOR, ZERO_GROUP_SCALE, ensure_finite, int_qparams, int_range, range_qparams
from .packing import pack_bytes, pack_columns

# Elements of one block of rows: its float32 copy and codes fit a core's second-level cache.
BLOCK_ELEMENTS = 1 << 18
INFINITY_BITS = 0x7F80  # BF16 bits of infinity; NaNs are above
MAGNITUDE_BITS = 0x7FFF


def compress_into(weight: Tensor, scheme: Scheme, fmt: str, out: Mapping[str, Tensor], *, name: str = "weight") -> None:
    """Fill `out`, the tensors of `formats.compress(weight, scheme, fmt)` by suffix, preallocated on the CPU; `weight_shape` may be absent.

    For what `layout.one_pass` is true of. weight: BF16 [N, K], contiguous, on the CPU. Raises CheckpointError on NaN or Inf, PlanError as `check_divisible`.
    """
    check_divisible(tuple(weight.shape), scheme, fmt)
    if scheme.kind == "fp8":
        scale = out["weight_scale" if fmt == COMPRESSED_TENSORS else "weight_scale_inv"]
        (_fp8_block if scheme.block else _fp8_channel)(weight, out["weight"], scale, name)
        return
    if scheme.symmetric:
        _symmetric(weight, scheme, out["weight_packed"], out["weight_scale"], name)
    else:
        _asymmetric(weight, scheme, out, name)
    if "weight_shape" in out:
        out["weight_shape"].copy_(torch.tensor(weight.shape))


def _rows_at_once(columns: int) -> int:
    return max(1, BLOCK_ELEMENTS // columns)


def _magnitude_bits(rows: Tensor) -> Tensor:
    """int16 bits of |w| of BF16 rows: they order as the magnitudes do."""
    return rows.view(torch.int16) & MAGNITUDE_BITS


def _as_float(bits: Tensor, weight: Tensor, name: str) -> Tensor:
    """The float32 values of BF16 magnitude bits; CheckpointError if one is NaN or Inf."""
    if bits.numel() and int(bits.max()) >= INFINITY_BITS:
        ensure_finite(weight, name)
    return (bits.to(torch.int32) << 16).view(torch.float32)


def _fp8_scale(largest: Tensor) -> Tensor:
    scale = largest / E4M3_MAX
    return torch.where(scale == 0, ZERO_GROUP_SCALE, scale).clamp_min_(_SCALE_FLOOR)


def _fp8_channel(weight: Tensor, codes: Tensor, scale: Tensor, name: str) -> None:
    step = _rows_at_once(weight.shape[1])
    for first in range(0, weight.shape[0], step):
        rows = weight[first : first + step]
        own = _fp8_scale(_as_float(_magnitude_bits(rows).amax(-1, keepdim=True), weight, name))
        scale[first : first + step] = own
        # No clamp: |w| / scale is at most 448 (1 + 2^-23), which rounds to 448.
        codes[first : first + step] = rows.to(torch.float32).div_(own)


def _fp8_block(weight: Tensor, codes: Tensor, scale: Tensor, name: str) -> None:
    columns = weight.shape[1]
    whole = columns // FP8_BLOCK * FP8_BLOCK
    for band, first in enumerate(range(0, weight.shape[0], FP8_BLOCK)):
        rows = weight[first : first + FP8_BLOCK]
        by_column = _magnitude_bits(rows).amax(0)
        parts = [by_column[:whole].view(-1, FP8_BLOCK).amax(-1)] if whole else []
        if whole < columns:
            parts.append(by_column[whole:].amax(0, keepdim=True))
        own = _fp8_scale(_as_float(torch.cat(parts), weight, name))
        scale[band] = own
        codes[first : first + FP8_BLOCK] = rows.to(torch.float32).div_(own.repeat_interleave(FP8_BLOCK)[:columns])


def _symmetric(weight: Tensor, scheme: Scheme, packed: Tensor, scale: Tensor, name: str) -> None:
    qmin, qmax = int_range(scheme)
    size = scheme.group_size or weight.shape[1]
    for first in range(0, weight.shape[0], step := _rows_at_once(weight.shape[1])):
        rows = weight[first : first + step]
        bits = torch.unflatten(_magnitude_bits(rows), -1, (-1, size)).amax(-1)
        exact = _as_float(bits, weight, name) * 2 / float(qmax - qmin)
        if not bool(torch.isfinite(exact).all()):  # the doubled range left float32: the reference says so
            int_qparams(weight, scheme, name=name)
        exact = torch.where(exact == 0, ZERO_GROUP_SCALE, exact)
        own = exact.to(torch.bfloat16).float().clamp_min_(_SCALE_FLOOR)
        scale[first : first + step] = own
        work = rows.to(torch.float32)
        torch.unflatten(work, -1, (-1, size)).div_(own.unsqueeze(-1))
        _write_codes(work, scheme, packed[first : first + step])


def _asymmetric(weight: Tensor, scheme: Scheme, out: Mapping[str, Tensor], name: str) -> None:
    """Zero points are packed along N, so that those of all blocks are kept until the end: one byte a group."""
    size = scheme.group_size or weight.shape[1]
    zeros = []
    for first in range(0, weight.shape[0], step := _rows_at_once(weight.shape[1])):
        work = weight[first : first + step].to(torch.float32)
        groups = torch.unflatten(work, -1, (-1, size))
        found = range_qparams(groups.amin(-1), groups.amax(-1), scheme, name=name)
        own, zero = found or int_qparams(weight, scheme, name=name)  # which says what is not finite
        assert zero is not None
        out["weight_scale"][first : first + step] = own
        zeros.append(zero)
        groups.div_(own.unsqueeze(-1)).add_(zero.unsqueeze(-1))
        _write_codes(work, scheme, out["weight_packed"][first : first + step])
    out["weight_zero_point"].copy_(pack_columns(torch.cat(zeros), scheme.bits))


def _write_codes(steps: Tensor, scheme: Scheme, packed: Tensor) -> None:
    """Float32 rows in units of their scales, rounded (and overwritten), to their words in `packed`."""
    qmin, qmax = int_range(scheme)
    # A stored scale may be below the exact one by 2^-9 of it, so that w / scale reaches 7.52, or 127.8 for 8 bits.
    codes = steps.clamp_(qmin, qmax).round_().to(torch.int8).view(torch.uint8).add_(1 << (scheme.bits - 1))
    if scheme.bits == 4:  # in place: low nibble of the word's byte in the low byte, high nibble in the high one
        pairs = codes.view(torch.int16)
        packed.view(torch.uint8).copy_(pairs.bitwise_or_(pairs >> 4))
    else:
        packed.view(torch.uint8).copy_(pack_bytes(codes, scheme.bits, overwrite=True))
