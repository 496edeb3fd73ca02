"""The guard's settings: environment variables `M3QUANT_GUARD_*`, checked before the first request.

vLLM adds a middleware without arguments, so the environment is the only way in. A name that is not a setting is refused too: a
misspelt limit would otherwise be a limit that does not hold.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from m3quant.errors import GuardError

PREFIX = "M3QUANT_GUARD_"


def split_commas(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


Paths = Annotated[tuple[Annotated[str, Field(pattern=r"^/")], ...], BeforeValidator(split_commas)]
Keys = Annotated[tuple[SecretStr, ...], BeforeValidator(split_commas)]
Tokens = Annotated[int, Field(ge=1, le=2**40)]
Seconds = Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]


class GuardSettings(BaseModel):
    """Every setting, its default and its bounds. Token counts are KV cache tokens, times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # The pool. Read from vLLM in the same process; set these for another server.
    pool_tokens: Tokens | None = None
    block_size: Tokens | None = None
    max_model_len: Tokens | None = None
    watermark: float = Field(default=0.0, ge=0, lt=1, allow_inf_nan=False)

    # What a request is taken to need.
    reserve: Literal["all", "learned"] = "learned"
    count: Literal["tokenize", "bytes"] = "tokenize"
    tokenize_timeout_s: Seconds = 30.0
    tokenize_concurrency: int = Field(default=64, ge=1, le=1024)
    template_tokens: int = Field(default=512, ge=0, le=1_000_000)
    media_tokens: int = Field(default=16384, ge=1, le=10_000_000)
    default_max_tokens: Tokens | None = None
    oversize: Literal["refuse", "clamp"] = "refuse"
    prefix_hits: Literal["ignore", "count"] = "ignore"

    # Waiting.
    queue_tokens: int | None = Field(default=None, ge=0, le=2**40)
    queue_timeout_s: Seconds = 30.0
    send_timeout_s: Seconds = 15.0
    send_floor_bytes_s: int = Field(default=16384, ge=0, le=2**40)
    retry_after_s: Annotated[float, Field(ge=1, le=3600)] = 10.0

    # The door.
    api_keys: Keys = ()
    open_paths: Paths = ("/health", "/ping")
    max_body_bytes: int = Field(default=32 * 2**20, ge=1, le=2**40)

    # The watchdog.
    watchdog_s: Seconds = 60.0
    watchdog_interval_s: Annotated[float, Field(gt=0, le=3600)] = 2.0


def read_settings(environ: Mapping[str, str] | None = None) -> GuardSettings:
    """Settings from the environment (default `os.environ`).

    Raises GuardError, one sentence naming each wrong variable and what was wrong with it. Values of keys are never repeated.
    """
    environ = os.environ if environ is None else environ
    given = {name[len(PREFIX) :].lower(): value for name, value in environ.items() if name.startswith(PREFIX)}
    unknown = sorted(set(given) - set(GuardSettings.model_fields))
    if unknown:
        names = ", ".join(PREFIX + name.upper() for name in unknown)
        raise GuardError(f"{names}: the guard has no such setting; docs/guard.md lists them.")
    if "api_keys" in given and not split_commas(given["api_keys"]):
        # A variable that came out empty must not open the door.
        raise GuardError(f"{PREFIX}API_KEYS is set and holds no key: give one, or unset it to serve without.")
    try:
        return GuardSettings(**{name: value for name, value in given.items() if value.strip()})  # type: ignore[arg-type]
    except ValidationError as error:
        raise GuardError(describe(error)) from None


def describe(error: ValidationError) -> str:
    found = []
    for item in error.errors(include_input=True, include_url=False):
        name = str(item["loc"][0])
        shown = "" if name == "api_keys" else f"={item['input']!r}"
        found.append(f"{PREFIX}{name.upper()}{shown}: {item['msg'][:1].lower()}{item['msg'][1:]}")
    return "; ".join(found) + "."
