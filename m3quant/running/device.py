"""The torch device a command runs on."""

from __future__ import annotations

import torch

from ..errors import PlanError, StoppedError


def device_name(device: torch.device) -> str:
    """What sums may depend on: "cpu", or the GPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU that are free, and all of them. What torch keeps of earlier work in this process is free: it is used again.

    Raises StoppedError for a GPU that cannot be used: one that others have filled has no room for the driver's own context.
    """
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        raise StoppedError(
            f"{device} cannot be used ({str(error).splitlines()[0]}): end what else runs on it, or choose another with --device. "
            "Nothing was changed."
        ) from None
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def pick_device(name: str) -> torch.device:
    """The torch device called `name`; "auto" is the first GPU where there is one. Raises PlanError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device: torch.device | None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise PlanError(f"--device {name}: no such device; use cpu, cuda, cuda:1 or auto.")
    if device.type == "cuda" and (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise PlanError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs; use a number below that.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PlanError(f"--device {name}: this torch sees no GPU; use --device cpu, or install torch with CUDA.")
    return device
