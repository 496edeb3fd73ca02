"""Number formats by name: `int4-g128`, `int2-g64-asym`, `int8-channel`, `fp8-channel`, `fp8-block`, `keep`.

A scheme says how a linear weight [N out, K in] is stored; it holds no tensor and needs no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from .errors import RecipeError

FP8_BLOCK = 128  # rows and columns of a block in MiniMax's and DeepSeek's FP8 format

INT_BITS = (2, 3, 4, 5, 6, 7, 8)
GROUP_SIZES = (16, 32, 64, 128, 256)
SCHEMES = (  # for people
    f"int{INT_BITS[0]} to int{INT_BITS[-1]} with -g{', -g'.join(map(str, GROUP_SIZES))} or -channel, and -asym for zero points; "
    "fp8-channel, fp8-block, keep"
)
_INT = re.compile(r"int([1-9][0-9]{0,2})-(?:g([1-9][0-9]{0,5})|(channel))(-asym)?")
_BARE = re.compile(r"(?:int|w)([2-8])(?:a16)?")  # a width without groups
_ELSEWHERE = {"fp8": "fp8-channel", "fp8_dynamic": "fp8-channel", "fp8_block": "fp8-block", "w8a8": "fp8-channel"}
_LONGEST = 64  # characters of a name that are compared with known ones and repeated in a message


@dataclass(frozen=True)
class Activations:
    """How an engine rounds what a linear reads while it runs: to E4M3 under one scale per token, or per token and run of channels."""

    group_size: int | None = None

    def __str__(self) -> str:
        return "E4M3 per token" + (f" and {self.group_size} channels" if self.group_size else "")


@dataclass(frozen=True)
class Scheme:
    """How one linear weight is stored.

    kind: "keep", "int" (2 to 8 bits along K) or "fp8" (E4M3).
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

    @property
    def activations(self) -> Activations | None:
        """How the linear's inputs are rounded; None where they are read as they are (integers, kept weights)."""
        if self.kind != "fp8":
            return None
        return Activations(FP8_BLOCK if self.block else None)

    def __str__(self) -> str:
        return self.name


KEEP = Scheme("keep")
NOT_ROUNDED = "not rounded"


def rounded_activations(schemes: Iterable[Scheme]) -> str:
    """What an engine does to activations under these schemes, in words: 'not rounded', or 'E4M3 per token'."""
    kinds = sorted({str(kind) for scheme in schemes if (kind := scheme.activations)})
    return " or ".join(kinds) or NOT_ROUNDED


@lru_cache(maxsize=256)  # a plan asks for the scheme of every one of some 50,000 tensors
@lru_cache(maxsize=256)  # a recipe names a few; a plan asks for that of every tensor
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
    if match is None:
        if near := _ELSEWHERE.get(name) or _BARE.sub(r"int\1-g128", name) * bool(_BARE.fullmatch(name)):
            raise RecipeError(_unknown(name, near))
        names = [known for known in _names() if known.startswith(name[:4])] if name[:3] == "int" else _names()
        near = difflib.get_close_matches(name[:_LONGEST], names or _names(), n=1, cutoff=0.0)[0]
        raise RecipeError(_unknown(name, near))
    bits, group, _, asym = match.groups(default="")
    if int(bits) in INT_BITS and (not group or int(group) in GROUP_SIZES):
        return Scheme("int", int(bits), int(group) if group else None, symmetric=not asym)
    where = f"g{_nearest(int(group), GROUP_SIZES)}" if group else "channel"
    raise RecipeError(_unknown(name, f"int{_nearest(int(bits), INT_BITS)}-{where}{asym}"))


def _nearest(number: int, known: tuple[int, ...]) -> int:
    return min(known, key=lambda other: abs(other - number))


def _unknown(name: str, near: str) -> str:
    return (
        f"unknown scheme '{name[:_LONGEST]}': did you mean '{near}'? Known: keep, fp8-channel, fp8-block, and "
        f"int<bits>-g<columns> or int<bits>-channel with {INT_BITS[0]} to {INT_BITS[-1]} bits and groups of "
        f"{_listed(GROUP_SIZES)} columns, with -asym for zero points."
    )


@lru_cache(maxsize=1)
def _names() -> list[str]:
    """Every name that `parse_scheme` takes, 4 and 8 bits first: what a mistyped name is compared with."""
    places = [*(f"g{size}" for size in reversed(GROUP_SIZES)), "channel"]
    bits = sorted(INT_BITS, key=lambda b: b not in (4, 8))
    integers = [f"int{b}-{place}{asym}" for b in bits for place in places for asym in ("", "-asym")]
    return ["keep", *integers, "fp8-channel", "fp8-block"]


def _listed(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
