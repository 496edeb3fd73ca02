"""Convert one checkpoint in this process and print its memory: a script for test_memory.py.

    python -m tests.support.convert.memory_probe SOURCE OUTPUT RECIPE

converts a tiny checkpoint first, so that nothing is imported later, and prints {"imported": bytes, "peak": bytes, "predicted": bytes, "layer": bytes} - resident set after the imports, its peak at
the end (VmHWM), what `resources` predicts above what it counts for the imports, and the largest layer of the source.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from m3quant.planning.resources import CALIBRATION_BYTES, CPU_PROCESS_BYTES, resources
from tests.support.convert.common import make_plan_of, make_source, quickly_calibrated, run_plan


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def main() -> None:
    source, output, recipe = sys.argv[1:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_source(Path(folder) / "src", "m2", num_hidden_layers=1)
        run_plan(make_plan_of(tiny, recipe, **quickly_calibrated(recipe)), Path(folder) / "out")
    plan = make_plan_of(Path(source), recipe, **quickly_calibrated(recipe))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (proc(5))
    imported = status("VmRSS")
    run_plan(plan, Path(output))
    layer = max(u.bytes_in for u in plan.units)
    process = CPU_PROCESS_BYTES + (CALIBRATION_BYTES if plan.recipe.calibration != "none" else 0)
    predicted = resources(plan, on_gpu=False).host - process
    print(json.dumps({"imported": imported, "peak": status("VmHWM"), "predicted": predicted, "layer": layer}))


if __name__ == "__main__":
    main()
