"""Number formats by name: `int4-g128`, `int8-channel-asym`, `fp8-channel`, `fp8-block`, `keep`.

A scheme says how a linear weight [N out, K in] is stored; it holds no tensor and needs no torch.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import lru_cache

from .errors import RecipeError

FP8_BLOCK = 128  # rows and columns of a block in MiniMax's and DeepSeek's FP8 format

_INT = re.compile(r"int(4|8)-(?:g(\d+)|(channel))(-asym)?")
_COMMON = (
    "keep", "int4-g128", "int4-g64", "int4-g32", "int4-channel", "int4-g128-asym", "int4-g64-asym",
    "int4-g32-asym", "int4-channel-asym", "int8-g128", "int8-g64", "int8-g32", "int8-channel",
    "int8-g128-asym", "int8-g64-asym", "int8-g32-asym", "int8-channel-asym", "fp8-channel", "fp8-block",
)  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How one linear weight is stored.

    kind: "keep", "int" (4 or 8 bits along K) or "fp8" (E4M3).
    group_size: columns that share a scale; None means one scale per output row (channel), or an fp8 block.
    """

    kind: str
    bits: int = 16
    group_size: int | None = None
    symmetric: bool = True
    block: bool = False  # fp8 only: 128x128 blocks instead of one scale per row

    @property
    def name(self) -> str:
        if self.kind == "keep":
            return "keep"
        if self.kind == "fp8":
            return "fp8-block" if self.block else "fp8-channel"
        where = f"g{self.group_size}" if self.group_size else "channel"
        return f"int{self.bits}-{where}" + ("" if self.symmetric else "-asym")

    @property
    def quantizes(self) -> bool:
        return self.kind != "keep"

    def __str__(self) -> str:
        return self.name


KEEP = Scheme("keep")


@lru_cache(maxsize=256)  # a plan asks for the scheme of every one of some 50,000 tensors
def parse_scheme(text: str) -> Scheme:
    """The scheme called `text`. Raises RecipeError with the nearest valid name."""
    name = text.strip().lower()
    if name in ("keep", "bf16", "none"):
        return KEEP
    if name == "fp8-channel":
        return Scheme("fp8", bits=8)
    if name == "fp8-block":
        return Scheme("fp8", bits=8, block=True)
    match = _INT.fullmatch(name)
    if match:
        bits, group, _, asym = match.groups()
        if group is None or int(group) in (16, 32, 64, 128, 256):
            return Scheme("int", int(bits), int(group) if group else None, symmetric=not asym)
    near = difflib.get_close_matches(name, _COMMON, n=1, cutoff=0.0)[0]
    raise RecipeError(f"unknown scheme '{text}': did you mean '{near}'? Known: {', '.join(_COMMON)}.")
