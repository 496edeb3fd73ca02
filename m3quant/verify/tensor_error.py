"""The error of one stored weight, and below what it is wrong rather than coarse. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# Signal-to-quantization-noise ratio below which a tensor is wrong rather than coarse, in dB: what has nothing to do with
# its source has 0 or less. Honest rounding of groups gives 4-6 for 2 bits and about 6.5 more for each further one (Gaussian
# and Student-t weights; one scale per row down to 2), 31 for FP8 E4M3, 50 for BF16 after a fold, 140 for float32.
_FLOOR_DB = {
    "int2": 0.5, "int3": 3.0, "int4": 6.0, "int5": 11.0, "int6": 16.0, "int7": 21.0, "int8": 25.0, "fp8": 20.0, "keep": 40.0,
}  # fmt: skip


@dataclass(frozen=True)
class TensorError:
    """Error of one stored weight against its source, folds undone. sqnr_db: 10 log10 of signal over noise energy.

    defect: what no correct rounding explains, as the end of a sentence about the tensor; empty if nothing.
    """

    name: str
    scheme: str
    sqnr_db: float
    defect: str = ""
    floor: float | None = None  # dB below which it is wrong; None: that of rounding to nearest in this scheme

    @property
    def margin(self) -> float:
        """dB above what is wrong."""
        return self.sqnr_db - (floor_db(self.scheme) if self.floor is None else self.floor)

    @property
    def wrong(self) -> bool:
        return self.margin < 0


def floor_db(scheme: str) -> float:
    return next(value for key, value in _FLOOR_DB.items() if scheme.startswith(key))


def worst(errors: Mapping[str, TensorError], count: int = 10) -> list[TensorError]:
    """The tensors with the least margin over their scheme's floor."""
    finite = [e for e in errors.values() if e.sqnr_db != math.inf]
    return sorted(finite, key=lambda e: e.margin)[:count]
