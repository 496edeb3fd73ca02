"""The tensors of a source that m3quant reads: plain, FP8 in 128x128 blocks, or MXFP8. Torch-free.

Decides which tensors are weights, which are companions (scales), and whether they are those that config.json promises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint import Checkpoint, TensorInfo
from ..errors import CheckpointError
from ..families.base import Family
from ..schemes import FP8_BLOCK as BLOCK
from .other_trees import other_tree
from .source_format import FP8_BLOCK, MX_GROUP, PLAIN, source_format

FLOAT_DTYPES = ("BF16", "F16", "F32")
_SCALE = "_scale_inv"  # companion of X.weight is X.weight_scale_inv in both FP8 layouts of MiniMax


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the model as the source stores it. `scale` is its companion, or None."""

    info: TensorInfo
    kind: str = PLAIN
    scale: TensorInfo | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.info.name,) if self.scale is None else (self.info.name, self.scale.name)

    @property
    def stored_bytes(self) -> int:
        return self.info.nbytes + (self.scale.nbytes if self.scale else 0)


def source_tensors(checkpoint: Checkpoint) -> dict[str, SourceTensor]:
    """Every model tensor by name, scales paired with their weights (wherever the shard). Raises CheckpointError."""
    kind = source_format(checkpoint).required_kind()
    infos = checkpoint.tensors
    out: dict[str, SourceTensor] = {}
    for name, info in infos.items():
        if name.endswith(_SCALE):
            weight = infos.get(name.removesuffix(_SCALE))
            if weight is None or weight.dtype != "F8_E4M3":
                raise CheckpointError(
                    f"{checkpoint.root}/{info.shard}: scale '{name}' has no FP8 weight '{name.removesuffix(_SCALE)}': "
                    "the download is incomplete; fetch the missing shards again."
                )
            continue
        if info.dtype.startswith("F8") or info.dtype.startswith("F4"):
            out[name] = _fp8_tensor(checkpoint, info, infos.get(name + _SCALE), kind)
        else:
            out[name] = SourceTensor(info)
    return out


def _fp8_tensor(checkpoint: Checkpoint, info: TensorInfo, scale: TensorInfo | None, kind: str) -> SourceTensor:
    where = f"{checkpoint.root}/{info.shard}: tensor '{info.name}'"
    if kind == PLAIN:
        raise CheckpointError(
            f"{where} is {info.dtype} but config.json has no quantization_config: restore the release's config.json."
        )
    if info.dtype != "F8_E4M3" or len(info.shape) != 2:
        raise CheckpointError(
            f"{where} is {info.dtype} of shape {info.shape}: m3quant reads two-dimensional F8_E4M3 weights."
        )
    if scale is None:
        raise CheckpointError(
            f"{where} is FP8 without its scale '{info.name}{_SCALE}': the download is incomplete; fetch the missing shards again."
        )
    shape, dtypes = scale_layout(kind, info.shape)
    if scale.shape != shape or scale.dtype not in dtypes:
        raise CheckpointError(
            f"{where}: its scale is {scale.dtype} {scale.shape}, but {kind} needs {' or '.join(dtypes)} {shape}. "
            "Check quantization_config in config.json against the weights."
        )
    return SourceTensor(info, kind, scale)


def scale_layout(kind: str, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Shape of the scale beside an FP8 weight [N, K], and the dtypes it may have, the usual one first."""
    rows, columns = shape
    if kind == FP8_BLOCK:
        return (math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)), ("F32", "BF16")
    return (rows, columns // MX_GROUP), ("U8", "F8_E8M0")


def check_complete(checkpoint: Checkpoint, family: Family, tensors: Mapping[str, SourceTensor]) -> list[str]:
    """Compare with the tensors that config.json promises; returns notes. Raises CheckpointError naming what is missing or misshapen."""
    family.check_promised(len(checkpoint.tensors))
    expected = family.expected_tensors
    notes = []
    rounded: dict[tuple[str, str], list[str]] = {}  # (role, dtype) -> names
    optional = {role: [n for n in expected if family.role(n).kind == role] for role in family.optional_groups()}
    absent_groups = {role for role, names in optional.items() if names and not any(n in tensors for n in names)}
    missing = [n for n in expected if n not in tensors and family.role(n).kind not in absent_groups]
    if missing:
        if tree := other_tree(checkpoint, family):
            raise CheckpointError(tree)
        raise CheckpointError(
            f"{checkpoint.root} lacks {len(missing)} tensors that its config.json promises, first '{missing[0]}': "
            "fetch the missing shards, or restore the release's config.json."
        )
    for role in sorted(absent_groups):
        notes.append(f"the source has no {role} tensors although config.json describes them: a text-only copy")
    for name, want in expected.items():
        if name not in tensors:
            continue
        info = tensors[name].info
        if info.shape != want.shape:
            raise CheckpointError(
                f"{checkpoint.root}/{info.shard}: tensor '{name}' has shape {list(info.shape)}, but config.json implies "
                f"{list(want.shape)}: the weights and config.json are not of one model."
            )
        if tensors[name].kind == PLAIN and info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{checkpoint.root}/{info.shard}: tensor '{name}' is {info.dtype}: expected one of {', '.join(FLOAT_DTYPES)}."
            )
        if want.float32 and info.dtype != "F32":
            rounded.setdefault((family.role(name).kind, info.dtype), []).append(name)
    for (role, dtype), names in rounded.items():
        told = names[0] if len(names) == 1 else f"{len(names)} {role} tensors (first {names[0]})"
        notes.append(f"{told}: stored as {dtype}, in the official releases as F32; copied as stored")
    for name in tensors:
        if reason := family.unread_companion(name):
            raise CheckpointError(
                f"{checkpoint.root}/{tensors[name].info.shard}: {reason}, so that engines and m3quant would compute "
                "without it: restore the release's config.json, or take the tensor out if it is not meant."
            )
    return notes
