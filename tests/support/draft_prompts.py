"""Prompts for a draft: pieces of held-out text, which neither the fixtures nor their draft were trained on."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.paths import FIXTURES

CHARACTERS = 240


def prompts(count: int) -> list[str]:
    """`count` pieces of heldout.txt, evenly spaced, each from the beginning of a word."""
    text = (FIXTURES / "heldout.txt").read_text("utf-8")
    found = []
    for number in range(count):
        begin = text.index(" ", number * len(text) // count) + 1
        found.append(text[begin : begin + CHARACTERS])
    return found


def write_prompts(path: Path, count: int) -> Path:
    """As `bench --texts` reads them."""
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts(count)), encoding="utf-8")
    return path
