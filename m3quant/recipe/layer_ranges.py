"""Sets of layers in text form: "0-3,7". Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import RecipeError
from ..families.config import MAX_LAYERS as MOST_LAYERS

_LONGEST = 4 * 5 * MOST_LAYERS  # characters: every layer by itself, with a blank or two
_PART = re.compile(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5})\s*)?")


def parse_layers(text: str, where: str) -> list[int]:
    """Layers of "0-3,7", numbered from 0, each once and in order. Raises RecipeError, which begins with `where`."""
    found: set[int] = set()
    for part in text.split(",") if len(text) <= _LONGEST else [text]:
        match = _PART.fullmatch(part)
        if match is None:
            raise RecipeError(
                f'{where}: {part[:40]!r} is no layer and no range of layers; write numbers from 0 on, for example "0-3,7".'
            )
        first = int(match[1])
        last = int(match[2] or first)
        if not first <= last < MOST_LAYERS:
            raise RecipeError(
                f"{where}: {part.strip()!r} is no range of layers from 0 to {MOST_LAYERS - 1}, the lower number first."
            )
        found.update(range(first, last + 1))
    return sorted(found)


def show_layers(layers: Iterable[int]) -> str:
    """The inverse of `parse_layers`: "0-3,7" of [0, 1, 2, 3, 7]."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
