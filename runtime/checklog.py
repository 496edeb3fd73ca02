"""A prediction beside an engine's start-up log, line by line: which quantity is off, by how much, and which constant to correct."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import NodeError
from .enginelog import EngineLog, is_empty
from .fit import Ask, Fit, assess
from .hardware import GIB, Gpu, Node
from .memory import Estimate, pool_of
from .model import ServedModel

EXACT = 0.01  # what headers and formulae give: weights, bytes per token, sizes that follow from them
TOLERATED = 0.05  # a promised pool may be smaller than the promise by this much before it is called broken
ROUNDING = int(0.006 * GIB)  # logs print two decimals


@dataclass(frozen=True)
class Line:
    """One comparison. predicted: expected, with low and high where it is a range; unit: 'GiB', 'tokens' or 'bytes/token'."""

    name: str
    unit: str
    low: float
    predicted: float
    high: float
    measured: float
    holds: bool
    constant: str

    @property
    def off(self) -> float:
        """Relative difference of the measured value from the predicted one."""
        return self.measured / self.predicted - 1 if self.predicted else math.inf if self.measured else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "off": self.off if math.isfinite(self.off) else None}


@dataclass(frozen=True)
class LogCheck:
    """All comparisons that the log allows."""

    log: EngineLog
    fit: Fit
    lines: list[Line]

    @property
    def holds(self) -> bool:
        return all(line.holds for line in self.lines)


def asked_by(log: EngineLog, ask: Ask) -> Ask:
    """`ask` with the settings that the log states laid under it: what the user gave on the command line stays."""
    changes: dict[str, Any] = {}
    if log.setting("tensor_parallel_size") and not (ask.tp or ask.pp):
        changes |= {"tp": log.tp, "pp": log.pp}
    for name, key in (
        ("max_num_seqs", "max_num_seqs"),
        ("max_num_batched_tokens", "max_num_batched_tokens"),
        ("block_size", "block_size"),
    ):
        value = log.setting(key)
        if value and value.isdigit() and getattr(ask, name) == getattr(Ask(), name):
            changes[name] = int(value)
    kv = log.setting("kv_cache_dtype")
    if kv and kv != "auto" and ask.kv_dtype == "auto":
        changes["kv_dtype"] = kv.removeprefix("torch.")
    if (index := log.setting("indexer_kv_dtype")) and ask.index_dtype == Ask().index_dtype:
        changes["index_dtype"] = index
    utilization = log.utilization or _float(log.setting("gpu_memory_utilization"))
    if utilization and ask.utilization == Ask().utilization:
        changes["utilization"] = utilization
    return replace(ask, **changes)


def _float(text: str | None) -> float | None:
    """None for what is no number, such as auto."""
    try:
        return float(text or "")
    except ValueError:
        return None


def check_log(model: ServedModel, log: EngineLog, node: Node | None, ask: Ask) -> LogCheck:
    """Compare. Without a node, one is made of the log's own memory total and rank count. Raises NodeError where neither tells, or
    where nothing can be compared."""
    if is_empty(log):
        raise NodeError(
            "the log holds none of vLLM's memory lines: give the output of a start-up, with INFO logging on."
        )
    ask = asked_by(log, ask)
    if node is None:
        if log.total is None and not (log.kv_available or log.kv_pinned):
            raise NodeError("the log does not state the GPU's memory: say which node it is from with --on.")
        ranks = (ask.tp or 1) * (ask.pp or 1)
        node = Node(ranks, Gpu("the log's GPU", log.total or 0, 0.0, "the log", "unknown"))
    elif log.total is not None:
        node = Node(node.count, replace(node.gpu, total_bytes=log.total))
    fit = assess(model, node, ask)
    lines = list(_lines(log, fit))
    if not lines:  # nothing that could be off is no agreement
        raise NodeError(
            "the log states no size that the prediction covers: give the whole start-up, or say with --on which node it is from."
        )
    return LogCheck(log, fit, lines)


def _lines(log: EngineLog, fit: Fit) -> Iterator[Line]:
    rank = max(fit.prediction.ranks, key=lambda r: r.weight_bytes)
    if log.weights is not None and rank.weight_bytes:
        yield _exact(
            "weights per GPU",
            "GiB",
            rank.weight_bytes / GIB,
            log.weights / GIB,
            "weights: the split of a role over ranks",
            ROUNDING / GIB,
        )
    if log.non_torch is not None:
        yield _range("non-torch", rank.non_torch, log.non_torch, "NON_TORCH")
    elif log.consumed is not None:
        both = log.consumed - (log.weights or rank.weight_bytes)
        yield _range("consumed beyond weights (non-torch, allocator)", rank.non_torch, both, "NON_TORCH")
    if log.activation is not None:
        # The three-part line (0.32 and later) counts the estimate of the graphs into the peak, the four-part line does not.
        inside = (log.graphs_estimated or 0) if log.consumed is not None else 0
        yield _range(
            "peak activation",
            rank.activation,
            max(0, log.activation - inside),
            "ACTIVATION_RANGE, SAMPLER_COPIES, HIDDEN_COPIES",
        )
    reserved = log.graphs_estimated if log.graphs_estimated is not None else log.graphs
    if reserved is not None:
        yield _range("CUDA graphs, as reserved", rank.graphs, reserved, "GRAPHS_BASE, GRAPHS_PER_SIZE")
    yield from _cache_lines(log, fit)


def _cache_lines(log: EngineLog, fit: Fit) -> Iterator[Line]:
    prediction, ranks = fit.prediction, fit.prediction.ranks
    per_token, block = max(r.bytes_per_token for r in ranks), fit.setup.block_size
    if log.kv_available is not None and fit.node.gpu.total_bytes and log.kv_pinned is None:
        kv = [min(r.kv_bytes(getattr(r.overhead, which)) for r in ranks) / GIB for which in ("high", "expected", "low")]
        holds = (
            kv[0] * (1 - TOLERATED) - ROUNDING / GIB
            <= log.kv_available / GIB
            <= kv[2] * (1 + TOLERATED) + ROUNDING / GIB
        )
        yield Line(
            "available for the KV cache",
            "GiB",
            kv[0],
            kv[1],
            kv[2],
            log.kv_available / GIB,
            holds,
            "the sum of the lines above",
        )
    if log.needed and log.needed_for:
        needed = math.ceil(log.needed_for / block) * block * per_token
        yield _exact(
            f"KV cache for {log.needed_for:,} tokens",
            "GiB",
            needed / GIB,
            log.needed / GIB,
            "bytes per token: KV or index dtype, heads per rank",
            ROUNDING / GIB,
        )
    available = log.kv_available or log.kv_pinned
    if log.estimated_max_len and available:
        yield _exact(
            "longest context by the engine's own memory",
            "tokens",
            available / per_token,
            log.estimated_max_len,
            "bytes per token",
            block,
        )
    if log.pool_tokens and available:
        pool = pool_of([available] * len(ranks), [r.bytes_per_token for r in ranks], block)
        tokens = pool.engine_tokens(log.max_model_len or fit.context or block)
        rounding = ROUNDING / per_token + block
        yield _exact(
            "KV tokens by the engine's own memory",
            "tokens",
            tokens,
            log.pool_tokens,
            "bytes per token: KV or index dtype, heads per rank",
            rounding,
        )
    if log.pool_tokens and fit.node.gpu.total_bytes and log.kv_pinned is None:
        length = log.max_model_len or fit.context or block
        low, expected, high = (prediction.pool(which).engine_tokens(length) for which in ("high", "expected", "low"))
        holds = low * (1 - TOLERATED) <= log.pool_tokens <= high * (1 + TOLERATED)
        yield Line("KV pool", "tokens", low, expected, high, log.pool_tokens, holds, "the sum of the lines above")


def _exact(name: str, unit: str, predicted: float, measured: float, constant: str, rounding: float) -> Line:
    holds = abs(measured - predicted) <= EXACT * predicted + rounding
    return Line(name, unit, predicted, predicted, predicted, measured, holds, constant)


def _range(name: str, estimate: Estimate, measured: int, constant: str) -> Line:
    holds = estimate.low - ROUNDING <= measured <= estimate.high + ROUNDING
    return Line(
        name, "GiB", estimate.low / GIB, estimate.expected / GIB, estimate.high / GIB, measured / GIB, holds, constant
    )
