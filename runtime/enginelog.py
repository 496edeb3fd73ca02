"""vLLM's start-up log as numbers. The lines changed over releases; each pattern names the releases that print it.

Multi-rank logs repeat a line per worker: weights take the largest, cache memory the smallest, as the engine does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .hardware import GIB
from .logsettings import read_settings

# Bounded: longer numbers are none of an engine, and Python reads them as infinite or not at all.
_N = r"(-?[0-9][0-9,]{0,24}(?:\.[0-9]{1,12})?)"
_DIGITS = 18
_G = rf"{_N} Gi?B"


@dataclass
class EngineLog:
    """What a log said; None where it said nothing. Sizes in bytes, per GPU."""

    version: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    arguments: bool = False  # the arguments were printed: a setting that is absent has the engine's default
    other_settings: list[str] = field(default_factory=list)  # names of arguments that the prediction does not read
    vision: bool = False  # the vision tower was profiled
    total: int | None = None
    free_at_start: int | None = None
    requested: int | None = None
    utilization: float | None = None
    weights: int | None = None
    consumed: int | None = None  # weights + non-torch (0.33's wording)
    non_torch: int | None = None
    activation: int | None = None
    graphs: int | None = None
    graphs_estimated: int | None = None
    kv_available: int | None = None
    kv_pinned: int | None = None
    pool_tokens: int | None = None
    max_model_len: int | None = None
    concurrency: float | None = None
    needed_for: int | None = None  # the length that did not fit, with the bytes it needs and the longest that would
    needed: int | None = None
    estimated_max_len: int | None = None
    fitted_len: int | None = None
    suggested_pin: int | None = None
    sparse_attention: str | None = None
    no_memory: bool = False

    @property
    def tp(self) -> int:
        return self._count("tensor_parallel_size")

    @property
    def pp(self) -> int:
        return self._count("pipeline_parallel_size")

    @property
    def dp(self) -> int:
        return self._count("data_parallel_size")

    @property
    def dcp(self) -> int:
        return self._count("decode_context_parallel_size")

    def _count(self, name: str) -> int:
        """What is no number (None, auto) is the engine's default, 1."""
        return _whole(self.settings.get(name, "")) or 1

    def setting(self, *names: str) -> str | None:
        return next((self.settings[name] for name in names if name in self.settings), None)


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _DIGITS else None


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _bytes(text: str) -> int:
    return int(_number(text) * GIB)


def _largest(old: Any, new: Any) -> Any:
    return new if old is None else max(old, new)


def _smallest(old: Any, new: Any) -> Any:
    return new if old is None else min(old, new)


def _last(old: Any, new: Any) -> Any:
    return new


Fields = tuple[tuple[str, Callable[[str], Any], Callable[[Any, Any], Any]], ...]
# pattern -> the fields that its groups fill
_LINES: tuple[tuple[re.Pattern[str], Fields], ...] = tuple(
    (re.compile(pattern), fields)
    for pattern, fields in (
        (r"LLM engine \(v([^)\s]+)\)", (("version", str, _last),)),
        (r"vLLM (?:API server )?version:? v?(\d[^\s,)]*)", (("version", str, _last),)),
        # 0.8 to 0.33 ("memory" since 0.15); "GB" up to 0.7
        (rf"(?:Model loading|Loading model weights) took {_G}", (("weights", _bytes, _largest),)),
        (rf"Available KV cache memory: {_G}", (("kv_available", _bytes, _smallest),)),
        (rf"(?:GPU|CPU|XPU) KV cache size: {_N} tokens", (("pool_tokens", lambda t: int(_number(t)), _smallest),)),
        (
            rf"Maximum concurrency for {_N} tokens per request: {_N}x",
            (("max_model_len", lambda t: int(_number(t)), _last), ("concurrency", _number, _smallest)),
        ),
        # 0.10 to 0.32: four parts; 0.33: weights and non-torch as one
        (
            rf"Free memory on device(?: \S+)? \({_N}/{_N} GiB\) on startup\. Desired (?:GPU )?memory utilization is \({_N}, {_N} GiB\)",
            (
                ("free_at_start", _bytes, _smallest), ("total", _bytes, _smallest),
                ("utilization", _number, _last), ("requested", _bytes, _smallest),
            ),
        ),
        (
            rf"Actual usage is {_N} GiB for weight, {_N} GiB for peak activation, {_N} GiB for non-torch memory, and {_N} GiB for CUDAGraph",
            (("weights", _bytes, _largest), ("activation", _bytes, _largest), ("non_torch", _bytes, _largest), ("graphs", _bytes, _largest)),
        ),
        (
            rf"Actual usage is {_N} GiB for consumed memory \(weights \+ non-torch\), {_N} GiB for peak activation, and {_N} GiB for CUDAGraph",
            (("consumed", _bytes, _largest), ("activation", _bytes, _largest), ("graphs", _bytes, _largest)),
        ),
        (r"`?--kv-cache-memory(?:-bytes)?=([0-9]{1,18})`? \([0-9.]+ GiB\) to fit into requested memory", (("suggested_pin", int, _smallest),)),
        (rf"reserved {_G} memory for KV Cache as specified by kv_cache_memory_bytes", (("kv_pinned", _bytes, _smallest),)),
        # the CPU build, where VLLM_CPU_KVCACHE_SPACE is set
        (rf"Explicitly set \({_N}/{_N}\) GiB for KV cache", (("kv_pinned", _bytes, _smallest), ("_node", str, _last))),
        (rf"Graph capturing finished in {_N} secs?, took {_G}", (("_seconds", str, _last), ("graphs", _bytes, _largest))),
        (rf"CUDA graph pool memory: {_G} \(actual\), {_G} \(estimated\)", (("graphs", _bytes, _largest), ("graphs_estimated", _bytes, _largest))),
        (rf"Estimated CUDA graph memory: {_G} total", (("graphs_estimated", _bytes, _largest),)),
        # "models's" up to 0.1x, "model's" later; the parenthesis before the size came with 0.12
        (
            rf"max seq len \({_N}\), \(?{_G} KV\s+cache is needed, which is larger than the available KV cache memory \({_G}\)",
            (("needed_for", lambda t: int(_number(t)), _last), ("needed", _bytes, _last), ("kv_available", _bytes, _smallest)),
        ),
        (rf"estimated maximum model length is {_N}", (("estimated_max_len", lambda t: int(_number(t.rstrip("."))), _last),)),
        (
            rf"Auto-fit max_model_len: reduced from {_N} to {_N} to fit in available KV cache memory \({_G}",
            (("_from", str, _last), ("fitted_len", lambda t: int(_number(t)), _last), ("kv_available", _bytes, _smallest)),
        ),
        (r"MiniMax M3 sparse attention selected (\S+)", (("sparse_attention", str, _last),)),
        (r"(Encoder cache) will be initialized with a budget", (("vision", bool, _last),)),
    )
)  # fmt: skip
_NO_MEMORY = re.compile(r"No available memory for the cache blocks")


def parse_log(text: str) -> EngineLog:
    """All that the log tells. A log of something else gives an empty EngineLog."""
    stated = read_settings(text)
    log = EngineLog(settings=stated.values, arguments=stated.given, other_settings=stated.others)
    for line in text.splitlines():
        _read_line(log, line)
        log.no_memory |= bool(_NO_MEMORY.search(line))
    if log.needed is None:
        _read_line(log, " ".join(text.split()))  # a message that was wrapped when it was pasted
    if log.kv_pinned is None:
        log.kv_pinned = _whole(log.setting("kv_cache_memory_bytes", "kv_cache_memory") or "")
    return log


def _read_line(log: EngineLog, line: str) -> None:
    for pattern, fields in _LINES:
        for match in pattern.finditer(line):
            for (name, convert, merge), value in zip(fields, match.groups(), strict=True):
                if not name.startswith("_"):
                    setattr(log, name, merge(getattr(log, name), convert(value)))


def is_empty(log: EngineLog) -> bool:
    return log == EngineLog()
