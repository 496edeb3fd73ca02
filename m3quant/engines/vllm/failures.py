"""What vLLM's log says of a start that failed."""

from __future__ import annotations

import re

from ..failures import (
    ARCHITECTURE,
    ARGUMENTS,
    CHECKPOINT,
    NO_GPU,
    OUT_OF_MEMORY,
    PORT,
    QUANTIZATION,
    SETTINGS,
    Sentence,
)

SENTENCES: tuple[Sentence, ...] = (
    (
        re.compile(r"Free memory on device.*?\(([\d.]+)/([\d.]+) GiB\) on startup is less than desired"),
        "only {0} of {1} GiB of the GPU are free: another process holds memory; end it (nvidia-smi lists it), or lower --gpu-memory-utilization",
    ),
    OUT_OF_MEMORY,
    PORT,
    NO_GPU,
    ARCHITECTURE,
    QUANTIZATION,
    CHECKPOINT,
    SETTINGS,
    ARGUMENTS,
    (re.compile(r"No common block size|block_size[^\n]{0,40}not supported"), "the attention kernels refuse the block size: leave --block-size 128"),
    (re.compile(r"(M3QUANT_GUARD_\w+[^\n]{0,200})"), "the guard refuses its settings: {0}"),
)  # fmt: skip
PREFIX = re.compile(
    r"^\(?(?:APIServer|EngineCore|Worker)\S*(?: pid=\d+)?\)?\s*(?:ERROR|INFO|WARNING)?\s*[\d\- :]*\s*(?:\[[^\]]*\])?\s*"
)
# Of the loading probe's output: an engine that ran out of memory, and the lines that name the kernels it chose.
NO_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|No available memory for the cache blocks|Cannot allocate memory|DefaultCPUAllocator: can't allocate"
    r"|less than desired [CG]PU memory utilization|larger than the available KV cache memory",
    re.IGNORECASE,
)
KERNEL = re.compile(
    r"(?:INFO|WARNING) \S+ \S+ \[[^\]\n]{0,200}\] (.*(?:MoE backend|MoEMethod|Selected \S+ for|Kernel for|selected \S+ \().*)"
)
