"""Why an engine did not start or stopped, in one sentence, from its log: what every engine's log may hold."""

from __future__ import annotations

import re

from .device import GIB
from .start_log import EngineLog

Sentence = tuple[re.Pattern[str], str]  # a cause in a log, and what to say and do, with the pattern's groups in it

OUT_OF_MEMORY: Sentence = (
    re.compile(r"CUDA out of memory|OutOfMemoryError|DefaultCPUAllocator: can't allocate|Cannot allocate memory|std::bad_alloc"),
    "the engine ran out of memory while it started: lower --gpu-memory-utilization or --max-num-batched-tokens, or choose a larger node",
)  # fmt: skip
PORT: Sentence = (
    re.compile(r"[Aa]ddress already in use|Errno 98"),
    "the port is in use: choose another with --port, or end the process that has it",
)
NO_GPU: Sentence = (
    re.compile(r"No CUDA GPUs are available|CUDA driver version is insufficient|Found no NVIDIA driver|Failed to infer device type|no NVIDIA GPU"),
    "the engine finds no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES",
)  # fmt: skip
ARCHITECTURE: Sentence = (
    re.compile(r"Model architectures? \[?'?([\w', ]+?)'?\]? (?:are|is) not supported"),
    "this engine does not have the architecture {0}: install a newer one",
)
QUANTIZATION: Sentence = (
    re.compile(r"Unknown quantization method: (\S+?)[.\s]"),
    "this engine does not read quantization '{0}': install a newer one",
)
CHECKPOINT: Sentence = (
    re.compile(r"((?:There is no module or parameter named|KeyError:|Following weights were not initialized)[^\n]{0,160})"),
    "the checkpoint is not what the engine expects ({0}): run m3quant verify on it",
)  # fmt: skip
SETTINGS: Sentence = (
    re.compile(r"Value error, ([^\n\[]{5,200}?)\s*\["),
    "the engine refuses its settings: {0}",
)
ARGUMENTS: Sentence = (
    re.compile(r"unrecognized arguments: ([^\n]+)"),
    "the engine does not know the arguments {0}: see --help of its version",
)
LINE_CHARACTERS = 2000  # of a line that are looked at: some of these patterns take time that is quadratic in a line
_NOISE = re.compile(
    r"^\s*$|^\s+|Traceback|^\s*File |resource_tracker|warnings\.warn|^\^+$|See root cause|\[W\d|destroy_process_group"
)
_ERROR = re.compile(r"(?:\w*(?:Error|Exception)): (.+)")


def no_room(log: EngineLog) -> str:
    """What a start-up log's own numbers say of a cache that is too small; '' where they say nothing."""
    if log.needed and log.needed_for:
        longest = f"; {log.estimated_max_len:,} tokens would fit" if log.estimated_max_len else ""
        return (
            f"the engine has {(log.kv_available or 0) / GIB:.2f} GiB for the KV cache, and {log.needed_for:,} tokens need "
            f"{log.needed / GIB:.2f}{longest}: give a smaller --context"
        )
    if log.no_memory:
        return "weights and overhead leave the engine no memory for the KV cache: choose a larger node, or fewer --max-num-batched-tokens"
    return ""


def reason(text: str, sentences: tuple[Sentence, ...], prefix: re.Pattern[str] | None = None) -> str:
    """The first known cause in the log, as one clause; its last error line where there is none.

    prefix: what the engine's logger puts before a line.
    """
    text = "\n".join(line[:LINE_CHARACTERS] for line in text.splitlines())
    for pattern, sentence in sentences:
        match = pattern.search(text)
        if match:
            return sentence.format(*match.groups())
    lines = [prefix.sub("", line) if prefix else line for line in text.splitlines()]
    lines = [line.strip() for line in lines if not _NOISE.search(line)]
    errors = [match[0] for line in lines if (match := _ERROR.search(line)) and "See root cause" not in line]
    last = errors or lines
    return f"its last word was: {last[-1][:300]}" if last else "it said nothing"
