"""Why an engine did not start or stopped, in one sentence, from its log."""

from __future__ import annotations

import re

from .enginelog import parse_log
from .hardware import GIB

_SENTENCES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"Free memory on device.*?\(([\d.]+)/([\d.]+) GiB\) on startup is less than desired"),
        "only {0} of {1} GiB of the GPU are free: another process holds memory; end it (nvidia-smi lists it), or lower --gpu-memory-utilization",
    ),
    (re.compile(r"CUDA out of memory|OutOfMemoryError|DefaultCPUAllocator: can't allocate|Cannot allocate memory|std::bad_alloc"),
     "the engine ran out of memory while it started: lower --gpu-memory-utilization or --max-num-batched-tokens, or choose a larger node"),
    (re.compile(r"[Aa]ddress already in use|Errno 98"), "the port is in use: choose another with --port, or end the process that has it"),
    (
        re.compile(r"No CUDA GPUs are available|CUDA driver version is insufficient|Found no NVIDIA driver|Failed to infer device type|no NVIDIA GPU"),
        "the engine finds no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES",
    ),
    (re.compile(r"Model architectures? \[?'?([\w', ]+?)'?\]? (?:are|is) not supported"), "this engine does not have the architecture {0}: install a newer one"),
    (re.compile(r"Unknown quantization method: (\S+?)[.\s]"), "this engine does not read quantization '{0}': install a newer one"),
    (re.compile(r"((?:There is no module or parameter named|KeyError:|Following weights were not initialized)[^\n]{0,160})"),
     "the checkpoint is not what the engine expects ({0}): run m3quant verify on it"),
    (re.compile(r"Value error, ([^\n\[]{5,200}?)\s*\["), "the engine refuses its settings: {0}"),
    (re.compile(r"unrecognized arguments: ([^\n]+)"), "the engine does not know the arguments {0}: see --help of its version"),
    (re.compile(r"No common block size|block_size[^\n]{0,40}not supported"), "the attention kernels refuse the block size: leave --block-size 128"),
    (re.compile(r"(M3QUANT_GUARD_\w+[^\n]{0,200})"), "the guard refuses its settings: {0}"),
)  # fmt: skip
LINE_CHARACTERS = 2000  # of a line that are looked at: some of these patterns take time that is quadratic in a line
_NOISE = re.compile(
    r"^\s*$|^\s+|Traceback|^\s*File |resource_tracker|warnings\.warn|^\^+$|See root cause|\[W\d|destroy_process_group"
)
_ERROR = re.compile(r"(?:\w*(?:Error|Exception)): (.+)")
_PREFIX = re.compile(
    r"^\(?(?:APIServer|EngineCore|Worker)\S*(?: pid=\d+)?\)?\s*(?:ERROR|INFO|WARNING)?\s*[\d\- :]*\s*(?:\[[^\]]*\])?\s*"
)


def reason(log: str) -> str:
    """What went wrong, as one clause; the last error line where no known cause is found."""
    parsed = parse_log(log)
    log = "\n".join(line[:LINE_CHARACTERS] for line in log.splitlines())
    if parsed.needed and parsed.needed_for:
        longest = f"; {parsed.estimated_max_len:,} tokens would fit" if parsed.estimated_max_len else ""
        return (
            f"the engine has {(parsed.kv_available or 0) / GIB:.2f} GiB for the KV cache, and {parsed.needed_for:,} tokens need "
            f"{parsed.needed / GIB:.2f}{longest}: give a smaller --context"
        )
    if parsed.no_memory:
        return "weights and overhead leave the engine no memory for the KV cache: choose a larger node, or fewer --max-num-batched-tokens"
    for pattern, sentence in _SENTENCES:
        match = pattern.search(log)
        if match:
            return sentence.format(*match.groups())
    lines = [_PREFIX.sub("", line) for line in log.splitlines()]
    lines = [line.strip() for line in lines if not _NOISE.search(line)]
    errors = [match[0] for line in lines if (match := _ERROR.search(line)) and "See root cause" not in line]
    told = errors or lines
    return f"its last word was: {told[-1][:300]}" if told else "it said nothing"
