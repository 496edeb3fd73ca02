"""Which recipe a person asks for, before a checkpoint is known: a name or a file, and what is laid over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError, RecipeError
from .recipe import Recipe, build_recipe, named_recipe, read_recipe_file, scheme_recipe, with_requantize

DEFAULT = "awq"


@dataclass(frozen=True)
class RecipeChoice:
    """A recipe of m3quant by its name, of a file, or one scheme for all roles, with --set and --format laid over it.

    requantize: whether a source that is already in integers may be rounded again.
    """

    to: str | None = None
    file: Path | None = None
    settings: tuple[str, ...] = ()
    format: str | None = None
    requantize: bool = False
    scheme: str | None = None

    def __bool__(self) -> bool:
        """Whether anything was asked for."""
        return bool(self.to or self.file or self.settings or self.format or self.scheme)

    def recipe(self, config: Mapping[str, Any]) -> Recipe:
        """What it means for the checkpoint of that config.json; `DEFAULT` where nothing is named. Raises RecipeError."""
        named = {"--to": self.to, "--recipe": self.file, "--scheme": self.scheme}
        if len(given := [name for name, value in named.items() if value]) > 1:
            raise RecipeError(f"{' and '.join(given)} are both given: a run has one recipe.")
        document: Mapping[str, Any]
        if self.scheme:
            document = scheme_recipe(self.scheme)
        else:
            document = named_recipe(self.to or DEFAULT) if self.file is None else self._read(self.file, config)
        return with_requantize(build_recipe(document, settings=self.settings, format=self.format), self.requantize)

    def check_used(self, source: str, used: bool) -> None:
        """Raise OptionError where --requantize is given and allows nothing. used: whether weights of `source` are integers."""
        if self.requantize and not used:
            raise OptionError(
                f"--requantize takes a source whose weights are integers already, and those of {source} are floats: leave it out."
            )

    @staticmethod
    def _read(file: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
        from .llmcompressor import is_llmcompressor, translate

        document = read_recipe_file(file)
        if not is_llmcompressor(document):
            return document
        from ..families import family_of

        return translate(document, family_of(config), str(file))
