"""Which integer weight the tensors of a module are: codes in int32 words, scales, zero points. Torch-free.

Unlike floats, integers do not show their width: W words of a row hold 32 W / bits columns. So the shape that config.json gives the weight
decides among the kinds that its quantization section states. Sources: compressed-tensors 0.20 `pack_quantized`, AutoAWQ 0.2.9 `gemm.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..checkpoint import TensorInfo
from ..errors import CheckpointError, PlanError
from .integer_kinds import QWEIGHT, integers_among, layout_of, words_of
from .layout import AUTOAWQ, WORD_BITS, stored_tensors
from .source_layouts import INCOMPLETE, PACKED, TRUE_SHAPE, ZERO_POINTS, SourceTensor

_SCALE_DTYPES = ("BF16", "F16", "F32")
_LOOSE = {"weight_scale": _SCALE_DTYPES, "scales": _SCALE_DTYPES, TRUE_SHAPE: ("I64", "I32")}


def holds_integers(codes: TensorInfo) -> bool:
    """Whether a tensor is the codes of an integer weight, by its name and dtype."""
    leaf = codes.name.rpartition(".")[2]
    return leaf == QWEIGHT or (leaf == PACKED and codes.dtype.startswith("I"))


def recognise_integers(
    where: str,
    codes: TensorInfo,
    beside: Mapping[str, TensorInfo],
    kinds: Iterable[str],
    promised: tuple[int, ...] | None,
) -> SourceTensor:
    """The weight that `codes` and its companions by leaf are, of one of the stated `kinds`.

    promised: [N, K] of the weight by config.json, None where it does not know the module. Raises CheckpointError with the tensor and what
    each reading needs.
    """
    shown = f"{where}/{codes.shard}: tensor '{codes.name}'"
    leaf = codes.name.rpartition(".")[2]
    readings = [kind for kind in integers_among(kinds) if (layout_of(kind)[1] == AUTOAWQ) == (leaf == QWEIGHT)]
    if not readings:
        raise CheckpointError(
            f"{shown} holds integers by its name and dtype ({codes.dtype}), and config.json states none for this module: the weights and "
            "config.json are of two checkpoints. Fetch both again."
        )
    parts = {leaf: codes, **{name: info for name, info in beside.items() if not name.startswith("input_")}}
    misfits = []
    for kind in readings:
        shape = promised or _shape(kind, codes)
        if misfit := _misfit(parts, kind, shape):
            misfits.append(f"as {words_of(kind)} {misfit}")
            continue
        scale = beside["scales" if leaf == QWEIGHT else "weight_scale"]
        zeros = next((beside[name] for name in ZERO_POINTS if name in beside), None)
        unread = tuple(info for name, info in beside.items() if name.startswith("input_"))
        return SourceTensor(codes, kind, scale, None, unread, zeros, beside.get(TRUE_SHAPE), shape)
    raise CheckpointError(
        f"{shown} is {codes.dtype} {list(codes.shape)}: {'; '.join(misfits)}. Check quantization_config in config.json against the weights, "
        "and fetch the shard again."
    )


def _shape(kind: str, codes: TensorInfo) -> tuple[int, ...]:
    """[N, K] of a module that config.json does not know, by its codes."""
    if len(codes.shape) != 2:
        return ()
    scheme, fmt = layout_of(kind)
    first, words = codes.shape
    many = words * WORD_BITS // scheme.bits
    return (many, first) if fmt == AUTOAWQ else (first, many)


def _misfit(parts: Mapping[str, TensorInfo], kind: str, shape: tuple[int, ...]) -> str:
    """How the stored parts of a module differ from what a weight [N, K] of that kind stores; "" where they do not."""
    scheme, fmt = layout_of(kind)
    try:
        needed = stored_tensors(shape, scheme, fmt)
    except PlanError as error:
        return f"it cannot be stored ({str(error).rstrip('.')})"
    for leaf, (dtype, dims) in needed.items():
        found = parts.get(leaf)
        if found is None and leaf == TRUE_SHAPE:
            continue  # config.json says it too
        if found is None:
            return f"it lacks '{leaf}' ({INCOMPLETE})"
        if found.shape != dims or found.dtype not in _LOOSE.get(leaf, (dtype,)):
            older = _padded_words(shape, scheme.bits)
            if leaf == PACKED and found.shape[-1:] == (older,) and older != dims[-1]:
                return f"its words are filled one by one, as compressed-tensors before 0.20 does for {scheme.bits} bits: save it again with 0.20"
            return f"'{leaf}' is {found.dtype} {list(found.shape)}, not {dtype} {list(dims)}"
    if extra := sorted(parts.keys() - needed.keys()):
        return f"'{extra[0]}' is too many"
    return ""


def _padded_words(shape: tuple[int, ...], bits: int) -> int:
    """Words of a row where every word holds whole codes."""
    return -(-shape[-1] // (WORD_BITS // bits))
