"""Where a layer's time goes in a conversion with error feedback on a GPU: `python -m tests.benchmarks.feedback_layer WORK [--shape m2]`.

Makes layers of real width with random weights (as the release stores them), converts them with `--to awq` on random tokens and
prints the seconds of the last layer by part, with the device synchronized around each and one chunk at a time, and of every layer without that.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from m3quant.calibration.feedback import attention, heldout, mlp, quantizer, solve
from m3quant.calibration.feedback import fit as fitting
from m3quant.convert import calibrated
from m3quant.convert.job import Settings
from m3quant.convert.start import convert

from .convert import plan_of
from .feedback_speed import Clock
from .line_recorder import LineRecorder, random_windows
from .wide import wide_checkpoint, wide_config

PARTS: list[tuple[Any, tuple[str, ...]]] = [
    (calibrated, ("run_layer",)),
    (calibrated._Layerwise, ("quantize", "_store")),
    (quantizer, ("require_finite_weights", "_assign")),
    (attention.AttentionQuantizer, ("run", "_input_moments", "_output_moments", "_after", "_fit")),
    (mlp.UnitRows, ("input_moments", "down_moments", "layer_moment", "outputs")),
    (mlp.MlpQuantizer, ("run", "_acting", "_fit_normed", "_left_over", "_source", "_collect", "_stack")),
    (mlp, ("fit",)),
    (fitting, ("estimate", "heldout_errors", "aimed")),
    (heldout, ("estimate", "aimed")),
    (solve.Solver, ("solve",)),
    (heldout, ("targets",)),
    (solve.Solver, ("nearest",)),
    (solve, ("refit", "errors_of", "round_columns", "sweep_factor", "descent_factor", "permuted")),
]


class Layers(LineRecorder):
    """Keeps when each layer was done, and the clock's sums at that time."""

    def __init__(self, started: float, clock: Clock) -> None:
        super().__init__(started)
        self.clock, self.seconds, self.sums = clock, [0.0], [dict[str, float]()]

    def say(self, line: str) -> None:
        super().say(line)
        if line.startswith("layer "):
            self.seconds.append(time.perf_counter() - self.started)
            self.sums.append(dict(self.clock.own))


def measure(source: Path, output: Path, windows: int, length: int, chunks: int | None, clocked: bool) -> Layers:
    plan = plan_of(source, "awq", windows, length)
    torch.zeros(1, device="cuda")
    settings = Settings(device="cuda")
    settings.windows = random_windows(plan)
    clock = Clock(torch.device("cuda"))
    with ExitStack() as stack:
        if clocked or chunks:
            stack.enter_context(mock.patch.object(mlp, "feedback_chunks", lambda *shape: 1 if clocked else chunks))
        for where, names in PARTS if clocked else ():
            for name in names:
                label = f"{where.__name__.rpartition('.')[2]}.{name}"
                stack.enter_context(mock.patch.object(where, name, clock.wrap(label, getattr(where, name))))
        progress = Layers(time.perf_counter(), clock)
        convert(plan, output, settings, progress)
    shutil.rmtree(output)
    return progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shape", choices=("m2", "m3"), default="m2")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--chunks", type=int, help="in work at once, where parts are not timed [what a plan says]")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    source = asked.work / asked.shape
    if not source.exists():
        wide_checkpoint(source, wide_config(asked.shape, asked.layers, None, 1, "fp8-block" if asked.shape == "m2" else "plain"), "cuda")  # fmt: skip
    found = {}
    for clocked in (False, True):
        layers = measure(source, asked.work / "out", asked.windows, asked.window_length, asked.chunks, clocked)
        took = [after - before for before, after in zip(layers.seconds, layers.seconds[1:], strict=False)]
        print(f"{'parts apart' if clocked else 'as it runs'}: {', '.join(f'{s:.1f}' for s in took)} s a layer")
        found["parts apart" if clocked else "as it runs"] = took
    before, after = layers.sums[-2:]
    parts = {name: after[name] - before.get(name, 0.0) for name in after}
    found |= {"parts": parts, "peak_device": torch.cuda.max_memory_allocated(), "device": torch.cuda.get_device_name()}
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        print(f"{seconds:8.3f} s  {name}")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
