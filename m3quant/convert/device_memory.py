"""Is there room on the GPU for a conversion: asked before anything is fetched or read, of the GPU that does it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import StoppedError
from ..planning.calibration_text import FEWEST_TOKENS, device_room
from ..planning.plan import Plan
from ..planning.resources import Resources
from ..running.device import device_memory
from ..running.words import human_bytes


def check_device(plan: Plan, device: torch.device, need: Resources, can_spill: bool = True) -> None:
    """Raise StoppedError where a GPU has too little free memory for what the plan takes at its peak. Asks nothing of a CPU.

    can_spill: whether hidden states may be kept on the disk instead, which several ranks cannot do.
    """
    if device.type != "cuda":
        return
    free, total = device_memory(device)
    if need.device <= free:
        return
    where = f"{torch.cuda.get_device_name(device)} ({device})"
    found = f"{human_bytes(free)} free of {human_bytes(total)}" if need.device <= total else human_bytes(total)
    *ways, last = _ways(plan, free, total, need, can_spill)
    remedy = f"{', '.join(ways)} or {last}" if ways else last
    raise StoppedError(
        f"{where} has {found}, and the conversion takes {human_bytes(need.device)} of it: {remedy}. Nothing was changed."
    )


def _ways(plan: Plan, free: int, total: int, need: Resources, can_spill: bool) -> Iterator[str]:
    if need.device <= total:
        yield "end what else runs on it"
    if plan.recipe.calibrated:
        if (tokens := device_room(plan, free)) >= FEWEST_TOKENS:
            yield f"give --calibration-tokens {tokens} or fewer"
        if can_spill:
            yield "keep hidden states on the disk with --spill"
    else:
        yield "give --device cpu"
    if need.device > total:
        yield "take a larger GPU"
