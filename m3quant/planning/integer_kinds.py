"""Kinds of integer weights that a source may hold: `int4-g128-asym` packed as compressed-tensors does, `awq-int4-g128` as AutoAWQ does.

A kind is a scheme's name, with the prefix of its layout, so that every width, group size and symmetry has one. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..checkpoint.strict_json import described
from ..schemes import GROUP_SIZES, INT_BITS, Scheme, parse_scheme
from .layout import AUTOAWQ, COMPRESSED_TENSORS

_AWQ = "awq-"
PATTERN = rf"int[{INT_BITS[0]}-{INT_BITS[-1]}]-(?:g(?:{'|'.join(map(str, GROUP_SIZES))})|channel)(?:-asym)?"
KIND = re.compile(rf"{PATTERN}|{_AWQ}int4-(?:g(?:{'|'.join(map(str, GROUP_SIZES))})|channel)")
QWEIGHT = "qweight"


def is_integer(kind: str) -> bool:
    return KIND.fullmatch(kind) is not None


def layout_of(kind: str) -> tuple[Scheme, str]:
    """Scheme and format (`layout.FORMATS`) of an integer kind. AutoAWQ stores zero points always."""
    if kind.startswith(_AWQ):
        return parse_scheme(f"{kind.removeprefix(_AWQ)}-asym"), AUTOAWQ
    return parse_scheme(kind), COMPRESSED_TENSORS


def words_of(kind: str) -> str:
    """An integer kind in words."""
    scheme, fmt = layout_of(kind)
    where = f"groups of {scheme.group_size} columns" if scheme.group_size else "one scale a row"
    zero = "" if scheme.symmetric else " and zero points"
    return f"{scheme.bits}-bit integers with {where}{zero} ({'AutoAWQ' if fmt == AUTOAWQ else 'compressed-tensors'})"


def packed_kind(weights: Mapping[str, Any]) -> tuple[str, str]:
    """(kind, why there is none) of the `weights` of a compressed-tensors group of integers whose format is pack-quantized."""
    bits, strategy, size, symmetric = (weights.get(key) for key in ("num_bits", "strategy", "group_size", "symmetric"))
    if type(bits) is not int or bits not in INT_BITS:
        return "", f"integers of {described(bits)} bits"
    if strategy not in ("group", "channel") or (strategy == "group") != (type(size) is int and size in GROUP_SIZES):
        return "", f"integers of strategy {described(strategy)} with group_size {described(size)}"
    if type(symmetric) is not bool and symmetric is not None:
        return "", f"integers whose 'symmetric' is {described(symmetric)}"
    if weights.get("actorder") not in (None, False, "static", "weight"):
        return (
            "",
            f"integers in activation order ({described(weights.get('actorder'))}), whose columns are permuted by weight_g_idx",
        )
    return Scheme("int", bits, size if strategy == "group" else None, symmetric is not False).name, ""


def awq_kind(section: Mapping[str, Any]) -> tuple[str, str]:
    """(kind, why there is none) of AutoAWQ's section."""
    bits, size = section.get("bits", section.get("w_bit")), section.get("group_size", section.get("q_group_size"))
    version = section.get("version", "gemm")
    if bits != 4 or type(bits) is not int:
        return "", f"AWQ integers of {described(bits)} bits, not 4"
    if str(version).lower() != "gemm":
        return "", f"AWQ integers packed as version {described(version)}, not gemm"
    if section.get("zero_point") is False:
        return "", "AWQ integers without zero points"
    if type(size) is not int or size not in (*GROUP_SIZES, -1):
        return "", f"AWQ integers in groups of {described(size)}"
    return f"{_AWQ}{Scheme('int', 4, size if size > 0 else None).name}", ""


def integers_among(kinds: Iterable[str]) -> list[str]:
    return sorted({kind for kind in kinds if is_integer(kind)})
