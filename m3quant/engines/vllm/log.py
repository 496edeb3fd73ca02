"""vLLM's start-up log as numbers. The lines changed over releases; each pattern names the releases that print it.

Multi-rank logs repeat a line per worker: weights take the largest, cache memory the smallest, as the engine does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..device import CPU, GIB, Gpu
from ..start_log import EngineLog, LogReader, is_true, whole_number
from .log_settings import START, no_images, read_settings, uncovered
from .memory import DEFAULT_BATCHED_TOKENS, LARGE_GPU

# Bounded: longer numbers are none of an engine, and Python reads them as infinite or not at all.
_N = r"(-?[0-9][0-9,]{0,24}(?:\.[0-9]{1,12})?)"
_G = rf"{_N} Gi?B"


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
    """All that the log states. A log of something else gives an empty EngineLog."""
    stated = read_settings(text)
    log = EngineLog(settings=stated.values, arguments=stated.given, other_settings=stated.others)
    for line in text.splitlines():
        _read_line(log, line)
        log.no_memory |= bool(_NO_MEMORY.search(line))
    if log.needed is None:
        _read_line(log, " ".join(text.split()))  # a message that was wrapped when it was pasted
    if log.kv_pinned is None:
        log.kv_pinned = whole_number(log.setting("kv_cache_memory_bytes", "kv_cache_memory") or "")
    return log


def _read_line(log: EngineLog, line: str) -> None:
    for pattern, fields in _LINES:
        for match in pattern.finditer(line):
            for (name, convert, merge), value in zip(fields, match.groups(), strict=True):
                if not name.startswith("_"):
                    setattr(log, name, merge(getattr(log, name), convert(value)))


class VllmLog(LogReader):
    start = START
    releases = "0.24 to 0.33"

    def read(self, text: str) -> EngineLog:
        return parse_log(text)

    def server_defaults(self, gpu: Gpu) -> tuple[int, int] | tuple[None, None]:
        """Of vLLM's API server (engine/arg_utils.py)."""
        if not gpu.total_bytes or gpu.name == CPU:
            return None, None
        if gpu.total_bytes >= LARGE_GPU:
            return 16384, 1024
        if gpu.total_bytes >= 70 * GIB and "a100" not in gpu.name.lower() and gpu.name != "GB10":
            return DEFAULT_BATCHED_TOKENS, 1024
        return 2048, 256

    def vision(self, log: EngineLog) -> bool | None:
        if log.vision:
            return True
        limit = log.setting("limit_mm_per_prompt")
        if is_true(log.setting("language_model_only")) or (limit and no_images(limit)):
            return False
        return True if log.arguments else None

    def uncovered(self, settings: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
        return uncovered(settings)
