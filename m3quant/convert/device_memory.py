"""Is there room on the GPU for a conversion: asked before anything is fetched or read, of the GPU that does it."""

from __future__ import annotations

import torch

from ..errors import StoppedError
from ..planning.calibration_text import FEWEST_TOKENS, device_room
from ..planning.plan import Plan
from ..planning.resources import Resources
from ..running.words import human_bytes


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, as its driver reports them."""
    total: int = torch.cuda.mem_get_info(device)[1]
    return total


def check_device(plan: Plan, device: torch.device, need: Resources) -> None:
    """Raise StoppedError where a GPU has too little free memory for what the plan takes at its peak. Asks nothing of a CPU."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if need.device <= free:
        return
    where = f"{torch.cuda.get_device_name(device)} ({device})"
    found = f"{human_bytes(free)} free of {human_bytes(total)}" if need.device <= total else human_bytes(total)
    raise StoppedError(
        f"{where} has {found}, and the conversion takes {human_bytes(need.device)} of it: {_remedy(plan, free, total, need)}. Nothing was changed."
    )


def _remedy(plan: Plan, free: int, total: int, need: Resources) -> str:
    ways = ["end what else runs on it"] if need.device <= total else []
    if plan.recipe.calibrated:
        tokens = device_room(plan, free)
        if tokens >= FEWEST_TOKENS:
            ways.append(f"give --calibration-tokens {tokens} or fewer")
        ways.append("keep hidden states on the disk with --spill")
    if need.device > total:
        ways.append("take a larger GPU")
    return f"{', '.join(ways[:-1])} or {ways[-1]}" if len(ways) > 1 else (ways or ["take --device cpu"])[0]
