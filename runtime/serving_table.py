"""What a finished checkpoint serves on the standard nodes: the rows that `m3quant plan --all` and the model card show. Torch-free."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint
from .cost import decode_speed
from .fit import Ask, Fit, assess
from .hardware import STANDARD_NODES, parse_node
from .model import open_subject

SPEED_REQUESTS = (1, 4, 16)  # at once, for which a speed is shown where one was measured near
SPEED_CONTEXT = 4096  # tokens of each


@dataclass(frozen=True)
class MeasuredSpeed:
    """Decoded tokens per second in all, least and most, of `requests` at once, by figures measured near the plan; sources: of which,
    and whether they are of another GPU with the same chip."""

    requests: int
    context: int
    low: float
    high: float
    sources: tuple[str, ...]


@dataclass(frozen=True)
class ServingRow:
    """One node and KV dtype. pool_tokens: KV tokens that all requests share; longest_context: of one request, within the model's
    own limit; command: the engine's exact command line, '' where it does not fit; why_not: '' where it fits; speeds: empty where nothing
    near was measured."""

    node: str
    fits: bool
    kv_dtype: str
    pool_tokens: int
    longest_context: int
    command: str
    why_not: str
    speeds: tuple[MeasuredSpeed, ...] = ()


def serving_row(fit: Fit) -> ServingRow:
    return ServingRow(
        fit.node.name,
        fit.fits,
        fit.setup.kv_dtype,
        fit.pool.tokens,
        fit.longest_context,
        shlex.join(fit.command()) if fit.fits else "",
        fit.why_not,
        measured_speeds(fit),
    )


def measured_speeds(fit: Fit) -> tuple[MeasuredSpeed, ...]:
    """For as many requests at once as the pool holds."""
    found = []
    for requests in SPEED_REQUESTS:
        if fit.fits and requests <= fit.pool.concurrency(SPEED_CONTEXT):
            speed = decode_speed(fit, SPEED_CONTEXT, requests)
            if speed.near:
                found.append(MeasuredSpeed(requests, SPEED_CONTEXT, speed.low, speed.high, speed.near.sources))
    return tuple(found)


def serving_table(folder: Path, checkpoint: Checkpoint | None = None) -> list[ServingRow]:
    """Two rows per standard node, in order of size: the KV dtype that the checkpoint itself asks for, and FP8 where that differs.

    Reads config.json and headers only, unless `checkpoint` has them. Raises CheckpointError.
    """
    model = open_subject(str(folder), checkpoint=checkpoint).stored
    rows = []
    for name in STANDARD_NODES:
        fits = [assess(model, parse_node(name), Ask(kv_dtype=dtype)) for dtype in ("auto", "fp8")]
        rows += [serving_row(fit) for fit in (fits if fits[0].setup.kv_dtype != "fp8" else fits[:1])]
    return rows
