"""Running a tokenizer from other people: the size of its results is bounded, and errors of its library become one sentence.

tokenizer.json is a program of replacements: 30 lines of "a becomes aa" make a gigabyte of one letter, in a library that cannot be
interrupted. So the growth is computed from the file before a text is given to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from m3quant.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters that one may become. ByteLevel makes two of a byte; released tokenizers have it once, and replace one character by one.
MOST_GROWTH = 64.0


def check_growth(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise CalibrationError where the steps before the model could make a text more than MOST_GROWTH times as long."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    steps = [
        json.loads(part.__getstate__()) for part in (backend.normalizer, backend.pre_tokenizer) if part is not None
    ]
    found = math.prod(map(growth, steps))
    if found > MOST_GROWTH:
        raise CalibrationError(
            f"The tokenizer of {where} can make {found:.3g} characters of one (its normalizer and pre_tokenizer in tokenizer.json): "
            "compare the file with the model's own."
        )


def growth(step: Mapping[str, Any]) -> float:
    """Characters that a step of tokenizer.json makes of one at most."""
    inner = step.get("normalizers") or step.get("pretokenizers")
    if isinstance(inner, list):
        return math.prod(map(growth, inner))
    if step.get("type") == "ByteLevel":
        return 2.0
    if step.get("type") != "Replace":
        return 1.0
    pattern, content = step["pattern"], len(step["content"])
    if "String" in pattern:
        return max(1.0, content / max(1, len(pattern["String"])))
    return 1.0 + content  # a regex may match nothing, between any two characters


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text, no special tokens added. Raises CalibrationError for whatever the tokenizer's library raises."""
    try:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except BaseException as error:
        # A Rust panic, such as its regex engine's own limit, is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CalibrationError(
            f"The tokenizer fails on a text of {len(text):,} characters ({reason}): compare its tokenizer files with the model's own."
        ) from None
