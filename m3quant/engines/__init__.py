"""The engines that serve and load checkpoints, one package each. To add one: write its package, and list it here.

They are below planning, which asks them what they read. They import families, checkpoint and schemes, no torch, and nothing of
an engine itself.
"""

from __future__ import annotations

from ..errors import OptionError
from .base import Engine, Launch, Serving, StartOptions
from .installed import Installed
from .sglang import SGLang
from .vllm import Vllm

ENGINES: tuple[Engine, ...] = (Vllm(), SGLang())
DEFAULT = ENGINES[0]
NAMES = tuple(engine.name for engine in ENGINES)


def engine_named(name: str) -> Engine:
    """Raises OptionError for a name that no engine has."""
    for engine in ENGINES:
        if engine.name == name:
            return engine
    raise OptionError(f"there is no engine '{name}': choose one of {', '.join(NAMES)}.")


__all__ = ["DEFAULT", "ENGINES", "NAMES", "Engine", "Installed", "Launch", "Serving", "StartOptions", "engine_named"]
