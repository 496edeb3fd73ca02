"""One answer under way: what its sequence may come to hold, and how far it is."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from .tally import Tally


@dataclass(eq=False)
class Growth:
    """One sequence: cache tokens of its prompt (with a draft's slots), output tokens at most, and how the answer goes so far."""

    prompt: int
    most: int
    name: Hashable
    tally: Tally = field(default_factory=Tally)
    began: float = 0.0  # by the referee's steps: when its first token was written
    likely: int = 0
    look: float = 0.0  # looked up again when the answer is this long,
    # or, while it waits, when more is known than this: answers of its class, and the share of them
    lore: tuple[int, float] = (0, 0.0)

    def written(self, steps: float) -> float:
        """Tokens written, by what has passed here or by the engine's steps, whichever is more: streams may come in lumps, plain answers at the end."""
        return min(float(self.most), max(float(self.tally.tokens), steps - self.began, 0.0))
