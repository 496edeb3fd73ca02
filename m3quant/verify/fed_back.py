"""Checks of codes with error feedback, which cannot be derived from the source one by one.

Rows and columns of the stored weight must still be those of the source: a row in another's place, a wrong sign or a
channel that was scaled and not compensated lowers their agreement with the source more than any rounding does. And
the squared distance from the source must be the one that the conversion recorded (calibration/rounding_errors.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..calibration.rounding_errors import TOLERANCE, squared_distance
from ..schemes import Scheme

# Signal-to-noise ratio in dB below which a weight is wrong. Lower than for rounding to nearest, in 8 bits above all: a weight
# whose target makes good what earlier layers lost is meant to differ from the source (22 dB was seen for o_proj in int8
# behind a 2-bit layer of random weights).
_FLOOR_DB = {2: 0.5, 3: 2.0}
_FLOOR_DB_ABOVE = 4.0
# Least cosine between a stored row and the source's. A foreign row of K weights has one of about 1 / sqrt(K).
_LEAST_COSINE = 0.3
# How far the slope of a stored column over the source's may be from 1: in standard errors of its own residuals, and at least.
_COLUMN_ERRORS, _COLUMN_LEAST = 12.0, 0.6
_FEW = 16  # rows below which a column's slope is not evaluated


def floor_db(scheme: Scheme) -> float:
    return _FLOOR_DB.get(scheme.bits, _FLOOR_DB_ABOVE)


def defect(source: Tensor, stored: Tensor, recorded: float | None) -> str:
    """What is wrong with stored [N, K] against source [N, K], as the end of a sentence about the tensor; '' if nothing.

    recorded: the conversion's own squared distance, None where its manifest has none.
    """
    if rows := _foreign_rows(source, stored):
        return f"has {len(rows)} rows that are not the source's, first row {rows[0]}"
    if columns := _scaled_columns(source, stored):
        return f"has {len(columns)} columns that are scaled or replaced, first column {columns[0]}"
    if recorded is None:
        return "has no rounding error in the manifest, which the conversion records: convert again"
    found = float(squared_distance(source, stored))
    if abs(found - recorded) > TOLERANCE * max(found, recorded):
        return (
            f"is not as far from the source as when it was rounded (squared distance {found:.9g}, recorded {recorded:.9g}): "
            "codes or scales changed, or it was rounded from another source"
        )
    return ""


def _foreign_rows(source: Tensor, stored: Tensor) -> list[int]:
    a, b = source.double(), stored.double()
    energy, other = a.square().sum(-1), b.square().sum(-1)
    cosine = (a * b).sum(-1) / (energy * other).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    # A row of zeros has no direction; the distance is checked.
    low = (cosine < _LEAST_COSINE) & (energy > 0)
    return [int(row) for row in low.nonzero()[:, 0]]


def _scaled_columns(source: Tensor, stored: Tensor) -> list[int]:
    if len(source) < _FEW:
        return []
    a, b = source.double(), stored.double()
    energy = a.square().sum(0)
    slope = (a * b).sum(0) / torch.where(energy > 0, energy, 1.0)
    noise = (b - slope * a).square().sum(0) / (len(a) - 1)
    error = (noise / torch.where(energy > 0, energy, 1.0)).sqrt()
    allowed = (_COLUMN_ERRORS * error).clamp_min(_COLUMN_LEAST)
    off = ((slope - 1).abs() > allowed) & (energy > 0)
    return [int(column) for column in off.nonzero()[:, 0]]
