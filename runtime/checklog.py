"""A prediction compared with an engine's start-up log, line by line: which quantity is off, by how much, and which constant to correct."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..engines import engine_named
from ..engines.device import GIB, Gpu
from ..engines.memory import Estimate, gib
from ..engines.start_log import CACHE, OVERHEAD, WEIGHTS, EngineLog, LogReader, is_empty, is_true, whole_number
from ..errors import NodeError
from .fit import Ask, Fit, assess
from .hardware import Node
from .memory import kv_dtype_of, pool_of
from .model import ServedModel

EXACT = 0.01  # what headers and formulae give: weights, bytes per token, sizes that follow from them
TOLERATED = 0.05  # a promised pool may be smaller than the promise by this much before it is called broken
ROUNDING = int(0.006 * GIB)  # logs print two decimals
LOADING_BUFFERS = gib(0.0, 0.0, 1.0, "what replicas allocate for their all-to-all while they load; not measured here")


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
    parts: tuple[str, ...] = ()  # what the prediction is made of: WEIGHTS, CACHE, OVERHEAD

    @property
    def off(self) -> float:
        """Relative difference of the measured value from the predicted one."""
        return self.measured / self.predicted - 1 if self.predicted else math.inf if self.measured else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "off": self.off if math.isfinite(self.off) else None}


@dataclass(frozen=True)
class LogCheck:
    """All comparisons that the log allows. uncompared: settings that the prediction does not cover, and what they change; the
    lines that depend on it are left out."""

    log: EngineLog
    fit: Fit
    lines: list[Line]
    uncompared: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return all(line.holds for line in self.lines)


def log_reader(engine: str) -> LogReader:
    """Raises NodeError for an engine without a log reader."""
    found = engine_named(engine)
    if found.log is None:
        raise NodeError(f"{found.title}'s log is not read here: there is nothing to compare.")
    return found.log


def asked_by(log: EngineLog, ask: Ask, gpu: Gpu | None = None) -> Ask:
    """`ask` with the settings that the log states laid under it: what the user gave on the command line stays.

    Where the log prints the arguments, what they lack is the engine's default on `gpu`, not m3quant's.
    """
    changes: dict[str, Any] = {}
    reader = log_reader(ask.engine)
    if (log.setting("tensor_parallel_size") or log.arguments) and not (ask.tp or ask.pp):
        changes |= {"tp": log.tp, "pp": log.pp}
    changes |= {"dp": log.dp, "dcp": log.dcp, "enforce_eager": is_true(log.setting("enforce_eager"))}
    if log.arguments or log.setting("enable_expert_parallel"):
        changes["expert_parallel"] = is_true(log.setting("enable_expert_parallel"))
    tokens, seqs = reader.server_defaults(gpu) if log.arguments and gpu else (None, None)
    for key, default in (("max_num_seqs", seqs), ("max_num_batched_tokens", tokens), ("block_size", None)):
        value = log.setting(key)
        if getattr(ask, key) == getattr(Ask(), key) and (stated := whole_number(value or "") or default):
            changes[key] = stated
    if ask.vision is None and (vision := reader.vision(log)) is not None:
        changes["vision"] = vision
    kv = log.setting("kv_cache_dtype")
    if kv and kv != "auto" and ask.kv_dtype == "auto":
        changes["kv_dtype"] = kv
    if (index := log.setting("indexer_kv_dtype")) and ask.index_dtype == Ask().index_dtype:
        changes["index_dtype"] = index
    utilization = log.utilization or _float(log.setting("gpu_memory_utilization"))
    if utilization and ask.utilization == Ask().utilization:
        changes["utilization"] = utilization
    if ask.release is None:
        changes["release"] = log.version
    return replace(ask, **changes)


def _float(text: str | None) -> float | None:
    """None for what is no number, such as auto."""
    try:
        return float(text or "")
    except ValueError:
        return None


def check_log(model: ServedModel, log: EngineLog, node: Node | None, ask: Ask) -> LogCheck:
    """Compare. Without a node, one is made of the log's own memory total and rank count. Raises NodeError if neither states them, or
    where nothing can be compared."""
    if is_empty(log):
        raise NodeError(
            f"the log holds none of {engine_named(ask.engine).title}'s memory lines: give the output of a start-up, with INFO logging on."
        )
    gpu = replace(node.gpu, total_bytes=log.total or node.gpu.total_bytes) if node else None
    ask = asked_by(log, ask, gpu or Gpu("the log's GPU", log.total or 0, 0.0, "the log", "unknown"))
    ask, uncompared = _covered(log, ask, model)
    if node is None:
        if log.total is None and not (log.kv_available or log.kv_pinned):
            raise NodeError("the log does not state the GPU's memory: say which node it is from with --on.")
        ranks = (ask.tp or 1) * (ask.pp or 1) * ask.dp
        node = Node(ranks, Gpu("the log's GPU", log.total or 0, 0.0, "the log", "unknown"))
    elif log.total is not None:
        node = Node(node.count, replace(node.gpu, total_bytes=log.total))
    fit = assess(model, node, ask)
    changed = {part for parts in uncompared.values() for part in parts}
    lines = [line for line in _lines(log, fit) if not changed & set(line.parts)]
    if not lines and uncompared:
        raise NodeError(f"nothing of this log can be compared: the prediction does not cover {', '.join(uncompared)}.")
    if not lines:  # nothing that could be off is no agreement
        raise NodeError(
            "the log states no size that the prediction covers: give the whole start-up, or say with --on which node it is from."
        )
    return LogCheck(log, fit, lines, uncompared)


def _covered(log: EngineLog, ask: Ask, model: ServedModel) -> tuple[Ask, dict[str, tuple[str, ...]]]:
    """`ask` without what the prediction does not know, and that: `setting=value` -> what it changes."""
    found = log_reader(ask.engine).uncovered(log.settings)
    if ask.draft is not None:  # then its weights, cache and logits are in the prediction
        found = {name: parts for name, parts in found.items() if not name.startswith("speculative_config")}
    if ask.weight_offload:  # then what is on the host is left out of the weights
        found = {name: parts for name, parts in found.items() if not name.startswith(("cpu_offload", "offload"))}
    if not ask.vision:
        found = {name: parts for name, parts in found.items() if not name.startswith("mm_encoder_tp_mode")}
    if model.label == "bf16" and (method := log.setting("quantization")) and method.lower() not in ("none", "null"):
        found[f"quantization={method}"] = (WEIGHTS,)  # of BF16 weights the engine makes others while it loads them
    memory = engine_named(ask.engine).memory
    if memory.kv_name(kv_dtype_of(model.config, ask.kv_dtype)) not in memory.kv_bytes:
        found[f"kv_cache_dtype={ask.kv_dtype}"] = (CACHE,)
        ask = replace(ask, kv_dtype="bfloat16")
    if memory.index_name(ask.index_dtype) not in memory.index_bytes:
        found[f"indexer_kv_dtype={ask.index_dtype}"] = (CACHE,)
        ask = replace(ask, index_dtype=Ask().index_dtype)
    return ask, found


def _lines(log: EngineLog, fit: Fit) -> Iterator[Line]:
    rank = max(fit.prediction.ranks, key=lambda r: r.weight_bytes)
    if log.weights is not None and rank.weight_bytes:
        yield _weights(rank.weight_bytes, log.weights, fit.setup.split.dp)
    if log.non_torch is not None:
        yield _range("non-torch", rank.non_torch, log.non_torch, "non_torch_*, workspace")
    elif log.consumed is not None:
        both = log.consumed - (log.weights or rank.weight_bytes)
        yield _range("consumed beyond weights (non-torch, allocator)", rank.non_torch, both, "non_torch_*, workspace")
    if log.activation is not None:
        # The three-part line (0.32 and later) counts the estimate of the graphs into the peak, the four-part line does not.
        inside = (log.graphs_estimated or 0) if log.consumed is not None else 0
        yield _range(
            "peak activation",
            rank.activation,
            max(0, log.activation - inside),
            "activation, SAMPLER_COPIES, HIDDEN_COPIES",
        )
    reserved = log.graphs_estimated if log.graphs_estimated is not None else log.graphs
    if reserved is not None:
        yield _range("CUDA graphs, as reserved", rank.graphs, reserved, "graphs")
    yield from _cache_lines(log, fit)


def _cache_lines(log: EngineLog, fit: Fit) -> Iterator[Line]:
    prediction, ranks = fit.prediction, fit.prediction.ranks
    per_token, dcp = max(r.bytes_per_token for r in ranks), fit.setup.split.dcp
    block = fit.setup.block_size * dcp  # tokens, of which each rank keeps its share
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
            (WEIGHTS, OVERHEAD),
        )
    if log.needed and log.needed_for:
        needed = math.ceil(log.needed_for / block) * block // dcp * per_token
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
            available / per_token * dcp,
            log.estimated_max_len,
            "bytes per token",
            block,
        )
    if log.pool_tokens and available:
        pool = pool_of([available] * len(ranks), [r.bytes_per_token for r in ranks], fit.setup.block_size, dcp)
        tokens = pool.engine_tokens(log.max_model_len or fit.context or block)
        rounding = ROUNDING / per_token * dcp + block
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
        blame, parts = "the sum of the lines above", (WEIGHTS, CACHE, OVERHEAD)
        yield Line("KV pool", "tokens", low, expected, high, log.pool_tokens, holds, blame, parts)


def _weights(predicted: int, measured: int, dp: int) -> Line:
    slack = LOADING_BUFFERS.high if dp > 1 else 0
    low, high = predicted * (1 - EXACT) - ROUNDING, predicted * (1 + EXACT) + slack + ROUNDING
    return Line(
        "weights per GPU", "GiB", predicted / GIB, predicted / GIB, (predicted + slack) / GIB, measured / GIB, low <= measured <= high,
        "weights: the split of a role over ranks", (WEIGHTS,),
    )  # fmt: skip


def _exact(name: str, unit: str, predicted: float, measured: float, constant: str, rounding: float) -> Line:
    """A size that follows from the bytes of a token."""
    holds = abs(measured - predicted) <= EXACT * predicted + rounding
    return Line(name, unit, predicted, predicted, predicted, measured, holds, constant, (CACHE,))


def _range(name: str, estimate: Estimate, measured: int, constant: str) -> Line:
    holds = estimate.low - ROUNDING <= measured <= estimate.high + ROUNDING
    low, expected, high = (size / GIB for size in (estimate.low, estimate.expected, estimate.high))
    return Line(name, "GiB", low, expected, high, measured / GIB, holds, constant, (OVERHEAD,))
