"""What each scheme stores on disk: tensor suffixes, safetensors dtype codes and shapes. Needs no torch.

A linear weight is [N out, K in]; leading dimensions (stacked experts [E, N, K]) stay in front of every stored tensor.

Sources: compressed-tensors 0.20 `pack_quantized` and `naive_quantized` compressors; AutoAWQ 0.2.9
`modules/linear/gemm.py`; DeepSeek-V3's and MiniMax-M2's `quantization_config` with `weight_block_size` [128, 128].
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, gcd, prod

from ..checkpoint import DTYPE_BYTES
from ..errors import PlanError
from ..schemes import FP8_BLOCK, GROUP_SIZES, Scheme

COMPRESSED_TENSORS = "compressed-tensors"
AUTOAWQ = "autoawq"
NATIVE_FP8 = "fp8"
FORMATS = (COMPRESSED_TENSORS, AUTOAWQ, NATIVE_FP8)

WORD_BITS = 32  # packed codes are stored in int32 words

Stored = dict[str, tuple[str, tuple[int, ...]]]


def check_format(scheme: Scheme, fmt: str) -> None:
    """Raises PlanError unless format `fmt` can hold `scheme`."""
    if fmt not in FORMATS:
        raise PlanError(f"unknown output format '{fmt}': use one of {', '.join(FORMATS)}.")
    if not scheme.quantizes:
        raise PlanError("scheme 'keep' stores a tensor as it is and has no quantized layout.")
    if fmt == AUTOAWQ and not (scheme.kind == "int" and scheme.bits == 4):
        raise PlanError(f"format 'autoawq' holds int4 only, not {scheme}: use --format compressed-tensors for it.")
    if fmt == NATIVE_FP8 and not (scheme.kind == "fp8" and scheme.block):
        raise PlanError(f"format 'fp8' holds fp8-block (128x128) only, not {scheme}: use --format compressed-tensors.")


def check_divisible(shape: Sequence[int], scheme: Scheme, fmt: str) -> None:
    """Raises PlanError where `shape` [..., N, K] cannot be stored as `scheme` in `fmt`.

    Integer formats never pad: the group divides K, K * bits is a multiple of 32, and so is N * bits where something is
    packed along N (zero points of asymmetric compressed-tensors, every AutoAWQ tensor).
    FP8 needs no divisibility here. A ragged 128x128 edge is a smaller last block with a scale of its own, as
    compressed-tensors and DeepSeek store it; engines read that in a whole linear but not in one that is fused with
    others or split over GPUs, which is for the plan to refuse because only the plan knows both.
    """
    check_format(scheme, fmt)
    if len(shape) < 2 or min(shape) < 1:
        raise PlanError(f"a quantized weight needs a shape [out, in] without a zero, got {list(shape)}.")
    rows, columns = shape[-2], shape[-1]
    if scheme.kind != "int":
        return
    if scheme.group_size and columns % scheme.group_size:
        fitting = [g for g in reversed(GROUP_SIZES) if g < scheme.group_size and columns % g == 0]
        remedy = f"group size {fitting[0]}, a channel scheme" if fitting else "a channel scheme"
        raise PlanError(
            f"{scheme} groups {scheme.group_size} input columns, which do not divide the {columns} of {list(shape)}; "
            f"use {remedy}, or keep this tensor."
        )
    unit = codes_in_whole_words(scheme.bits)
    words = f"whole 32-bit words, {unit} at a time ({unit * scheme.bits} bits)"
    if columns % unit and fmt == COMPRESSED_TENSORS:
        raise PlanError(
            f"{scheme} packs input columns into {words}: {unit} does not divide the {columns} of shape {list(shape)}; "
            "use fp8-channel, or keep this tensor."
        )
    if rows % unit and (fmt == AUTOAWQ or not scheme.symmetric):
        what = "AutoAWQ packs weights and zero points" if fmt == AUTOAWQ else f"{scheme} packs zero points"
        raise PlanError(
            f"{what} of output rows into {words}: {unit} does not divide the {rows} of shape {list(shape)}; "
            "use a symmetric scheme in compressed-tensors, or keep this tensor."
        )


def codes_in_whole_words(bits: int) -> int:
    """The fewest codes of `bits` bits that fill whole 32-bit words: 8 of 4 bits, 16 of 2 or 6, 32 of 3, 5 or 7."""
    return WORD_BITS // gcd(WORD_BITS, bits)


def one_pass(scheme: Scheme, fmt: str) -> bool:
    """Whether `fused.compress_into` can write `scheme` in `fmt`: everything but AutoAWQ's transposed words."""
    if scheme.kind == "fp8":
        return fmt in (COMPRESSED_TENSORS, NATIVE_FP8)
    return scheme.kind == "int" and fmt == COMPRESSED_TENSORS


def group_count(columns: int, scheme: Scheme) -> int:
    """Scales along K in one row: K / group, or 1 per channel."""
    return columns // scheme.group_size if scheme.group_size else 1


def scale_dtype(scheme: Scheme, fmt: str) -> str:
    """Safetensors code in which scales are stored."""
    if scheme.kind == "fp8":
        return "F32"
    return "F16" if fmt == AUTOAWQ else "BF16"


def scale_shape(shape: Sequence[int], scheme: Scheme) -> tuple[int, ...]:
    """Shape of the scale in weight order: [..., N, G], [..., N, 1], or [..., ceil(N/128), ceil(K/128)] (fp8-block)."""
    *lead, rows, columns = shape
    if scheme.kind == "fp8" and scheme.block:
        return (*lead, ceil(rows / FP8_BLOCK), ceil(columns / FP8_BLOCK))
    return (*lead, rows, group_count(columns, scheme))


def stored_tensors(shape: Sequence[int], scheme: Scheme, fmt: str) -> Stored:
    """Tensors that hold a weight of `shape` [..., N, K]: {suffix: (dtype code, shape)}, in the order they are written.

    `formats.compress` returns exactly these. Raises PlanError as `check_divisible` does.
    """
    check_divisible(shape, scheme, fmt)
    lead, rows, columns = tuple(shape[:-2]), shape[-2], shape[-1]
    scale = scale_shape(shape, scheme)
    if scheme.kind == "fp8":
        suffix = "weight_scale_inv" if fmt == NATIVE_FP8 else "weight_scale"
        return {"weight": ("F8_E4M3", (*lead, rows, columns)), suffix: ("F32", scale)}
    groups, row_words = scale[-1], rows * scheme.bits // WORD_BITS
    if fmt == AUTOAWQ:
        return {
            "qweight": ("I32", (*lead, columns, row_words)),
            "qzeros": ("I32", (*lead, groups, row_words)),
            "scales": ("F16", (*lead, groups, rows)),
        }
    stored: Stored = {
        "weight_packed": ("I32", (*lead, rows, columns * scheme.bits // WORD_BITS)),
        "weight_scale": ("BF16", scale),
        "weight_shape": ("I64", (*lead, 2)),
    }
    if not scheme.symmetric:
        stored["weight_zero_point"] = ("I32", (*lead, row_words, groups))
    return stored


def tensors_of(shape: Sequence[int], scheme: Scheme, fmt: str, joined: bool = False) -> Stored:
    """`stored_tensors` of a module; joined: as `families.base.Role.joined`."""
    stored = stored_tensors(shape, scheme, fmt)
    return {leaf: part for leaf, part in stored.items() if not joined or leaf != "weight_shape"}


def stored_bytes(shape: Sequence[int], scheme: Scheme, fmt: str) -> int:
    """Bytes of all stored tensors of one weight, headers not counted."""
    return sum(DTYPE_BYTES[code] * prod(dims) for code, dims in stored_tensors(shape, scheme, fmt).values())


def bits_per_weight(shape: Sequence[int], scheme: Scheme, fmt: str) -> float:
    """Stored bits per weight, scales and zero points included."""
    return 8 * stored_bytes(shape, scheme, fmt) / prod(shape)
