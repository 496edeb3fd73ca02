"""Where the feedback quantizer's time goes on a GPU, at a model's real widths: `python -m tests.benchmarks.feedback_speed --shape m2`.

One chunk of experts, as many as the quantizer takes at once, with moments of random rows; each named part is timed with the
device brought to rest before and after it, so that parts do not overlap. Printed for the whole layer: seconds of a chunk times
chunks. --json keeps all of it, with the machine's product rate, which gives the floor of what is multiplied.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from m3quant.calibration.feedback import fit as fitting
from m3quant.calibration.feedback import heldout, refit, solve, targets
from m3quant.calibration.feedback.evidence import GATED, NORMED
from m3quant.calibration.feedback.mlp import experts_at_once
from m3quant.calibration.feedback.moments import Moments, MomentSum, Segment, halves_of
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.planning.quantizers import FEEDBACK_CHUNK_BYTES
from m3quant.schemes import parse_scheme

# experts, hidden size, intermediate size, experts per token
SHAPES = {"m2": (256, 3072, 1536, 8), "m3": (128, 6144, 3072, 4), "tiny": (8, 256, 128, 2)}
PARTS: list[tuple[Any, str]] = [
    (fitting, "estimate"),
    (fitting, "heldout_errors"),
    (fitting, "aimed"),
    (heldout, "estimate"),
    (heldout, "aimed"),
    (solve, "falling_order"),
    (solve, "permuted"),
    (solve, "sweep_factor"),
    (solve, "descent_factor"),
    (solve, "round_columns"),
    (solve, "refit"),
    (refit, "matmul"),
    (refit, "gram_matrices"),
    (solve.Solver, "nearest"),
    (solve.Solver, "_sweep"),
    (solve.Solver, "_descended"),
    (solve.Solver, "_refitted"),
    (solve.Solver, "solve"),
    (solve.Solver, "stored"),
    (solve.State, "better_rows"),
    (solve.Grid, "start"),
    (targets, "cholesky"),
]


class Clock:
    """Seconds inside named functions, outermost and own; the device at rest at every boundary."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total: dict[str, float] = defaultdict(float)
        self.own: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.inner = [0.0]

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                spent = self.now() - start
                self.own[name] += spent - self.inner.pop()
                self.total[name] += spent
                self.calls[name] += 1
                self.inner[-1] += spent

        return timed


def moments(count: int, width: int, outputs: int, rows: int, device: torch.device) -> Moments:
    generator = torch.Generator(device=device).manual_seed(width)
    spread = torch.exp(torch.randn(width, generator=generator, device=device))
    total = MomentSum(count, width, outputs, device)
    for unit in range(count):
        x = torch.randn(rows, width, generator=generator, device=device) * spread
        error = torch.randn(rows, outputs, generator=generator, device=device) * 0.03
        gates = torch.rand(rows, generator=generator, device=device)
        halves = halves_of(0, rows, rows // 2)
        total.add(x, error, gates, [Segment(unit, segment.half, segment.rows) for segment in halves])
    return total.total()


def measure(
    shape: str, scheme: str, rows: int, device: torch.device, chunk_bytes: int, rounds: int | None
) -> dict[str, Any]:
    experts, hidden, inner, _ = SHAPES[shape]
    chunk = min(experts, experts_at_once(experts, hidden, inner, chunk_bytes))
    settings, parsed = FeedbackSettings(), parse_scheme(scheme)
    if rounds is not None:
        settings = replace(settings, rounds=rounds)
    out: dict[str, Any] = {"shape": shape, "scheme": scheme, "rows": rows, "chunk": chunk, "chunks": experts / chunk}
    for role, width, outputs, sizes in (("w1, w3", hidden, hidden, 2 * [inner]), ("w2", inner, hidden, [hidden])):
        rule = NORMED if role != "w2" else GATED
        given = moments(chunk, width, outputs, rows, device)
        weights = [torch.randn(chunk, size, width, device=device) * 0.02 for size in sizes]
        readers = heldout.Readers.of(weights, parsed, inputs=role != "w2")
        prior = given.of(None)[0][0] / rows if role != "w2" else None
        fitting.fit(given, readers, rule, prior, settings)  # compiles
        whole = Clock(device)
        whole.wrap("fit", fitting.fit)(given, readers, rule, prior, settings)
        clock = Clock(device)
        with ExitStack() as stack:
            for where, name in PARTS:
                label = name if where is not heldout else f"heldout_errors.{name}"
                label = f"refit.{name}" if where is refit else label
                stack.enter_context(mock.patch.object(where, name, clock.wrap(label, getattr(where, name))))
            fitting.fit(given, readers, rule, prior, settings)
        scale = experts / chunk
        out[role] = {
            "seconds": whole.total["fit"] * scale,
            "parts": {
                name: {"own": clock.own[name] * scale, "total": clock.total[name] * scale, "calls": clock.calls[name]}
                for name in sorted(clock.own, key=lambda name: -clock.own[name])
            },
        }
        del given, weights, readers
    if device.type == "cuda":
        out["peak_device"] = torch.cuda.max_memory_allocated()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="m2")
    parser.add_argument("--scheme", default="int4-g128")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, help="of descent and refit; left out: the default")
    parser.add_argument("--chunk-bytes", type=int, default=FEEDBACK_CHUNK_BYTES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(
        arguments.shape,
        arguments.scheme,
        arguments.rows,
        torch.device(arguments.device),
        arguments.chunk_bytes,
        arguments.rounds,
    )
    for role in ("w1, w3", "w2"):
        print(f"{arguments.shape} {role}: {found[role]['seconds']:.2f} s a layer ({found['chunk']} experts at once)")
        for name, part in found[role]["parts"].items():
            print(f"  {part['own']:8.3f} own {part['total']:8.3f} total {part['calls']:5d} calls  {name}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
