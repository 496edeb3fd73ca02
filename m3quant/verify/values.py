"""The checks that read weights: finite, non-zero scales, and each tensor's error against the source with folds undone.

A calibrated output stores W * s where the norm before it stores gain / s (see calibration/folds.py). The scale that took
effect is read back from the two norms, so a reader that was not compensated shows as a wrong tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.folds import all_groups, expert_names
from ..calibration.layers import layer_spec
from ..plan import PASSED_THROUGH, Plan, PlannedTensor, Unit
from ..quant.formats import decompress
from ..reading import ConvertedReader, SourceReader
from ..schemes import Scheme

# Signal-to-quantization-noise ratio below which a tensor is wrong rather than coarse, in dB. Honest rounding gives about
# 18-22 for INT4 groups (a clipped range less), 31 for FP8 E4M3, 42 for INT8, 50 for BF16 after a fold, 140 for float32.
_FLOOR_DB = {"int4": 6.0, "int8": 25.0, "fp8": 20.0, "keep": 40.0}
_SCALE_LEAVES = ("weight_scale", "weight_scale_inv", "scales")


@dataclass(frozen=True)
class TensorError:
    """Error of one stored weight against its source, folds undone. sqnr_db: 10 log10 of signal over noise energy."""

    name: str
    scheme: str
    sqnr_db: float

    @property
    def wrong(self) -> bool:
        return self.sqnr_db < floor_db(self.scheme)


def floor_db(scheme: str) -> float:
    return next(value for key, value in _FLOOR_DB.items() if scheme.startswith(key))


def stored_problems(name: str, tensor: Tensor) -> Iterator[str]:
    """What is wrong with one stored tensor by itself: NaN, Inf, or a zero scale."""
    if tensor.dtype == torch.float8_e4m3fn:
        # E4M3 has one NaN per sign and no infinity; a byte test reads half as much as a cast would write.
        if bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any()):
            yield f"tensor '{name}' holds NaN"
    elif tensor.is_floating_point():
        if not bool(torch.isfinite(tensor).all()):
            yield f"tensor '{name}' holds NaN or Inf"
        elif name.rpartition(".")[2] in _SCALE_LEAVES and bool((tensor == 0).any()):
            yield f"scale '{name}' holds a zero"


def unit_stored_problems(plan: Plan, unit: Unit, converted: ConvertedReader) -> Iterator[str]:
    """`stored_problems` of every tensor of a unit whose meaning is known."""
    for planned in unit.tensors:
        if planned.role.kind in PASSED_THROUGH:
            continue
        names = [o.name for o in planned.outputs if o.name in converted.checkpoint.tensors]
        for name, tensor in converted.checkpoint.read_many(names).items():
            yield from stored_problems(name, tensor)


def unit_errors(plan: Plan, unit: Unit, reader: SourceReader, converted: ConvertedReader) -> Iterator[TensorError]:
    """Error of every tensor of the unit that was quantized, dequantized or folded. Others must be equal byte for byte."""
    if unit.layer is None:
        for planned in unit.tensors:
            yield _plain_error(plan, planned, reader, converted)
        return
    prefix = plan.family.layer_prefix(unit.layer)
    by_name = {t.name.removeprefix(prefix): t for t in unit.tensors}
    columns, folded_norms = _column_scales(plan, unit.layer, prefix, reader, converted)
    pairs = (
        {up: down for _, up, down in expert_names(layer_spec(plan.checkpoint.config, unit.layer))}
        if plan.family.pair_fold
        else {}
    )
    rows: dict[str, Tensor] = {}  # down-projection -> the scale its up-projection's rows were divided by
    for name in sorted(
        by_name, key=lambda n: n in set(pairs.values())
    ):  # every up-projection before its down-projection
        planned = by_name[name]
        if name in folded_norms:
            continue  # its change is what `columns` were read from; the readers prove it
        if name not in columns and name not in rows and (planned.action == "copy" or name not in pairs):
            yield _plain_error(plan, planned, reader, converted)
            continue
        source, stored = _source(reader, planned).float(), _stored(plan, converted, planned).float()
        if name in columns:
            source = source * columns[name]
        if name in pairs and planned.scheme.kind == "int":
            rows[pairs[name]] = scale = row_scale(source, stored)
            source = source / scale[:, None]
        elif name in rows:
            source = source * rows[name]
        yield _error(planned, source, stored)


def _column_scales(
    plan: Plan, layer: int, prefix: str, reader: SourceReader, converted: ConvertedReader
) -> tuple[dict[str, Tensor], set[str]]:
    """Relative reader name -> the scale [K] its columns were multiplied by, and the norms that were folded."""
    columns: dict[str, Tensor] = {}
    norms: set[str] = set()
    one_plus = 1.0 if plan.family.norm_one_plus else 0.0
    for group in all_groups(layer_spec(plan.checkpoint.config, layer)):
        before = reader.read(prefix + group.norm).double() + one_plus
        after = converted.read_many([prefix + group.norm])[prefix + group.norm].double() + one_plus
        if torch.equal(before, after):
            continue
        norms.add(group.norm)
        scale = torch.where((after != 0) & (before != 0), before / after, torch.ones_like(before)).float()
        columns.update(dict.fromkeys((*group.readers, *group.compensated), scale))
    return columns, norms


def row_scale(source: Tensor, stored: Tensor) -> Tensor:
    """The positive scale t [N] for which source / t is nearest to stored, row by row; 1 where the fold left a row alone.

    Least squares: t = <source, source> / <source, stored>. Rounding noise averages out over the K columns of a row.
    """
    energy, cross = source.double().square().sum(-1), (source.double() * stored.double()).sum(-1)
    usable = (cross > 0) & (energy > 0)
    return torch.where(
        usable, energy / torch.where(usable, cross, torch.ones_like(cross)), torch.ones_like(cross)
    ).float()


def _source(reader: SourceReader, planned: PlannedTensor) -> Tensor:
    return reader.read(planned.name)


def _stored(plan: Plan, converted: ConvertedReader, planned: PlannedTensor) -> Tensor:
    raw = converted.checkpoint.read_many([o.name for o in planned.outputs])
    if not planned.scheme.quantizes:
        return raw[planned.name]
    parts = {name.removeprefix(f"{planned.module}."): tensor for name, tensor in raw.items()}
    return decompress(parts, planned.scheme, plan.recipe.format, planned.source.info.shape, name=planned.name)


def _plain_error(plan: Plan, planned: PlannedTensor, reader: SourceReader, converted: ConvertedReader) -> TensorError:
    """Error of a tensor that no fold touches. Copies are compared byte by byte: they may hold NaN or wide integers."""
    if planned.action == "copy":
        names = planned.source.names
        before, after = reader.checkpoint.read_many(names), converted.checkpoint.read_many(names)
        if all(same_bytes(before[name], after[name]) for name in names):
            return TensorError(planned.name, _label(planned.scheme), math.inf)
        if planned.role.kind in PASSED_THROUGH:
            return TensorError(planned.name, _label(planned.scheme), -math.inf)
    return _error(planned, _source(reader, planned), _stored(plan, converted, planned))


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one dtype and shape have the same bytes; unlike ==, NaN equals itself here."""
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def _error(planned: PlannedTensor, source: Tensor, stored: Tensor) -> TensorError:
    return TensorError(planned.name, _label(planned.scheme), sqnr_db(source, stored))


def _label(scheme: Scheme) -> str:
    return scheme.name


def sqnr_db(source: Tensor, stored: Tensor) -> float:
    """10 log10(sum source^2 / sum (source - stored)^2) in float64; inf where they are equal, -inf where one is not finite."""
    noise = float((source.double() - stored.double()).square().sum())
    if noise == 0:
        return math.inf
    if not math.isfinite(noise):
        return -math.inf
    signal = float(source.double().square().sum())
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def worst(errors: Mapping[str, TensorError], count: int = 10) -> list[TensorError]:
    """The tensors with the least margin over their scheme's floor."""
    finite = [e for e in errors.values() if e.sqnr_db != math.inf]
    return sorted(finite, key=lambda e: e.sqnr_db - floor_db(e.scheme))[:count]
