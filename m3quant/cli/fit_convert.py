"""convert --budget and --fit: their options, and what became of the prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from ..api.fitting import Answer
from ..runtime.hardware import MAX_COUNT
from .options import Length

F = TypeVar("F", bound=Callable[..., Any])

SERVING = ("context", "concurrency", "kv_dtype")


def fit_options(function: F) -> F:
    """--budget, --fit and what belongs to them."""
    tokens, length = click.IntRange(1, MAX_COUNT), Length()
    for option in reversed((
        click.option("--budget", metavar="SIZE", default=None, help="Size of the output: choose the best bits for every layer within it."),
        click.option("--fit", "node", metavar="NODE", default=None, help="Node for the output: choose the best bits that leave room for --context."),
        click.option("--context", "--max-model-len", "context", type=length, default=None, help="With --fit: tokens of one request. [32768]"),
        click.option("--concurrency", type=tokens, default=None, help="With --fit: requests of that length at once. [1]"),
        click.option("--kv-dtype", "--kv-cache-dtype", "kv_dtype", default=None, help="With --fit: auto, bfloat16, fp8, fp8_e4m3 or fp8_e5m2. [auto]"),
        click.option(
            "--sensitivity", "sensitivity_file", type=click.Path(path_type=Path), default=None,
            help="With --budget or --fit: read it if it exists, else measure and write it. [DST.sensitivity.json]",
        ),
    )):  # fmt: skip
        function = option(function)
    return function


def predicted_line(found: Answer, manifest: Mapping[str, Any]) -> str:
    """Predicted and measured KL divergence, for a person."""
    kl = found.chosen.kl if found.chosen else None
    quality = manifest.get("heldout")
    if kl is None or not quality:
        return ""
    return f"KL divergence: predicted {kl:.5f}, measured {quality['kl_mean']:.5f} on the held-out windows"
