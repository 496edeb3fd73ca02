"""Serving nodes: how many GPUs, and the bytes that an engine finds on each. Data with its source; no GPU is asked.

`total_bytes` is what `torch.cuda.mem_get_info()[1]` returns, which vLLM multiplies by --gpu-memory-utilization. It is less than
the number on the box: the driver and ECC take their part.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ..engines.device import CPU, GIB, Gpu
from ..errors import NodeError

# H200: 139.8 GiB in vLLM's start-up line (tests/data/serving-logs, measured). The others are not measured here: from nvidia-smi's MiB and public logs.
# Bandwidth: NVIDIA's datasheets of the boards; without PCIe or NVL in the name it is the SXM one (RTX PRO 6000 and GB10: product pages; the Server
# Edition's memory is slower than that of both workstation boards). A100 means the one of 80 GB: of boards that differ in memory the first is
# taken where no size is given.
# Link: 16 lanes of PCIe in one direction, from the same datasheets (generation 5: 128 GB/s for both directions, 4: 64); an H200 gave 55.5 GB/s of its
# 64 from pinned memory (tests/benchmarks/figures/h200_offload.json). Host memory: of NVIDIA's
# own machines with eight GPUs (DGX A100 640 GB, H100, H200 and B200: 2 TB; DGX A100 320 GB: 1 TB); what a rented machine has, its owner says, and `serve` asks the system.
_PCIE5, _PCIE4 = 64e9, 32e9
_DGX = 2 * 10**12 // 8
# NVIDIA's datasheets give the SXM boards of H100 and H200 the same FLOPS in every format, 900 GB/s of NVLink and up to 700 W: memory is what differs.
# Not so the H100's PCIe and NVL boards, with fewer SMs or lower clocks.
_SXM5 = "GH100, 132 SMs"
GPUS: dict[str, Gpu] = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("H200", int(139.8 * GIB), 4.8e12, "143,771 MiB in nvidia-smi; 139.8 GiB in torch", "hopper", _PCIE5, _DGX, chip=_SXM5),
        Gpu("H100", int(79.1 * GIB), 3.35e12, "81,559 MiB in nvidia-smi; 79.1 GiB in torch (H100 80GB HBM3)", "hopper", _PCIE5, _DGX, chip=_SXM5),
        Gpu("H200NVL", int(139.8 * GIB), 4.8e12, "143,771 MiB in nvidia-smi", "hopper", _PCIE5),
        Gpu("H100NVL", int(93.1 * GIB), 3.9e12, "95,830 MiB in nvidia-smi", "hopper", _PCIE5),
        Gpu("H100PCIe", int(79.1 * GIB), 2.0e12, "81,559 MiB in nvidia-smi", "hopper", _PCIE5),
        Gpu("A100", int(79.15 * GIB), 2.04e12, "81,920 MiB in nvidia-smi; 79.15 GiB in torch (A100-SXM4-80GB)", "ampere", _PCIE4, _DGX),
        Gpu("A100PCIe", int(79.15 * GIB), 1.935e12, "81,920 MiB in nvidia-smi", "ampere", _PCIE4),
        Gpu("A100SXM40GB", int(39.39 * GIB), 1.555e12, "40,960 MiB in nvidia-smi; 39.39 GiB in CUDA (A100-SXM4-40GB)", "ampere", _PCIE4, _DGX // 2),
        Gpu("A100PCIe40GB", int(39.39 * GIB), 1.555e12, "40,960 MiB in nvidia-smi", "ampere", _PCIE4),
        Gpu("RTXPRO6000", int(94.97 * GIB), 1.79e12, "94.97 GiB in a public vLLM log", "blackwell-workstation", _PCIE5),
        Gpu("RTXPRO6000Server", int(94.97 * GIB), 1.597e12, "97,887 MiB in nvidia-smi, as of RTXPRO6000", "blackwell-workstation", _PCIE5),
        Gpu("GB10", int(119.6 * GIB), 0.273e12, "DGX Spark: 128 GB shared with the host; 119.6 GiB in torch", "blackwell-workstation", shared=True),
        Gpu("B200", int(178.3 * GIB), 8.0e12, "183,359 MiB in nvidia-smi; 178.3 GiB in torch", "blackwell", _PCIE5, _DGX),
    )
}  # fmt: skip
# Nodes that tables and model cards show, small to large.
STANDARD_NODES = ("1xH200", "2xH100", "2xH200", "4xH100", "4xH200", "8xH100", "8xH200")

# GiB that vLLM's CPU build sets aside for the cache (VLLM_CPU_KVCACHE_SPACE takes whole ones)
CPU_DEFAULT_GIB = 1

# More than any host has: beyond these a typing error is likelier than a machine.
MAX_GPUS = 1024
MAX_GIB = 2**20
MAX_COUNT = 2**31  # tokens, requests or ranks

_CPU = re.compile(r"cpu(?::([0-9]+)\s*GiB)?", re.IGNORECASE)
_MEMORY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*GiB", re.IGNORECASE)
# H100SXM5, H100-80GB, H200-SXM-141GB, "NVIDIA H100 80GB HBM3", "NVIDIA A100 80GB PCIe": a board, its size, what tells it from the SXM board.
# Other words are of other boards: "H100 80GB HBM2e", "H100 CNX" and "A100X" are none of these.
_BOARD = re.compile(r"(?:nvidia)?(.+?)(?:sxm\d?)?(?:(40|80|94|96|141)(?:gb)?)?(?:hbm3e?|(pcie|nvl))?")
_WORDS = re.compile(r"[\s_-]|blackwell|max-q|workstation|edition")  # in nvidia-smi's name of an RTX PRO 6000
_NODE = re.compile(rf"(?:([0-9]+)\s*x\s*)?([A-Za-z][\w-]*|{_MEMORY.pattern})", re.IGNORECASE)


@dataclass(frozen=True)
class Node:
    """`count` equal GPUs of one host."""

    count: int
    gpu: Gpu

    @property
    def name(self) -> str:
        return CPU if self.gpu.name == CPU else f"{self.count}x{self.gpu.name}"


def parse_node(text: str) -> Node:
    """The node that `text` names: 1xH200, 2xH100, h200, any card by its memory as 2x95.5GiB, or cpu:4GiB (its cache). Raises NodeError."""
    shown = text if len(text) <= 80 else f"{text[:80]}..."
    if not text.strip():
        raise NodeError("--on is empty: name a node, for example 1xH200 or 2xH100, or 2x95.5GiB for another card.")
    if cpu := _CPU.fullmatch(text.strip()):
        return cpu_node(int(_memory(cpu[1] or str(CPU_DEFAULT_GIB), shown)) * GIB)
    match = _NODE.fullmatch(text.strip())
    if not match:
        raise NodeError(
            f"node '{shown}': write a count and a GPU, for example 1xH200 or 2xH100, or 2x95.5GiB for another card."
        )
    digits = (match[1] or "1").lstrip("0")
    if not digits:
        raise NodeError(f"node '{shown}' has no GPU: write at least 1x.")
    if len(digits) > len(str(MAX_GPUS)) or int(digits) > MAX_GPUS:
        raise NodeError(f"node '{shown}': one host has at most {MAX_GPUS} GPUs here; write how many it really has.")
    count = int(digits)
    if match[3]:
        size = _memory(match[3], shown)
        return Node(count, Gpu(f"{size:g}GiB", int(size * GIB), 0.0, "given on the command line", "unknown"))
    gpu = gpu_named(match[2])
    if gpu is None:
        near = difflib.get_close_matches(_WORDS.sub("", match[2].lower()), GPUS, n=1)
        meant = f", did you mean {GPUS[near[0]].name}?" if near else "."
        known = ", ".join(g.name for g in GPUS.values())
        raise NodeError(
            f"node '{shown}' names no known GPU{meant} Known: {known}; any other by its memory, as 2x95.5GiB."
        )
    return Node(count, gpu)


def gpu_named(name: str, mib: int | None = None) -> Gpu | None:
    """The known GPU that a person or nvidia-smi calls so, with about `mib` of memory; None where its memory is another than either says."""
    board, size = _board(name)
    for gpu in GPUS.values():
        if _board(gpu.name)[0] != board or (mib and abs(gpu.total_bytes / 2**20 / mib - 1) >= 0.05):
            continue
        # Of each of them the bytes that the driver gives are 1.06 times the GB of its name.
        if not size or abs(gpu.total_bytes / 1e9 / size - 1.06) < 0.03:
            return gpu
    return None


def _board(name: str) -> tuple[str, int]:
    """(the board, the GB of its name or 0)."""
    words = _BOARD.fullmatch(_WORDS.sub("", name.lower()))
    return (words[1] + (words[3] or ""), int(words[2] or 0)) if words else ("", 0)


def _memory(digits: str, shown: str) -> float:
    """GiB of one device. Raises NodeError for none, or for more than any has."""
    size = float(digits)
    if int(min(size, MAX_GIB) * GIB) < 1:
        raise NodeError(f"node '{shown}' has no memory: write the GiB that a device has.")
    if size > MAX_GIB:
        raise NodeError(f"node '{shown}': no device has more than {MAX_GIB:,} GiB; write the GiB that it really has.")
    return size


def cpu_node(kv_bytes: int) -> Node:
    """The CPU build of vLLM, whose KV cache is what VLLM_CPU_KVCACHE_SPACE reserves, not what a device has left."""
    return Node(1, Gpu(CPU, kv_bytes, 0.0, "VLLM_CPU_KVCACHE_SPACE", "cpu"))
