"""Is there room on the GPU for a conversion or a measurement: asked before anything is fetched or read, of the GPU that does it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..errors import StoppedError
from ..planning.calibration_text import FEWEST_TOKENS, device_room
from ..planning.fit import Fitting
from ..planning.plan import Plan
from ..planning.resources import Resources
from ..recipe.recipe import with_data
from ..running.device import device_memory
from ..running.words import human_bytes
from .measure_plan import device_bytes

FEWEST_WINDOWS = 4  # to measure on: what fewer say of a scheme is mostly chance


def check_device(plan: Plan, device: torch.device, need: Resources, can_spill: bool = True) -> None:
    """Raise StoppedError where a GPU has too little free memory for what the plan takes at its peak. Asks nothing of a CPU.

    can_spill: whether hidden states may be kept on the disk instead, which several ranks cannot do.
    """
    if device.type != "cuda":
        return
    free, total = device_memory(device)
    if need.device > free:
        ways = _ways(plan, free, total, need, can_spill)
        raise _refusal(device, free, total, "the conversion", need.device, ways)


def check_measuring(fitting: Fitting, device: torch.device) -> None:
    """The same for a pass that measures what each scheme costs."""
    if device.type != "cuda":
        return
    free, total = device_memory(device)
    if (need := device_bytes(fitting)) > free:
        raise _refusal(device, free, total, "measuring", need, _ways_to_measure(fitting, free, total, need))


def _refusal(
    device: torch.device, free: int, total: int, what: str, need: int, remedies: Iterator[str]
) -> StoppedError:
    where = f"{torch.cuda.get_device_name(device)} ({device})"
    found = f"{human_bytes(free)} free of {human_bytes(total)}" if need <= total else human_bytes(total)
    *ways, last = remedies
    remedy = f"{', '.join(ways)} or {last}" if ways else last
    return StoppedError(
        f"{where} has {found}, and {what} takes {human_bytes(need)} of it: {remedy}. Nothing was changed."
    )


def _ways_to_measure(fitting: Fitting, free: int, total: int, need: int) -> Iterator[str]:
    if need <= total:
        yield "end what else runs on it"
    data = fitting.base.recipe.data
    count = max(data.windows, data.heldout_windows)
    while (count := count // 2) >= FEWEST_WINDOWS:
        fewer = {"windows": min(count, data.windows), "heldout_windows": min(count, data.heldout_windows)}
        if device_bytes(fitting, replace(fitting.base, recipe=with_data(fitting.base.recipe, fewer))) <= free:
            yield f"measure with m3quant fit --measure --windows {fewer['windows']} --heldout-windows {fewer['heldout_windows']}"
            break
    yield "give --device cpu, which takes far longer"
    if need > total:
        yield "take a larger GPU"


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
