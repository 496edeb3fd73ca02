"""What a conversion needs in host memory, device memory and disk space. Predicted from the plan before anything is read.

Host memory is the peak of the whole process: what m3quant holds, and what the interpreter with its libraries takes.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import StoppedError
from .batches import MAX_WORKERS, pinned_bytes, working_bytes
from .plan import Plan
from .quantizers import facts_of
from .streaming import Progressed
from .unit import PlannedTensor

FLOAT32 = 4
# Resident before the first byte is read: interpreter, torch and, on a GPU, CUDA's libraries and context, which a torch of its
# own build may make larger. `rss_before` in tests/benchmarks/figures/cpu_convert_fp8.json and h200_convert_m2.json.
CPU_PROCESS_BYTES = 250 * 10**6
GPU_PROCESS_BYTES = 660 * 10**6
# What a calibrated run imports besides, transformers and the tokenizer above all: 0.47 GB were resident at the first forward
# pass of tests/fixtures/tiny-m2 on a CPU.
CALIBRATION_BYTES = 250 * 10**6
# A tensor being quantized exists as stored, as a float32 working copy, as one temporary of it, and as codes.
WORK_COPIES = 3
# Pinned host memory of a layer's packed output, in its bytes: torch pins powers of two, and pieces of several sizes do not share
# them. 1.5 was measured for M2 and M3 (tests/benchmarks/figures/h200_convert_*.json).
PINNED_SHARE = 1.75
BOUNDARY_SHARE = 0.05
# Headroom on the disk for the journal, the report and the file system's own needs.
DISK_MARGIN = 64 * 2**20


@dataclass(frozen=True)
class Resources:
    """Bytes. host and device are peaks; disk is what must be free when nothing is written yet."""

    host: int
    device: int
    disk: int
    boundary: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def hidden_state_bytes(plan: Plan, element_bytes: int) -> int:
    """One hidden-state stream: windows x length x hidden size."""
    data = plan.recipe.data
    return (data.windows + data.heldout_windows) * data.window_length * plan.family.hidden_size * element_bytes


def boundary_interval(plan: Plan, on_gpu: bool, leaving: bool = False) -> int:
    """Layers between two savings of both hidden-state streams, so that these cost at most BOUNDARY_SHARE of the bytes of the
    layers between them. On a CPU every layer: searching takes far longer there than saving.

    leaving: shards leave the disk after their upload, those since the last saving excepted, which a run that continues reads. Then these
    take no more of the disk than what is saved does.
    """
    if not on_gpu:
        return 1
    layers = [unit for unit in plan.units if unit.layer is not None]
    saved, written = 2 * hidden_state_bytes(plan, 2), sum(unit.bytes_out for unit in layers)
    moved = (sum(unit.bytes_in for unit in layers) + written) / len(layers)
    seldom = math.ceil(saved / (BOUNDARY_SHARE * moved))
    return max(1, min(seldom, int(saved * len(layers) / written)) if leaving else seldom)


def resources(
    plan: Plan,
    on_gpu: bool,
    workers: int | None = None,
    spill: bool = False,
    held: int | None = None,
    so_far: Progressed | None = None,
) -> Resources:
    """Peak memory and disk of converting `plan` on a GPU (bfloat16 streams) or on the CPU (float32 streams).

    spill: both streams are on the disk too, in addition to the boundaries. held: finished shards that are on the disk at most, because they leave it
    after their upload; None: they stay. so_far: how far a run is that goes on, which may have been begun with another interval.
    """
    workers = workers or min(MAX_WORKERS, os.cpu_count() or 1)
    process = GPU_PROCESS_BYTES if on_gpu else CPU_PROCESS_BYTES
    largest = max(
        t.source.stored_bytes + _elements(t) * FLOAT32 * (WORK_COPIES if t.action == "quantize" else 0)
        for unit, _ in plan.kinds
        for t in unit.tensors
    )
    if not plan.recipe.calibrated:
        working = working_bytes((unit for unit, _ in plan.kinds), on_gpu, plan.recipe.format, workers)
        disk = _written(plan, held) + DISK_MARGIN
        return Resources(process + working.host, working.device, disk, 0)
    process += CALIBRATION_BYTES
    layer = max(sum(_elements(t) * 2 for t in unit.tensors) for unit, _ in plan.kinds if unit.layer is not None)
    stream = hidden_state_bytes(plan, 2 if on_gpu else FLOAT32)
    # Two boundaries exist for a moment: the next is in place before the old one goes.
    boundary = 2 * 2 * stream
    disk = (
        _written(plan, None if held is None else held + _between_savings(plan, on_gpu, so_far or Progressed()))
        + boundary
        + (2 * stream if spill else 0)
        + DISK_MARGIN
    )
    if on_gpu:
        # On the device: this layer and the next, streams and activations, and what the search of a chunk of experts takes.
        # On the host, pinned: one layer's packed output (the next is packed when it is durable), and the streams being saved.
        facts = facts_of(plan.recipe.rounding)
        scratch, streams = facts.scratch(plan), facts.state * hidden_state_bytes(plan, 1)
        packed = max(unit.bytes_out for unit in plan.units if unit.layer is not None)
        host = process + int(PINNED_SHARE * packed) + 2 * pinned_bytes(stream) + largest
        codes = layer // 2  # a byte for each weight
        return Resources(host, 2 * layer + codes + streams + scratch + largest, disk, boundary)
    # Measured: about three layers (tests/convert/test_memory.py), of which one is read ahead; a fourth is margin.
    streams = 4 * stream  # two streams, each with the layer's input and output
    return Resources(process + 4 * layer + streams + largest, 0, disk, boundary)


def _between_savings(plan: Plan, on_gpu: bool, so_far: Progressed) -> int:
    """Layers whose shards stay at most, because hidden states were last saved before them; until they are saved next, of a run that goes on."""
    every = boundary_interval(plan, on_gpu, leaving=True)
    todo = min((u.index for u in plan.units if u.layer is not None and u.index not in so_far.done), default=0)
    return max(every, math.ceil(todo / every) * every + 1 - so_far.boundary)


def _written(plan: Plan, held: int | None) -> int:
    """Bytes of the output on the disk at once: all of it, or the largest finished shards that are held and the one that is written."""
    if held is None:
        return plan.output_bytes
    sizes = sorted((unit.bytes_out for unit in plan.units), reverse=True)
    return plan.output_bytes - sum(sizes[held + 1 :])


def written_bytes(output: Path, besides: Path | None = None) -> int:
    """Bytes of all files in `output`, those in the folder `besides` left out."""
    files = (p for p in output.rglob("*") if p.is_file()) if output.exists() else ()
    return sum(p.stat().st_size for p in files if besides is None or not p.is_relative_to(besides))


def _elements(tensor: PlannedTensor) -> int:
    return tensor.source.numel


def check_disk(plan: Plan, output: Path, need: Resources) -> None:
    """Raise StoppedError when the disk under `output` has too little room for what is still to be written."""
    folder = output
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    # Whatever an earlier run left is used or overwritten: finished and torn shards, hidden states.
    present = written_bytes(output)
    missing = need.disk - present - free
    if missing > 0:
        raise StoppedError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free, but the output needs {(need.disk - present) / 1e9:.1f} GB more: "
            f"free {missing / 1e9:.1f} GB or choose another folder. Nothing was changed."
        )
