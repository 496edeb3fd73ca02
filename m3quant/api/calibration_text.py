"""Text to calibrate and to measure on: which sources, how much of them, and the windows of tokens that they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import RecipeError
from ..planning.calibration_text import run_groups
from ..planning.plan import Plan
from ..recipe.recipe import Recipe, with_data

if TYPE_CHECKING:
    from ..calibration.mixture import Part
    from ..calibration.windows import Windows


@dataclass(frozen=True)
class TextChoice:
    """Calibration text: sources ("file", "folder=2", ...; the bundled corpus without any), and how much of them."""

    sources: tuple[str, ...] = ()
    windows: int | None = None
    tokens: int | None = None
    window_length: int | None = None
    min_expert_tokens: int | None = None
    lengths: str | None = None

    def laid_over(self, recipe: Recipe, strict_coverage: bool) -> Recipe:
        """The recipe with these choices. Raises RecipeError where they contradict one another or the recipe uses no text."""
        windows = self.windows
        if self.tokens is not None:
            if windows is not None:
                raise RecipeError("--windows and --calibration-tokens both say how much text: give one of them.")
            length = self.window_length or recipe.data.window_length
            windows = -(-self.tokens // length)  # whole windows, and not fewer tokens than were asked for
        given = {"windows": windows, "window_length": self.window_length, "min_expert_tokens": self.min_expert_tokens, "lengths": self.lengths}  # fmt: skip
        changes = {key: value for key, value in given.items() if value is not None}
        if not recipe.calibrated and (changes or self.sources or strict_coverage):
            raise RecipeError(
                f"recipe '{recipe.name}' uses no calibration data: leave calibration options out, or use --to awq."
            )
        return with_data(recipe, changes)

    @property
    def says_how_much(self) -> bool:
        return bool(self.windows is not None or self.tokens is not None or self.sources)


def calibration_windows(plan: Plan, parts: Sequence[Part]) -> Windows:
    """Tokenized calibration and held-out windows for this plan. Raises CalibrationError for too little text."""
    from ..calibration.corpus import load_tokenizer
    from ..calibration.mixture import mixed_windows

    data = plan.recipe.data
    tokenizer = load_tokenizer(plan.checkpoint.files())
    rows = [group.rows for group in run_groups(plan) for _ in range(group.windows)]
    count = data.windows + data.heldout_windows
    return mixed_windows(parts, tokenizer, count, data.window_length, seed=data.seed, rows=rows or None)
