"""The Python API: what each command does, as a function that returns a value and prints nothing.

    from m3quant.api import convert, evaluate, fit, plan, verify

    planned = plan("MiniMaxAI/MiniMax-M3", "awq")        # headers only; needs no torch
    done = convert("m3", "m3-awq", "awq", device="cuda")
    assert verify("m3-awq", "m3").holds
    record = evaluate("m3-awq", "m3").record

Sources are folders or Hub ids. Refusals are subclasses of `m3quant.errors.M3QuantError`, each a sentence with what is wrong,
where, and what to do; wrong options are refused before anything is read. A long function takes `progress`, a factory:
called with a label, it gives a context manager of a `m3quant.running.progress.Progress`; without it nothing is shown.

A name is imported when it is first used, so that planning loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion import Conversion, convert
    from .evaluation import Comparison, Evaluation, compare, evaluate
    from .fitting import Answer, fit
    from .planning import plan
    from .verification import verify

__all__ = [
    "Answer",
    "Comparison",
    "Conversion",
    "Evaluation",
    "compare",
    "convert",
    "evaluate",
    "fit",
    "plan",
    "verify",
]

_MODULES = {
    "Answer": "fitting",
    "Comparison": "evaluation",
    "Conversion": "conversion",
    "Evaluation": "evaluation",
    "compare": "evaluation",
    "convert": "conversion",
    "evaluate": "evaluation",
    "fit": "fitting",
    "plan": "planning",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
