"""Prompts of a bench that are text: what a draft model guesses depends on it. Each point gets texts of its own, so that no prefix is cached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.bounded import TEXT_BYTES, read_text
from ..checkpoint.strict_json import parse_object
from ..errors import CheckpointError, OptionError

# Load generators leave out prompts outside bounds of their own without a word (vLLM's ShareGPT reader: 4 to 1,024 tokens, 2,048 with the
# answer). A token has at least a byte, a word at least a token.
LEAST_WORDS, MOST_BYTES, MOST_OUTPUT = 4, 1000, 1024


def read_texts(path: Path) -> list[str]:
    """The prompts of a file of JSON lines, each {"prompt": "..."}. Raises OptionError with the line that is wrong."""
    texts = []
    for number, line in enumerate(read_text(path, TEXT_BYTES, error=OptionError, follow=True).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            text = parse_object(line.encode(), where, "Write one object a line.").get("prompt")
        except CheckpointError as error:
            raise OptionError(str(error)) from None
        if not isinstance(text, str) or len(text.split()) < LEAST_WORDS or len(text.encode()) > MOST_BYTES:
            raise OptionError(
                f"{where}: 'prompt' must be a text of at least {LEAST_WORDS} words and at most {MOST_BYTES:,} bytes."
            )
        texts.append(text)
    return texts


def shares(path: Path, texts: Sequence[str], counts: Sequence[int]) -> list[list[str]]:
    """As many texts for each point as it has requests, none twice. Raises OptionError where there are too few."""
    if len(texts) < sum(counts):
        raise OptionError(
            f"{path} has {len(texts):,} prompts, but {sum(counts):,} are needed, none of them twice: give more, or fewer --rounds."
        )
    out, begin = list[list[str]](), 0
    for count in counts:
        out.append(list(texts[begin : begin + count]))
        begin += count
    return out
