"""Choices for serving on one node, as YAML that a user copies and edits: recipes/serve-*.yaml. Options on the command line win."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from ..engines import DEFAULT, NAMES
from ..engines.device import GIB
from ..errors import RecipeError
from ..recipe.recipe import read_recipe_file, recipe_folder
from ..running.complaints import complaint, given, key_of
from ..running.words import parse_size
from .draft import MAX_TOKENS
from .fit import Ask
from .hardware import MAX_COUNT, MAX_GIB


def _number(value: Any) -> Any:
    """YAML's yes and true are no numbers, though Python takes them for 1. Raises ValueError."""
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "a number")
    return value


def _word(value: str) -> str:
    if not value or any(map(str.isspace, value)):
        raise PydanticCustomError("word", "write one word, without white space")
    return value


def _size(value: Any) -> Any:
    """'100GiB' as bytes. Raises ValueError."""
    return parse_size(value) if isinstance(value, str) else _number(value)


Count = Annotated[int, BeforeValidator(_number), Field(ge=1, le=MAX_COUNT)]
Word = Annotated[str, AfterValidator(_word)]  # what an engine's argument may be
Size = Annotated[int, BeforeValidator(_size), Field(ge=0, le=MAX_GIB * GIB)]
SECRET_FLAGS = {
    "--api-key": "name the key's variable with --api-key-env",
    "--hf-token": "set the variable HF_TOKEN",
}


class ServeRecipe(BaseModel):
    """How one node serves. None: chosen by the plan. guard_settings: lower-case names of M3QUANT_GUARD_* variables."""

    model_config = ConfigDict(extra="forbid")

    name: str = "defaults"
    node: str | None = None  # as in --on; YAML would read a key `on` as true
    engine: str = DEFAULT.name
    context: Count | None = None
    concurrency: Count = 1
    kv_dtype: str = "auto"
    index_dtype: str = "bfloat16"
    tp: Count | None = None
    pp: Count | None = None
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count = DEFAULT.memory.batched_tokens
    utilization: float = Field(default=DEFAULT.memory.utilization, gt=0, le=1)
    vision: bool = False
    draft: Annotated[str, Field(min_length=1)] | None = None  # a folder or Hub repo
    kv_offload: Size | None = None
    weight_offload: Size | None = None
    slow_offload: bool = False
    draft_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    watermark: float = Field(default=0.02, ge=0, lt=1)
    shutdown_timeout: int = Field(default=60, ge=0, le=3600)
    start_timeout: Count = 3600
    host: Word = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    served_name: Word | None = None
    guard: bool = True
    guard_settings: dict[str, str | int | float] = Field(default_factory=dict)
    extra: list[str] = Field(default_factory=list)  # more arguments for the engine, as they are

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, engine: str) -> str:
        if engine not in NAMES:
            raise PydanticCustomError("literal_error", "{expected}", {"expected": " or ".join(map(repr, NAMES))})
        return engine

    @field_validator("extra")
    @classmethod
    def _no_key(cls, extra: list[str]) -> list[str]:
        for argument in extra:  # also as the engines' parsers take them: abbreviated, with underscores
            name = argument.split("=")[0].replace("_", "-")
            for flag, instead in SECRET_FLAGS.items():
                if len(name) > 5 and flag.startswith(name):
                    raise PydanticCustomError("secret", f"{flag} would be printed with its secret: {instead}")
        return extra

    def ask(self) -> Ask:
        """The part that the plan needs, but for the draft, which must be opened."""
        return Ask(
            self.context, self.concurrency, self.kv_dtype, self.index_dtype, self.tp, self.pp, self.max_num_seqs, self.max_num_batched_tokens,
            self.utilization, self.vision, engine=self.engine, kv_offload=self.kv_offload or 0, weight_offload=self.weight_offload or 0,
            slow_offload=self.slow_offload,
        )  # fmt: skip


def serving_recipe_names() -> list[str]:
    """Those that ship."""
    return sorted(file.stem for file in recipe_folder().glob("serve-*.yaml"))


def load_serve_recipe(path: str | Path | None, overrides: dict[str, Any]) -> ServeRecipe:
    """The recipe in `path` (a file, or the name of one that ships, such as serve-1xh200) with `overrides` applied.

    Raises RecipeError with the key that is wrong and the nearest valid one.
    """
    document: dict[str, Any] = {}
    if path is not None:
        shipped = recipe_folder() / f"{path}.yaml"
        if not Path(path).exists() and not shipped.exists():
            names = ", ".join(serving_recipe_names())
            raise RecipeError(f"serving recipe {path} does not exist: give a YAML file, or one of {names}.")
        document = read_recipe_file(path if Path(path).exists() else shipped)
    try:
        return ServeRecipe.model_validate({**document, **{k: v for k, v in overrides.items() if v is not None}})
    except ValidationError as error:
        first = error.errors()[0]
        where = key_of(first)
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, ServeRecipe.model_fields, n=1, cutoff=0.0)[0]
            raise RecipeError(f"serving recipe has an unknown key '{where}': did you mean '{near}'?") from None
        got = "" if first["type"] == "secret" else given(first)
        raise RecipeError(complaint(f"serving recipe key '{where}'", first) + f"{got}.") from None
