"""The GPUs and the memory of this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ..checkpoint.system import free_bytes, free_memory
from ..engines.device import GIB, Gpu
from ..errors import DoesNotFit, NodeError
from .fit import Fit
from .hardware import Node, cpu_node, gpu_named
from .offload import host_bytes

SHARED = Path(
    "/dev/shm"
)  # where vLLM's native cache offload makes its buffer (v1/kv_offload/cpu/shared_offload_region.py)


def detect_node(cpu: bool) -> Node:
    """The GPUs of this machine as nvidia-smi lists them, as many as CUDA_VISIBLE_DEVICES leaves; the CPU where `cpu` says so. Raises NodeError where there is none."""
    if cpu:
        return cpu_node(2**30)
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        done = None
    rows = (
        [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line]
        if done and done.returncode == 0
        else []
    )
    if not rows:
        raise NodeError(
            "no GPU was found (nvidia-smi lists none): start where the GPUs are, or ask for a plan with --dry-run --on 1xH200."
        )
    kinds = {name.strip() for name, _ in rows}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        parts = [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
        numbers = [int(part) for part in parts if part.isdigit()]
        rows = [rows[i] for i in numbers if i < len(rows)] if len(numbers) == len(parts) else rows[: len(parts)]
        if not rows:
            raise NodeError("CUDA_VISIBLE_DEVICES hides every GPU: unset it, or name those to use.")
    names = {name.strip() for name, _ in rows}
    # By default CUDA numbers the fastest first, nvidia-smi goes by the bus: among unlike GPUs a number names two.
    if len(names) > 1 or (len(kinds) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"):
        raise NodeError(
            f"the GPUs differ ({', '.join(sorted(kinds))}): choose equal ones by nvidia-smi's numbers, with "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID and CUDA_VISIBLE_DEVICES."
        )
    size = rows[0][1].strip()
    return Node(len(rows), gpu_called(names.pop(), int(size) if size.isdigit() else None))


def gpu_called(name: str, mib: int | None) -> Gpu:
    """The known GPU of an nvidia-smi name, or one of its memory less what the driver keeps (0.5 %, as on H100 and H200).

    mib is None where nvidia-smi says [N/A], as for GB10, whose memory is the host's. Raises NodeError if the name is unknown too.
    """
    if known := gpu_named(name, mib):
        return known
    if mib is None:
        raise NodeError(
            f"nvidia-smi does not tell the memory of {name}: plan for its GiB with --dry-run --on, as 1x95.5GiB."
        )
    return Gpu(name, int(mib * 2**20 * 0.995), 0.0, "nvidia-smi", "unknown")


def check_host(fit: Fit) -> None:
    """Raise DoesNotFit where this machine lacks the host memory that the plan moves weights and cache to."""
    need = host_bytes(fit.setup.kv_offload, [rank.moved for rank in fit.prediction.ranks], fit.setup.split)
    have = free_memory()
    if need and have is not None and need > have:
        raise DoesNotFit(
            f"{need / GIB:.1f} GiB of host memory are needed, {have / GIB:.1f} GiB are available: give less to --kv-offload or --weight-offload."
        )
    if fit.setup.kv_offload and SHARED.is_dir() and fit.setup.kv_offload > free_bytes(SHARED):
        raise DoesNotFit(
            f"--kv-offload makes a buffer of {fit.setup.kv_offload / GIB:.1f} GiB in {SHARED}, where {free_bytes(SHARED) / GIB:.1f} GiB are free: "
            "give it less, or that file system more (in a container: --ipc=host or --shm-size)."
        )
