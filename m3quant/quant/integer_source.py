"""Integer weights of a source back to BF16 or float32: compressed-tensors' pack-quantized and AutoAWQ's gemm.

(code - zero point) * scale in float32, rounded once. AutoAWQ's own kernels form the product in float16, which differs by half a unit of that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..planning.integer_kinds import layout_of
from ..planning.layout import AUTOAWQ, scale_shape
from ..schemes import Scheme
from .dequantize import BAND_ELEMENTS, target_of, too_large
from .integer import ensure_finite
from .packing import AWQ_REVERSE_ORDER, unpack_awq, unpack_columns, unpack_rows


def dequantize_integers(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    kind: str,
    shape: tuple[int, ...],
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    true_shape: Tensor | None = None,
    out: Tensor | None = None,
    name: str = "weight",
) -> Tensor:
    """The weight [N, K] of `shape` that the stored parts of one of `planning.integer_kinds` represent.

    codes: int32, `weight_packed` [N, W] or `qweight` [K, N/8]. scale: BF16, F16 or F32, [N, G] or AutoAWQ's [G, N]. zero_point: int32 words
    along N, or None. true_shape: `weight_shape`. out_dtype: bfloat16 or float32; or out, a tensor of one of them to fill, on the codes' device.
    Raises CheckpointError on a scale of NaN or Inf, another `weight_shape`, or a product beyond `out_dtype`.
    """
    scheme, fmt = layout_of(kind)
    target = target_of(shape, codes.device, out_dtype if out is None else out)
    if true_shape is not None and true_shape.tolist() != list(shape):
        raise CheckpointError(
            f"'weight_shape' of {name} says {true_shape.tolist()}, its codes and config.json say {list(shape)}: fetch its shard again."
        )
    ensure_finite(scale, f"the scale of {name}")
    if not target.numel():
        return target
    if float(scale.abs().max()) * 2**scheme.bits > torch.finfo(target.dtype).max:
        raise too_large(target.dtype, name)
    if fmt == AUTOAWQ:
        assert zero_point is not None, "AutoAWQ stores zero points"
        _awq_into(codes, scale, zero_point, target)
    else:
        _packed_into(codes, scale, zero_point, scheme, target)
    return target


def _packed_into(codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, out: Tensor) -> None:
    rows, columns = out.shape
    groups = scale_shape(tuple(out.shape), scheme)[1]
    wide = scale.float().view(rows, groups, 1)
    zeros = None if zero_point is None else unpack_columns(zero_point, scheme.bits, rows).float().view(rows, groups, 1)
    for band in _bands(rows, columns, out):
        work = unpack_rows(codes[band], scheme.bits, columns).float().view(-1, groups, columns // groups)
        if zeros is not None:
            work.sub_(zeros[band])
        out[band] = work.mul_(wide[band]).view(-1, columns)


def _awq_into(codes: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor) -> None:
    """A word holds eight neighbours along N. Words are turned, an eighth of the weight, and every nibble is then a plane of whole rows."""
    rows, columns = out.shape
    groups = scale.shape[0]
    words, wide = codes.T.contiguous(), scale.float().T.contiguous()
    zeros = unpack_awq(zero_point).float().add_(8).T.contiguous()  # as stored: the offset of signed codes cancels
    for place, nibble in enumerate(AWQ_REVERSE_ORDER):
        step, shift, plane = wide[place::8], zeros[place::8], out[place::8]
        for band in _bands(rows // 8, columns, out):
            work = (words[band] >> (4 * nibble)).bitwise_and_(0xF).float().view(-1, groups, columns // groups)
            plane[band] = work.sub_(shift[band, :, None]).mul_(step[band, :, None]).view(-1, columns)


def _bands(count: int, across: int, out: Tensor) -> list[slice]:
    """Stretches of `count` lines of `across` values that fit a core's cache; one on a GPU."""
    step = max(1, BAND_ELEMENTS // across) if out.device.type == "cpu" else count
    return [slice(first, first + step) for first in range(0, count, step)]
