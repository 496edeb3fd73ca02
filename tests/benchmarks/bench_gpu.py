"""Tokens per second of full-size models on one GPU: `m3quant bench`'s own start and load generator, through the guard and without.

    python -m tests.benchmarks.bench_gpu --preset m2.7-awq --out OUT.json --seconds 380
    python -m tests.benchmarks.bench_gpu --preset m2.7-awq --out OUT.json --through guard,engine --seconds 560
    python -m tests.benchmarks.bench_gpu --preset m2.7-awq --out OUT.json --flags batched-16384,sync --seconds 560
    python -m tests.benchmarks.bench_gpu --preset tiny-m2 --out OUT.json                     # the CPU build of vLLM

The folder is what `convert` writes of the release, its weights holes (tests/support/hollow.py), so vLLM makes its own
(`--load-format dummy`); prompts are random. The most telling points come first, and OUT.json is written after each: a kill
loses the point in work alone. `tests.benchmarks.bench_gpu_table` makes the documentation's table and `measured.yaml`'s sets of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shlex
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3quant.checkpoint.writer import write_json_atomic
from m3quant.engines.vllm import probe
from m3quant.engines.vllm.log import parse_log
from m3quant.errors import M3QuantError
from m3quant.families import family_of
from m3quant.runtime.bench import SPARE, Point, Row, measure
from m3quant.runtime.fit import Fit
from m3quant.runtime.serve import Prepared, check_start, prepare
from m3quant.runtime.serve_recipe import ServeRecipe, load_serve_recipe
from tests.support.hollow import write_hollow
from tests.support.paths import DATA, FIXTURES

OUTPUT = 128  # generated tokens of a request
MOST = 64  # requests at once
START_S = 240  # until an engine must be ready: an H200 took 155 s with M2.7 in INT4, kernels to compile included
MIXED_START_S = 360  # with experts of several widths, each of which has its kernels to compile: 240 s for M3
# Bytes of a GPU, by the engine's log. consumed: weights and what is outside of torch.
MEMORY = ("requested", "weights", "consumed", "activation", "graphs", "kv_available")
END_S = 15  # kept of the time for an engine's end
# Requests at once and thousands of tokens, the most telling first. A context that the server cannot take is its longest.
CELLS = (
    (1, 1), (16, 1), (64, 1), (1, 8), (16, 8), (1, 32), (4, 8), (4, 1), (1, 128), (4, 32), (64, 8), (16, 32), (4, 128), (64, 32), (16, 128), (64, 128),
)  # fmt: skip
ROUNDS = {1: 3, 4: 2, 16: 2, 64: 1}  # requests of each stream


@dataclass(frozen=True)
class Preset:
    """A release, what it was converted to, and how it is served."""

    source: Path
    recipe: str
    settings: Mapping[str, Any]


GPU: dict[str, Any] = {"kv_dtype": "fp8", "max_num_seqs": MOST}
TINY: dict[str, Any] = {"node": "cpu:2GiB", "max_num_seqs": 4, "context": 2048, "start_timeout": 900}
PRESETS = {
    "m2.7-awq": Preset(DATA / "minimax-m2.7", "awq", GPU),
    "m2.7-fit-1xh200": Preset(DATA / "minimax-m2.7", "fit-m2.7-1xh200", GPU),
    "m2.7-fit-1xh100": Preset(DATA / "minimax-m2.7", "fit-m2.7-1xh100", GPU),
    "m3-fit-1xh200": Preset(DATA / "minimax-m3", "fit-m3-1xh200", {**GPU, "start_timeout": MIXED_START_S}),
    "m3-fit-2xh100": Preset(DATA / "minimax-m3", "fit-m3-2xh100", {**GPU, "start_timeout": MIXED_START_S}),
    "m2.7-fp8": Preset(DATA / "minimax-m2.7", "fp8", GPU),  # this and the next: two H200s
    "m3-awq": Preset(DATA / "minimax-m3", "awq", GPU),
    "tiny-m2": Preset(FIXTURES / "tiny-m2", "awq", TINY),
    "tiny-m3": Preset(FIXTURES / "tiny-m3", "awq", TINY),
}
# Choices of `serve`, one changed at a time.
FLAGS: dict[str, dict[str, Any]] = {
    "base": {},
    "batched-2048": {"max_num_batched_tokens": 2048},
    "batched-16384": {"max_num_batched_tokens": 16384},
    "sync": {"extra": ["--no-async-scheduling"]},
    "kv-auto": {"kv_dtype": "auto"},
    "graphs-16": {"extra": ["--cudagraph-capture-sizes", "1", "2", "4", "8", "16"]},
    "eager": {"extra": ["--enforce-eager"]},
    "marlin": {"extra": ["--moe-backend", "marlin"]},
    "expert-parallel": {"extra": ["--enable-expert-parallel"]},  # of several GPUs
}
THROUGH: dict[str, dict[str, Any]] = {"guard": {"guard": True}, "engine": {"guard": False}}
PLUGIN = """
def register():
    import runpy
    runpy.run_path({probe!r})["replace_gemma_norm"]({norm!r})
"""


def points_of(fit: Fit, cells: Sequence[tuple[int, int]]) -> list[Point]:
    """Points in the given order, without those that even the largest pool the plan allows does not hold at once, or that the server
    would not run at once. The plan promises the smallest; what the engine then held is in the result, and decides (`queued`)."""
    pool = fit.prediction.pool("low")
    found = dict[Point, None]()
    for requests, thousands in cells:
        context = min(thousands * 1024, fit.context)
        blocks = math.ceil(context / pool.block_size)
        if requests <= fit.setup.max_num_seqs and requests * blocks < pool.blocks and context > OUTPUT + SPARE:
            found[Point(requests, context, OUTPUT, requests * ROUNDS[requests])] = None
    return list(found)


def row_json(row: Row, block_size: int, pool_tokens: int | None, rehearsal: bool) -> dict[str, Any]:
    """steady_tokens_per_s: requests at once over the median time between two tokens, in which no prompt of another request is. queued:
    whether some requests had to wait for the cache. rehearsal: the first point, which is measured twice, as what is compiled at its first
    run is in its figures."""
    point = row.point
    needed = point.concurrency * math.ceil(point.context / block_size) * block_size
    return {
        "guard": row.guarded, "concurrency": point.concurrency, "context": point.context, "output": point.output, "prompt": point.prompt,
        "requests": point.requests, **row.measured.to_json(), "steady_tokens_per_s": point.concurrency * 1000 / row.measured.itl_ms[50],
        "bound_tokens_per_s": row.bound or None, "queued": None if pool_tokens is None else needed > pool_tokens, "rehearsal": rehearsal,
    }  # fmt: skip


def command_of(prepared: Prepared) -> str:
    """The server's command without this machine's paths."""
    words = prepared.launch.command
    after = words.index("serve") + 1
    return shlex.join(["vllm", "serve", Path(words[after]).name, *words[after + 1 :]])


class Figures:
    """The result, written whenever it grows."""

    def __init__(self, out: Path, head: dict[str, Any]) -> None:
        self.out, self.document = out, {**head, "starts": []}
        self.write()

    def start(self, name: str, prepared: Prepared) -> dict[str, Any]:
        fit = prepared.fit
        begun = {
            "name": name, "command": command_of(prepared), "context": fit.context, "kv_dtype": fit.setup.kv_dtype,
            "max_num_batched_tokens": fit.setup.max_num_batched_tokens, "max_num_seqs": fit.setup.max_num_seqs, "rows": [],
        }  # fmt: skip
        self.document["starts"].append(begun)
        self.write()
        return begun

    def write(self) -> None:
        write_json_atomic(self.out, self.document)


def run_start(
    name: str, prepared: Prepared, cells: Sequence[tuple[int, int]], figures: Figures, deadline: float
) -> dict[str, Any]:
    """Start the server, measure as many points as there is time for, stop it. A failure is part of the result."""
    begun, result = time.monotonic(), figures.start(name, prepared)
    points = points_of(prepared.fit, cells)
    log = figures.out.with_name(f"{figures.out.stem}-{name}.log")
    stopped = threading.Event()
    timer = threading.Timer(max(0.0, deadline - END_S - begun), stopped.set)

    def say(line: str) -> None:
        if line.startswith("point 1 "):
            result["ready_s"] = round(time.monotonic() - begun, 1)
            said = parse_log(log.read_text(encoding="utf-8"))
            result["pool_tokens"] = said.pool_tokens
            result["memory"] = {name: getattr(said, name) for name in MEMORY}
            figures.write()
        print(f"{name}, {time.monotonic() - begun:.0f} s: {line}", flush=True)

    def on_row(row: Row) -> None:
        block = prepared.fit.pool.block_size
        result["rows"].append(row_json(row, block, result["pool_tokens"], rehearsal=not result["rows"]))
        result["rows"][-1]["at_s"] = round(time.monotonic() - begun, 1)
        figures.write()
        say(
            f"{row.measured.decode_tokens_per_s:.1f} tokens/s decoding, steady {result['rows'][-1]['steady_tokens_per_s']:.1f}"
        )

    timer.start()
    try:
        check_start(prepared)
        again = [points[0], *points]
        measure(prepared, again, log, START_S + MOST * 60, None, None, say, stopped, False, on_row)
    except M3QuantError as error:
        result["error"] = str(error)
        result["log_tail"] = log.read_text(encoding="utf-8").splitlines()[-40:] if log.exists() else []
        print(f"{name}: {error}", flush=True)
    finally:
        timer.cancel()
    result["not_measured"] = [[p.concurrency, p.context] for p in points[max(0, len(result["rows"]) - 1) :]]
    result["seconds"] = round(time.monotonic() - begun, 1)
    figures.write()
    return result


def recipe_of(preset: Preset, changes: Mapping[str, Any]) -> ServeRecipe:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port = probe_socket.getsockname()[1]
    extra = ["--load-format", "dummy", *changes.get("extra", [])]
    own = {"port": port, "start_timeout": START_S, "shutdown_timeout": 5, **preset.settings, **changes, "extra": extra}
    return load_serve_recipe(None, own)


def run_starts(preset: Preset, starts: Mapping[str, Mapping[str, Any]], cells: Sequence[tuple[int, int]], figures: Figures, folder: Path,
               deadline: float) -> bool:  # fmt: skip
    """Each start in turn, as long as there is time for one as slow as the last. Whether all gave a figure."""
    took, good = 0.0, True
    for name, changes in starts.items():
        if took and time.monotonic() + took + END_S > deadline:
            figures.document.setdefault("not_started", []).append(name)
            figures.write()
            continue
        try:
            prepared = prepare(str(folder), recipe_of(preset, changes), None, None, None, False, False, print)
        except M3QuantError as error:  # a flag with which the model does not fit
            print(f"{name}: refused: {error}", flush=True)
            figures.document.setdefault("refused", {})[name] = str(error)
            figures.write()
            good = False
            continue
        figures.document["machine"] |= {"node": prepared.fit.node.name, "engine": prepared.installed and prepared.installed.version,
                                        "stored_bytes": prepared.fit.model.stored_bytes}  # fmt: skip
        result = run_start(name, prepared, cells, figures, deadline)
        took = result.get("ready_s", result["seconds"])
        good = good and len(result["rows"]) > 1 and "error" not in result
    return good


def environment(norm: str, folder: Path) -> dict[str, str]:
    """What the engine's processes need where flashinfer is not packed: another sampler, and M3's norm as its plain formula, by a plugin."""
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if importlib.util.find_spec("flashinfer") is None:
        env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if norm:
        info = folder / "m3quant_gemma_norm-0.dist-info"
        info.mkdir(parents=True)
        (folder / "m3quant_gemma_norm.py").write_text(PLUGIN.format(probe=probe.__file__, norm=norm))
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: m3quant-gemma-norm\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "[vllm.general_plugins]\nm3quant_gemma_norm = m3quant_gemma_norm:register\n"
        )
        env["PYTHONPATH"] = os.pathsep.join(part for part in (str(folder), os.environ.get("PYTHONPATH", "")) if part)
    return env


def cells_of(text: str) -> tuple[tuple[int, int], ...]:
    """`1x8,16x1` as requests and thousands of tokens. Raises ValueError for another form."""
    cells = tuple(
        (int(requests), int(thousands)) for requests, thousands in (point.split("x") for point in text.split(","))
    )
    if any(requests < 1 or thousands < 1 for requests, thousands in cells):
        raise ValueError(text)
    return cells


def seconds(text: str) -> float:
    """Raises ValueError for what is no time."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def file_to_write(text: str) -> Path:
    """Raises ArgumentTypeError for a folder: known only after minutes otherwise."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder: name a file in it")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON; the engine's logs go beside it")
    parser.add_argument("--seconds", type=seconds, default=380.0, help="of everything [380]")
    parser.add_argument("--through", help="guard, engine or both with a comma: a start each [guard]")
    parser.add_argument(
        "--points",
        type=cells_of,
        help="requests x thousands of tokens, in this order, as 1x1,16x1,1x8 [all; 1x1,16x1,4x1 for --flags]",
    )
    parser.add_argument("--flags", help=f"a start each, through the guard: {', '.join(FLAGS)}")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    if arguments.flags is not None and arguments.through is not None:
        parser.error("--flags are measured through the guard alone: give them without --through")
    flags = arguments.flags is not None
    names, known = (arguments.flags, FLAGS) if flags else (arguments.through or "guard", THROUGH)
    if unknown := set(names.split(",")) - set(known):
        parser.error(f"unknown: {', '.join(sorted(map(repr, unknown)))}; there are {', '.join(known)}")
    starts = {name: known[name] for name in names.split(",")}
    preset = PRESETS[arguments.preset]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="m3quant-bench-gpu-") as work:
        folder = write_hollow(Path(work) / arguments.preset, preset.source, preset.recipe)
        family = family_of(json.loads((folder / "config.json").read_text(encoding="utf-8")), str(folder))
        os.environ |= environment(family.in_engine("vllm").probe_norm, Path(work) / "plugin")
        head = {
            "preset": arguments.preset, "recipe": preset.recipe, "arguments": sys.argv[1:], "measured": time.strftime("%Y-%m-%d"), "machine": {},
        }  # fmt: skip
        figures = Figures(arguments.out, head)
        cells = arguments.points or (((1, 1), (16, 1), (4, 1)) if flags else CELLS)
        good = run_starts(preset, starts, cells, figures, folder, deadline)
    print(json.dumps(figures.document["starts"], indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
