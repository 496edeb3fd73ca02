"""Each tensor's error against the source with folds undone. (Checks of an output by itself: `stored`.)

A calibrated output stores W * s where the norm before it stores gain / s (see calibration/folds.py). The scale that took
effect is read back from the two norms, so that every reader is known exactly. What is kept must then equal the source
bit for bit; every quantized code must be the source rounded to nearest under the stored scale, and every scale be in
the range that was searched. An uncompensated reader, a row in another's place or a wrong sign cannot hide in an average.
M2's w3 -> w2 scales leave no record: they are estimated from w3, so those two have a looser limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..calibration.folds import fold_groups, scale_columns
from ..calibration.ranges import FACTORS
from ..families.spec import expert_names
from ..planning.engine_kept import PASSED_THROUGH
from ..planning.plan import Plan
from ..planning.quantizers import facts_of
from ..planning.unit import PlannedTensor, Unit
from ..quant.formats import code_errors, decompress
from ..quant.reading import ConvertedReader, SourceReader
from . import fed_back
from .tensor_error import TensorError

# Codes that another device may round to their neighbour, of all codes; none may be further off.
_NEIGHBOURS = 1e-4
# Relative error allowed to a w3 -> w2 scale, which is estimated from rounded rows: an INT4 code may then be one step off.
_PAIR_SLACK = 0.05
_SCALE_ROUNDING = 0.01  # BF16 and F16 scales, compared as ratios


def unit_errors(
    plan: Plan,
    unit: Unit,
    reader: SourceReader,
    converted: ConvertedReader,
    recorded: Mapping[str, float] | None = None,
) -> Iterator[TensorError]:
    """Error of every tensor of the unit that was quantized, dequantized or folded. Others must be equal byte for byte.

    recorded: tensor name -> squared distance from the source that the conversion wrote down, for rounding with feedback.
    """
    if not facts_of(plan.recipe.rounding).nearest_codes:
        for planned in unit.tensors:
            if planned.scheme.quantizes:
                yield _fed_back_error(plan, planned, reader, converted, (recorded or {}).get(planned.name))
            else:
                yield _plain_error(plan, planned, reader, converted)
        return
    if unit.layer is None:
        for planned in unit.tensors:
            yield _plain_error(plan, planned, reader, converted)
        return
    prefix = plan.family.layer_prefix(unit.layer)
    by_name = {t.name.removeprefix(prefix): t for t in unit.tensors}
    columns, norms = _column_scales(plan, unit, prefix, reader, converted)
    pairs = _pairs(plan, unit.layer)
    rows: dict[str, Tensor] = {}  # down-projection -> the scale its up-projection's rows were divided by
    downs = set(pairs.values())
    for name in sorted(by_name, key=lambda n: n in downs):  # every up-projection before its down-projection
        planned = by_name[name]
        if name in norms:
            yield norms[name]
            continue
        if name not in columns and name not in rows and (planned.action == "copy" or name not in pairs):
            yield _plain_error(plan, planned, reader, converted)
            continue
        source, parts = reader.read(planned.name), _parts(converted, planned)
        if not planned.scheme.quantizes:
            yield _kept_error(planned, source, columns[name], parts[planned.name])
            continue
        folded = source.float()
        if name in columns:
            folded = folded * columns[name]
        paired = name in rows or (name in pairs and planned.scheme.kind == "int")
        if name in rows:
            folded = folded * rows[name]
        elif paired:
            stored = decompress(parts, planned.scheme, plan.recipe.format, tuple(source.shape), name=planned.name)
            rows[pairs[name]] = scale = row_scale(folded, stored)
            folded = folded / scale[:, None]
        yield _quantized_error(plan, planned, folded, parts, paired)


def _searched(plan: Plan) -> bool:
    """Whether this conversion may have folded scales."""
    return facts_of(plan.recipe.rounding).folds and plan.recipe.awq.smooth


def _pairs(plan: Plan, layer: int) -> dict[str, str]:
    """Relative up-projection -> down-projection of every expert, where this conversion may have folded the two."""
    if not (plan.family.pair_fold and _searched(plan)):
        return {}
    return {up: down for _, up, down in expert_names(plan.family.layer(layer))}


def _column_scales(
    plan: Plan, unit: Unit, prefix: str, reader: SourceReader, converted: ConvertedReader
) -> tuple[dict[str, Tensor], dict[str, TensorError]]:
    """Relative reader name -> the scale [K] its columns were multiplied by, and the norms that were folded.

    A folded norm has no error of its own, because its readers prove it, unless it lost or gained a zero.
    """
    columns: dict[str, Tensor] = {}
    norms: dict[str, TensorError] = {}
    if not _searched(plan) or unit.layer is None:
        return columns, norms
    one_plus = 1.0 if plan.family.norm_one_plus else 0.0
    schemes = {t.name.removeprefix(prefix): t.scheme for t in unit.tensors}
    for group in fold_groups(plan.family.layer(unit.layer), schemes):
        name = prefix + group.norm
        before, after = (r.read_many([name])[name].double() + one_plus for r in (reader, converted))
        if torch.equal(before, after):
            continue
        lost = int(((before == 0) != (after == 0)).sum())
        defect = f"is zero in {lost} channels where the source is not, or the reverse: no reader can undo that"
        norms[group.norm] = TensorError(name, "keep", -math.inf if lost else math.inf, defect if lost else "")
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


def _parts(converted: ConvertedReader, planned: PlannedTensor) -> dict[str, Tensor]:
    """Stored tensors by suffix; under its own name where the tensor is kept."""
    raw = converted.checkpoint.read_many([o.name for o in planned.outputs])
    if not planned.scheme.quantizes:
        return raw
    return planned.parts(raw)


def _plain_error(plan: Plan, planned: PlannedTensor, reader: SourceReader, converted: ConvertedReader) -> TensorError:
    """Error of a tensor that no fold touches. Copies are compared byte by byte: they may hold NaN or wide integers."""
    if planned.action == "copy":
        names = [part.name for part in planned.source.stored]
        before, after = reader.checkpoint.read_many(names), converted.checkpoint.read_many(names)
        if all(same_bytes(before[name], after[name]) for name in names):
            return TensorError(planned.name, planned.scheme.name, math.inf)
        error = -math.inf
        if planned.source.scale is None and planned.role.kind not in PASSED_THROUGH:
            error = sqnr_db(before[planned.name], after[planned.name])
        return TensorError(planned.name, planned.scheme.name, error, "should be a byte-for-byte copy of the source's")
    source, parts = reader.read(planned.name), _parts(converted, planned)
    if planned.scheme.quantizes:
        return _quantized_error(plan, planned, source, parts, paired=False)
    same = same_bytes(source, parts[planned.name])
    defect = "" if same else "should hold the source's values in BF16, bit for bit"
    return TensorError(planned.name, planned.scheme.name, sqnr_db(source, parts[planned.name]), defect)


def _fed_back_error(
    plan: Plan, planned: PlannedTensor, reader: SourceReader, converted: ConvertedReader, recorded: float | None
) -> TensorError:
    source, parts = reader.read(planned.name), _parts(converted, planned)
    stored = decompress(parts, planned.scheme, plan.recipe.format, tuple(source.shape), name=planned.name)
    found = fed_back.defect(source, stored, recorded)
    return TensorError(
        planned.name, planned.scheme.name, sqnr_db(source, stored), found, fed_back.floor_db(planned.scheme)
    )


def _kept_error(planned: PlannedTensor, source: Tensor, column: Tensor, stored: Tensor) -> TensorError:
    """Error of an unquantized reader of a folded norm: the source times the fold, rounded once to its own dtype."""
    same = same_bytes(scale_columns(source, column), stored)
    defect = "" if same else "is not the source's weight times the scale that its norm was divided by"
    return TensorError(planned.name, planned.scheme.name, sqnr_db(source.float() * column, stored), defect)


def _quantized_error(
    plan: Plan, planned: PlannedTensor, folded: Tensor, parts: Mapping[str, Tensor], paired: bool
) -> TensorError:
    """Error of a quantized weight whose unrounded values are `folded` [N, K], known only within _PAIR_SLACK if `paired`."""
    scheme, fmt, name = planned.scheme, plan.recipe.format, planned.name
    if not bool(torch.isfinite(folded).all()):
        return TensorError(name, scheme.name, -math.inf)
    stored = decompress(dict(parts), scheme, fmt, tuple(folded.shape), name=name)
    codes, steps, ratio = code_errors(folded, dict(parts), scheme, fmt, name=name)
    allowed = 1 + (codes.abs() * _PAIR_SLACK).round() if paired else 1
    far, near = int((steps > allowed).sum()), int((steps > 0).sum())
    low = high = 1.0
    if plan.recipe.rounding == "awq" and plan.recipe.awq.range_search and scheme.kind == "int":
        low, high = min(FACTORS), max(FACTORS)
    slack = 1 + _SCALE_ROUNDING + (_PAIR_SLACK if paired else 0)
    outside = int(((ratio < low / slack) | (ratio > high * slack)).sum())
    defect = ""
    if far or (near > _NEIGHBOURS * steps.numel() and not paired):
        defect = f"has {far or near} codes that are not the source's values rounded under its scales"
    elif outside:
        defect = f"has {outside} scales that no range of the source's values explains"
    return TensorError(name, scheme.name, sqnr_db(folded, stored), defect)


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one dtype and shape have the same bytes; unlike ==, NaN equals itself here."""
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def sqnr_db(source: Tensor, stored: Tensor) -> float:
    """10 log10(sum source^2 / sum (source - stored)^2) in float64; inf where they are equal, -inf where one is not finite."""
    noise = float((source.double() - stored.double()).square().sum())
    if noise == 0:
        return math.inf
    if not math.isfinite(noise):
        return -math.inf
    signal = float(source.double().square().sum())
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
