"""A weight [..., N, K] to the tensors that an engine reads, and back.

    compressed-tensors   int4/int8 `pack-quantized`, FP8 channel and block `float-quantized`
    autoawq              int4 GEMM: qweight, qzeros, scales
    fp8                  DeepSeek-V3 and MiniMax-M2: weight, weight_scale_inv

Leading dimensions (stacked experts) stay in front of every tensor, so `{k: v[e] for k, v in ...}` is what expert e
stores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..planning.layout import AUTOAWQ, COMPRESSED_TENSORS, check_divisible, scale_dtype, scale_shape, stored_tensors
from ..schemes import Scheme
from . import fp8, integer, packing

TORCH_DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}


def qparams(weight: Tensor, scheme: Scheme, fmt: str, *, name: str = "weight") -> tuple[Tensor, Tensor | None]:
    """Min-max (scale float32, zero point int8 or None) of `weight` [..., N, K].

    The scale has the shape of `layout.scale_shape` and is exact in the dtype that `fmt` stores.
    Raises CheckpointError on NaN or Inf, PlanError on a size that does not divide.
    """
    check_divisible(tuple(weight.shape), scheme, fmt)
    if scheme.kind == "int":
        dtype = TORCH_DTYPES[scale_dtype(scheme, fmt)]
        return integer.int_qparams(weight, scheme, scale_dtype=dtype, name=name)
    return (fp8.block_scale if scheme.block else fp8.channel_scale)(weight, name=name), None


def _resolve(
    weight: Tensor, scheme: Scheme, fmt: str, scale: Tensor | None, zero_point: Tensor | None, name: str
) -> tuple[Tensor, Tensor | None]:
    """Own or given parameters; a given scale is checked and rounded to its stored dtype."""
    if scale is None:
        if zero_point is not None:
            raise ValueError("a zero point without its scale has no meaning")
        return qparams(weight, scheme, fmt, name=name)
    expected = scale_shape(tuple(weight.shape), scheme)
    if tuple(scale.shape) != expected:
        raise ValueError(f"scale of {name} has shape {tuple(scale.shape)}, {scheme} needs {expected}")
    asymmetric = scheme.kind == "int" and not scheme.symmetric
    if asymmetric != (zero_point is not None):
        raise ValueError(f"{scheme} {'needs a' if asymmetric else 'has no'} zero point ({name})")
    if zero_point is not None and (zero_point.dtype != torch.int8 or tuple(zero_point.shape) != expected):
        found = f"{zero_point.dtype} {tuple(zero_point.shape)}"
        raise ValueError(f"zero point of {name} must be int8 {expected}, got {found}")
    scale = scale.float()
    low, high = torch.aminmax(scale.abs() if scheme.kind == "int" and scheme.symmetric else scale)
    if not (float(low) > 0.0 and float(high) < float("inf")):  # NaN fails too
        raise ValueError(
            f"scales of {name} must be non-zero and finite, got magnitudes {float(low):g} to {float(high):g}"
        )
    return integer.round_scale(scale, TORCH_DTYPES[scale_dtype(scheme, fmt)], name), zero_point


def _codes(weight: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor | None, name: str) -> Tensor:
    if scheme.kind == "int":
        return integer.quantize(weight, scale, zero_point, scheme, name=name)
    return (fp8.quantize_block if scheme.block else fp8.quantize_channel)(weight, scale, name=name)


def _values(codes: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    if scheme.kind == "int":
        return integer.dequantize(codes, scale, zero_point, scheme)
    return (fp8.dequantize_block if scheme.block else fp8.dequantize_channel)(codes, scale)


def compress(
    weight: Tensor,
    scheme: Scheme,
    fmt: str,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    name: str = "weight",
) -> dict[str, Tensor]:
    """The stored tensors of `weight`: suffixes, dtypes and shapes of `layout.stored_tensors`, on the weight's device.

    weight: [..., N, K] BF16, F16 or F32. scale, zero_point: from calibration, shapes of `layout.scale_shape`; min-max
    where absent. A given scale is rounded to the stored dtype before codes are computed. `name` is used in messages.
    Raises CheckpointError on NaN or Inf and where an AutoAWQ scale leaves F16; PlanError as `layout.check_divisible`.
    """
    check_divisible(tuple(weight.shape), scheme, fmt)
    scale, zero_point = _resolve(weight, scheme, fmt, scale, zero_point, name)
    codes = _codes(weight, scheme, scale, zero_point, name)
    return pack(codes, scale, zero_point, scheme, fmt)


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, fmt: str) -> dict[str, Tensor]:
    """The stored tensors of given codes: suffixes, dtypes and shapes of `layout.stored_tensors`, on the codes' device.

    codes: int8 [..., N, K] in the range of `scheme`, or float8_e4m3fn. scale: float32, shape of `layout.scale_shape`,
    exact in the dtype that `fmt` stores. zero_point: int8 in the range of the codes, or None.
    """
    if scheme.kind == "fp8":
        return {"weight": codes, ("weight_scale" if fmt == COMPRESSED_TENSORS else "weight_scale_inv"): scale}
    if fmt == AUTOAWQ:
        zeros = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point
        return {
            "qweight": packing.pack_awq(codes.transpose(-1, -2)),
            "qzeros": packing.pack_awq(zeros.transpose(-1, -2)),
            "scales": packing.densely(scale.to(torch.float16).transpose(-1, -2)),
        }
    shape = torch.tensor(codes.shape[-2:], dtype=torch.int64, device=codes.device)
    stored = {
        "weight_packed": packing.pack_rows(codes, scheme.bits),
        "weight_scale": scale.to(torch.bfloat16),
        "weight_shape": shape.expand(*codes.shape[:-2], 2).contiguous(),
    }
    if zero_point is not None:
        stored["weight_zero_point"] = packing.pack_columns(zero_point, scheme.bits)
    return stored


def decompress(
    tensors: dict[str, Tensor], scheme: Scheme, fmt: str, shape: tuple[int, ...], *, name: str = "weight"
) -> Tensor:
    """The float32 weight of `shape` [..., N, K] that `tensors`, as `compress` returns them, represent.

    Raises CheckpointError where a tensor but `weight_shape` is missing, has another dtype or shape, or `weight_shape` says another size.
    """
    codes, scale, zero_point = _unpack(tensors, scheme, fmt, shape, name)
    return _values(codes, scheme, scale, zero_point)


def code_errors(
    weight: Tensor, tensors: dict[str, Tensor], scheme: Scheme, fmt: str, *, name: str = "weight"
) -> tuple[Tensor, Tensor, Tensor]:
    """How far `tensors` are from being a rounding of `weight` [N, K] to nearest under the scales that they hold.

    Returns the stored codes and their distance from the right ones, int16 [N, K] in steps of the grid (for FP8, of the
    ordered E4M3 values), and the magnitude of each scale relative to the min-max one of `weight`. Errors as `decompress`.
    """
    codes, scale, zero_point = _unpack(tensors, scheme, fmt, tuple(weight.shape), name)
    found, right = (_ordered(c) for c in (codes, _codes(weight, scheme, scale, zero_point, name)))
    full, _ = qparams(weight, scheme, fmt, name=name)
    return found, (found - right).abs_(), scale.abs() / full


def _ordered(codes: Tensor) -> Tensor:
    """Codes as int16 that count steps: integers as they are, E4M3 by sign and magnitude."""
    if codes.dtype == torch.int8:
        return codes.to(torch.int16)
    bits = codes.view(torch.uint8).to(torch.int16)
    magnitude = bits & 0x7F
    return torch.where(bits > 0x7F, -magnitude, magnitude)


def _unpack(
    tensors: dict[str, Tensor], scheme: Scheme, fmt: str, shape: tuple[int, ...], name: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, float32 scale, zero point or None) in weight order."""
    for suffix, (code, dims) in stored_tensors(shape, scheme, fmt).items():
        tensor = tensors.get(suffix)
        if tensor is None and suffix == "weight_shape":
            continue  # stored once for weights that readers join
        if tensor is None:
            raise CheckpointError(f"{name}: '{suffix}' is missing, which {scheme} in {fmt} stores; convert it again.")
        if tensor.dtype != TORCH_DTYPES[code] or tuple(tensor.shape) != dims:
            raise CheckpointError(
                f"{name}: '{suffix}' is {tensor.dtype} {list(tensor.shape)}, but {scheme} in {fmt} stores "
                f"{TORCH_DTYPES[code]} {list(dims)}; convert it again."
            )
    rows, columns = shape[-2:]
    if scheme.kind == "fp8":
        return tensors["weight"], tensors["weight_scale" if fmt == COMPRESSED_TENSORS else "weight_scale_inv"], None
    if fmt == AUTOAWQ:
        codes = packing.unpack_awq(tensors["qweight"]).transpose(-1, -2).contiguous()
        zeros = packing.unpack_awq(tensors["qzeros"]).transpose(-1, -2)
        return codes, tensors["scales"].transpose(-1, -2).float(), zeros
    recorded = tensors.get("weight_shape")
    if recorded is not None and not bool((recorded == torch.tensor([rows, columns], device=recorded.device)).all()):
        raise CheckpointError(f"{name}: 'weight_shape' says {recorded.tolist()}, the plan says {[rows, columns]}.")
    codes = packing.unpack_rows(tensors["weight_packed"], scheme.bits, columns)
    zero_point = None if scheme.symmetric else packing.unpack_columns(tensors["weight_zero_point"], scheme.bits, rows)
    return codes, tensors["weight_scale"].float(), zero_point


def round_trip(
    weight: Tensor,
    scheme: Scheme,
    fmt: str = COMPRESSED_TENSORS,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    name: str = "weight",
) -> Tensor:
    """`decompress(compress(weight))` without the packing: the float32 weight that an engine sees.

    Any scheme; 'keep' returns a float32 copy. Arguments and errors as `compress`.
    """
    if not scheme.quantizes:
        return weight.to(torch.float32, copy=True)
    check_divisible(tuple(weight.shape), scheme, fmt)
    scale, zero_point = _resolve(weight, scheme, fmt, scale, zero_point, name)
    return _values(_codes(weight, scheme, scale, zero_point, name), scheme, scale, zero_point)
