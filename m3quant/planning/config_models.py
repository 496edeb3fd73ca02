"""The `quantization_config` as compressed-tensors reads it: its own pydantic models, which forbid what they do not know.

The library imports torch, so it is imported only here and only when it is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import PlanError
from ..extras import installed
from ..running.complaints import complaint

LIBRARY = "compressed_tensors"


def library_version() -> str | None:
    """The release of compressed-tensors that is installed; None without it."""
    if not installed(LIBRARY):
        return None
    from importlib.metadata import version

    return version("compressed-tensors")


def model_problems(quantization: Mapping[str, Any]) -> list[str]:
    """What `QuantizationConfig` refuses of this section, one sentence each. Only for format compressed-tensors, and with the library."""
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    try:
        QuantizationConfig.model_validate(dict(quantization))
    except ValidationError as error:
        # A group may be a scheme or a list of targets; what the second form lacks says nothing about ours.
        found = [e for e in error.errors(include_url=False) if "list[str]" not in e["loc"]]
        return [complaint(_place(e["loc"]), e) for e in found or error.errors(include_url=False)]
    except Exception as error:  # a validator of the library's that met a shape which it did not expect
        return [f"{type(error).__name__}: {str(error)[:300]}"]
    return []


def _place(location: tuple[int | str, ...]) -> str:
    """pydantic's location as a path of keys, without the names of its validators."""
    return ".".join(str(part) for part in location if not str(part).startswith("function-"))


def check_config_model(quantization: Mapping[str, Any] | None) -> None:
    """Raise PlanError if the installed compressed-tensors would not read what is to be written. Nothing is checked without it."""
    if not quantization or quantization.get("quant_method") != "compressed-tensors" or not installed(LIBRARY):
        return
    if problems := model_problems(quantization):
        raise PlanError(
            f"compressed-tensors {library_version()} does not read the quantization_config that this recipe gives ({problems[0]}): "
            "choose another scheme, or install a release that knows it."
        )
