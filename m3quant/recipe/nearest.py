"""What a person meant by a recipe that does not exist: other tools' names first, then the nearest spelling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_INTEGERS = re.compile(r"(?:int|w)?([2-8])(?:[-_ ]?bits?)?(?:a16)?")
# Names of methods and formats elsewhere -> what to give here.
_ELSEWHERE = {
    r"w4a16(_asym)?|awq[-_]?int4|int4[-_]?awq": "--to awq, or --scheme W4A16 for every linear layer in INT4",
    r"gptq.*|gptaq|sparsegpt": "--to awq, which feeds rounding errors back as GPTQ does",
    r"auto[-_]?round|sinq|quip.*|aqlm|hqq|spinquant|smoothquant": "--to awq, which rounds with fed-back errors",
    r"rtn|round[-_]to[-_]nearest": "--to int4, which rounds to nearest",
    r"fp8[-_]?(dynamic|channel|per[-_]?channel|w8a8)|w8a8": "--to fp8",
    r"fp8[-_]?(blockwise|blocks?)|deepseek.*": "--to fp8-block",
    r"nvfp4.*|mxfp4.*|fp4|mxfp8": "--to awq or --to fp8; FP4 and MXFP8 are read and not written",
    r"gguf|q[2-8]_.*|exl[23]|mlx|bnb|bitsandbytes|nf4": "--to awq; this format is not written",
    r"fit": "m3quant fit, or --fit NODE",
}  # fmt: skip


def meant(name: str, known: Sequence[str]) -> str:
    """The middle of a sentence: "did you mean --to awq?"."""
    lower = name.strip().lower()
    if lower in known:
        return f"did you mean --to {lower}?"
    for pattern, remedy in _ELSEWHERE.items():
        if re.fullmatch(pattern, lower):
            return f"did you mean {remedy}?"
    if found := _INTEGERS.fullmatch(lower):
        bits = found[1]
        asym = "-asym" if bits in "235" else ""
        return f"did you mean --to awq --set routed_experts=int{bits}-g128{asym}, with the experts in {bits} bits?"
    near = difflib.get_close_matches(lower, known, n=1, cutoff=0.6)
    return f"did you mean --to {near[0]}?" if near else "m3quant recipes lists them with what each does."
