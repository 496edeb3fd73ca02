"""The layouts in which sources store a quantized weight: leaves, dtypes, shapes. Torch-free.

A weight X.weight [N, K] is stored as codes and scales, all under X. Which layout it is follows from the names, dtypes and shapes of
the tensors; `source_format` says what config.json calls it. Sources of the layouts: compressed-tensors 0.20 (compressors/nvfp4, mxfp4,
mxfp8, naive_quantized), ModelOpt 0.47 (qtensor/nvfp4_tensor.py), OCP Microscaling v1.0, DeepSeek-V3's `weight_block_size`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..checkpoint import TensorInfo
from ..errors import CheckpointError
from ..schemes import FP8_BLOCK as BLOCK
from .integer_kinds import QWEIGHT, is_integer, layout_of, words_of
from .layout import stored_tensors

PLAIN, FP8_BLOCK, MXFP8 = "plain", "fp8-block", "mxfp8"
FP8_CHANNEL, FP8_TENSOR = "fp8-channel", "fp8-tensor"
NVFP4, NVFP4_PACKED, MXFP4 = "nvfp4", "nvfp4-packed", "mxfp4"
MX_GROUP, NV_GROUP = 32, 16
FOUR_BIT = (NVFP4, NVFP4_PACKED, MXFP4)  # two codes a byte, the even column in the low half
WORDS = {
    PLAIN: "unquantized",
    FP8_BLOCK: f"FP8 in {BLOCK}x{BLOCK} blocks",
    MXFP8: f"MXFP8 (E4M3 with a power of two for {MX_GROUP} values)",
    FP8_CHANNEL: "FP8 with one scale a row",
    FP8_TENSOR: "FP8 with one scale a tensor",
    NVFP4: "NVFP4 in ModelOpt's layout (weight_scale_2 multiplies)",
    NVFP4_PACKED: "NVFP4 in compressed-tensors' layout (weight_global_scale divides)",
    MXFP4: f"MXFP4 (E2M1 with a power of two for {MX_GROUP} values)",
}
KINDS = tuple(WORDS)
_GROUPS = {NVFP4: NV_GROUP, NVFP4_PACKED: NV_GROUP, MXFP4: MX_GROUP, MXFP8: MX_GROUP}

# Leaves next to a module's codes. The last two are of activations, which no weight needs.
_SCALES, _GLOBALS = ("weight_scale_inv", "weight_scale"), ("weight_scale_2", "weight_global_scale")
_ACTIVATIONS = ("input_scale", "input_global_scale")
PACKED = "weight_packed"
# Of integers: zero points, and the shape that compressed-tensors states with them.
ZERO_POINTS, TRUE_SHAPE = ("weight_zero_point", "qzeros"), "weight_shape"
COMPANIONS = (*_SCALES, *_GLOBALS, *_ACTIVATIONS, *ZERO_POINTS, TRUE_SHAPE, "scales")
_E8M0, _FLOATS = ("U8", "F8_E8M0"), ("F32", "BF16")
INCOMPLETE = "the download is incomplete; fetch the missing shards again"


def words(kind: str) -> str:
    """A kind in words."""
    return words_of(kind) if is_integer(kind) else WORDS[kind]


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the model as the source stores it.

    info: the tensor, or its codes; kind: one of KINDS, or of integers (`integer_kinds`); scale: of groups, rows or blocks; global_scale:
    one F32 number that multiplies (NVFP4) or divides (NVFP4_PACKED) them; unread: scales of activations next to it. Of integers,
    zero_point; true_shape, the tensor that states [N, K]; and dense_shape, the same as planned.
    """

    info: TensorInfo
    kind: str = PLAIN
    scale: TensorInfo | None = None
    global_scale: TensorInfo | None = None
    unread: tuple[TensorInfo, ...] = ()
    zero_point: TensorInfo | None = None
    true_shape: TensorInfo | None = None
    dense_shape: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The model's name of the tensor."""
        stem, _, leaf = self.info.name.rpartition(".")
        packed = leaf in (PACKED, QWEIGHT) and self.kind != PLAIN
        return f"{stem}.weight" if packed else self.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's own, not that of its packed codes."""
        if self.dense_shape is not None:
            return self.dense_shape
        shape = self.info.shape
        return (*shape[:-1], shape[-1] * 2) if self.kind in FOUR_BIT else shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The parts that are read for the tensor's values."""
        found = (self.info, self.scale, self.global_scale, self.zero_point, self.true_shape)
        return tuple(part for part in found if part is not None)

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """All that the source stores of it."""
        return self.parts + self.unread

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    @property
    def stored_bytes(self) -> int:
        return sum(part.nbytes for part in self.stored)


def scale_layout(kind: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Shape of the scale of a weight [N, K], and the dtypes it may have, the usual one first."""
    rows, columns = shape
    if kind == FP8_BLOCK:
        return (math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)), ("F32", "BF16")
    if kind == FP8_CHANNEL:
        return (rows, 1), _FLOATS
    if kind == FP8_TENSOR:
        return (), _FLOATS
    if kind in (NVFP4, NVFP4_PACKED):
        return (rows, columns // NV_GROUP), ("F8_E4M3",)
    return (rows, columns // MX_GROUP), _E8M0


def stored_parts(
    kind: str, name: str, shape: tuple[int, ...], scale_dtype: str | None = None
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of all that a release stores of a weight [N, K] of that kind, scales of activations included."""
    stem = name.removesuffix("weight")
    if is_integer(kind):
        for leaf, (dtype, stored) in stored_tensors(shape, *layout_of(kind)).items():
            yield f"{stem}{leaf}", scale_dtype or dtype if leaf in ("weight_scale", "scales") else dtype, stored
        return
    rows, columns = shape
    if kind in FOUR_BIT:
        packed = kind != NVFP4
        yield f"{stem}{PACKED if packed else 'weight'}", "U8", (rows, columns // 2)
    else:
        yield name, "F8_E4M3", shape
    scale, dtypes = scale_layout(kind, shape)
    leaf = "weight_scale_inv" if kind in (FP8_BLOCK, MXFP8) else "weight_scale"
    yield f"{stem}{leaf}", scale_dtype or dtypes[0], scale
    if kind == NVFP4:
        yield f"{stem}weight_scale_2", "F32", ()
        yield f"{stem}input_scale", "F32", ()
    if kind == NVFP4_PACKED:
        yield f"{stem}weight_global_scale", "F32", (1,)
        yield f"{stem}input_global_scale", "F32", (1,)


def recognise(where: str, codes: TensorInfo, beside: Mapping[str, TensorInfo], stated: str) -> SourceTensor:
    """The weight that `codes` and its companions by leaf are. stated: the kind that config.json says, where two kinds have one shape.

    Raises CheckpointError with the tensor and what is missing, superfluous or of another shape.
    """
    shown = f"{where}/{codes.shard}: tensor '{codes.name}'"
    packed = codes.name.endswith(f".{PACKED}")
    if len(codes.shape) != 2 or codes.dtype not in (("U8",) if packed else ("U8", "F8_E4M3")):
        raise CheckpointError(
            f"{shown} is {codes.dtype} of shape {list(codes.shape)}: m3quant reads two-dimensional F8_E4M3 weights, and E2M1 in U8."
        )
    scales = [beside[leaf] for leaf in _SCALES if leaf in beside]
    if len(scales) != 1:
        what = "without its scale" if not scales else "with two scales,"
        which = f"'{_stem(codes)}.weight_scale'" if not scales else " and ".join(f"'{scale.name}'" for scale in scales)
        inverse = f" (or '{_stem(codes)}.weight_scale_inv')" if not scales and codes.dtype != "U8" else ""
        remedy = INCOMPLETE if not scales else "keep the one that the release has"
        raise CheckpointError(
            f"{shown} is {'E2M1' if codes.dtype == 'U8' else 'FP8'} {what} {which}{inverse}: {remedy}."
        )
    scale = scales[0]
    globals_ = [beside[leaf] for leaf in _GLOBALS if leaf in beside]
    kind = (
        _four_bits(shown, codes, scale, globals_, packed) if codes.dtype == "U8" else _eight_bits(codes, scale, stated)
    )
    found = SourceTensor(
        codes,
        kind or stated,
        scale,
        globals_[0] if kind in (NVFP4, NVFP4_PACKED) else None,
        tuple(beside[leaf] for leaf in _ACTIVATIONS if leaf in beside),
    )
    if not kind or not _fits(found, scale):
        raise CheckpointError(_misfit(shown, codes, scale, kind, stated))
    if kind not in (NVFP4, NVFP4_PACKED) and globals_:
        raise CheckpointError(
            f"{shown} is {WORDS[kind]} by its dtypes and shapes, which has no '{globals_[0].name}', and with it the layout matches no "
            "formula that m3quant knows: restore the release's shards, or take the tensor out if it is not meant."
        )
    return found


def _stem(info: TensorInfo) -> str:
    return info.name.rpartition(".")[0]


def _four_bits(shown: str, codes: TensorInfo, scale: TensorInfo, globals_: list[TensorInfo], packed: bool) -> str:
    if scale.dtype in _E8M0:
        return MXFP4
    if scale.dtype != "F8_E4M3":
        return ""
    wanted = "weight_global_scale" if packed else "weight_scale_2"
    other = "weight_scale_2" if packed else "weight_global_scale"
    leaves = [info.name.rpartition(".")[2] for info in globals_]
    if leaves != [wanted]:
        if not leaves:
            raise CheckpointError(f"{shown} is NVFP4 without its global scale '{_stem(codes)}.{wanted}': {INCOMPLETE}.")
        raise CheckpointError(
            f"{shown} is NVFP4 with {' and '.join(leaves)}. Under the name {codes.name.rpartition('.')[2]}, {wanted} is the global scale "
            f"({'it divides' if packed else 'it multiplies'}); {other} would {'multiply' if packed else 'divide'}: which is meant cannot be "
            "known, so restore the release's shards."
        )
    if globals_[0].dtype != "F32" or math.prod(globals_[0].shape) != 1:
        raise CheckpointError(
            f"{shown}: its global scale '{globals_[0].name}' is {globals_[0].dtype} {list(globals_[0].shape)}, not one F32 number: "
            "restore the release's shards."
        )
    return NVFP4_PACKED if packed else NVFP4


def _eight_bits(codes: TensorInfo, scale: TensorInfo, stated: str) -> str:
    """The kind whose scale has this dtype and shape; "" where there is none."""
    if scale.dtype in _E8M0:
        return MXFP8
    fitting = [kind for kind in (FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR) if _fits(SourceTensor(codes, kind, scale), scale)]
    return stated if stated in fitting else (fitting or [""])[0]


def _fits(found: SourceTensor, scale: TensorInfo) -> bool:
    shape, dtypes = scale_layout(found.kind, found.shape)
    if (group := _GROUPS.get(found.kind)) and found.shape[1] % group:
        return False
    if found.kind == FP8_CHANNEL and scale.shape == shape[:1]:
        return scale.dtype in dtypes
    if found.kind == FP8_TENSOR:
        return math.prod(scale.shape) == 1 and scale.dtype in dtypes
    return scale.shape == shape and scale.dtype in dtypes


def _misfit(shown: str, codes: TensorInfo, scale: TensorInfo, kind: str, stated: str) -> str:
    """What the scale is, and what it would be in the layouts that the codes may have."""
    readings = [kind]
    if not kind:
        readings = [NVFP4, MXFP4] if codes.dtype == "U8" else [FP8_BLOCK, FP8_CHANNEL, MXFP8]
    if stated in WORDS and stated != PLAIN and stated not in readings and (stated in FOUR_BIT) == (codes.dtype == "U8"):
        readings.insert(0, stated)
    needs = []
    for reading in readings:
        shape, dtypes = scale_layout(reading, SourceTensor(codes, reading).shape)
        needs.append(f"{reading} needs {' or '.join(dtypes)} {list(shape)}")
    return (
        f"{shown}: its scale '{scale.name}' is {scale.dtype} {list(scale.shape)}, but with {codes.dtype} {list(codes.shape)} "
        f"{', '.join(needs)}. Check quantization_config in config.json against the weights, and fetch the shard again."
    )
