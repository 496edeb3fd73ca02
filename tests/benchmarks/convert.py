"""A conversion against the machine: `python -m tests.benchmarks.convert --shape m2 --layers 1 --to fp8 [--against llm-compressor]`.

Makes a checkpoint of real-width layers with random weights, measures the disk in the same folder (read, write, both at
once) and the machine's other rates, converts with m3quant and, where asked, with llm-compressor in alternation, each in a
process of its own with the source dropped from the page cache, and prints seconds, bytes per second, peak memory, the
floor of each stage and what overlapped what. A data-free recipe is compared with `model_free_ptq`, AWQ with llm-compressor's
own AWQ (peers.py). --json keeps all of it, --chart a page with the timeline.

On a CPU take few experts: `--experts 8`. --narrower divides the widths, for trying the program out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from m3quant.checkpoint import Checkpoint
from m3quant.planning.plan import Plan, make_plan
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.running.device import device_name, pick_device
from m3quant.running.timing import recording

from . import floors, peers
from .chart import write_chart
from .line_recorder import LineRecorder, random_windows
from .wide import wide_checkpoint, wide_config


def plan_of(source: Path, recipe: str, windows: int, length: int) -> Plan:
    document = named_recipe(recipe)
    if document.get("calibration") != "none":
        document = {**document, "data": {**document.get("data", {}), "windows": windows, "window_length": length}}
    return make_plan(Checkpoint.open(source), build_recipe(document))


def child(arguments: argparse.Namespace) -> None:
    """Convert in this process and write seconds, peaks and the timeline to the answer file."""
    from m3quant.convert.job import Settings
    from m3quant.convert.start import convert
    from m3quant.planning.resources import resources

    source, output, answer = (Path(p) for p in arguments.child)
    plan = plan_of(source, arguments.to, arguments.windows, arguments.window_length)
    device = pick_device(arguments.device)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the driver's start is not the conversion's; both programs get it for free
    settings = Settings(device=str(device))
    if plan.recipe.calibration != "none":
        settings.windows = random_windows(plan)
    before = status("VmRSS")
    with recording() as timeline:
        started = time.perf_counter()
        recorder = LineRecorder(started)
        manifest = convert(plan, output, settings, recorder)
        seconds = time.perf_counter() - started
    need = resources(plan, on_gpu=device.type == "cuda")
    result = {
        "seconds": seconds,
        "lines": recorder.lines,
        "bytes_in": sum(u.bytes_in for u in plan.units),
        "output_bytes": manifest["output_bytes"],
        "peak_rss": status("VmHWM"),
        "rss_before": before,
        "peak_device": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "predicted": {"host": need.host, "device": need.device},
        "timeline": timeline.to_json(),
        "spans": [[s.stage, s.lane, round(s.start, 4), round(s.end, 4), s.nbytes] for s in timeline.spans],
    }
    answer.write_text(json.dumps(result))


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def ours(source: Path, output: Path, answer: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "tests.benchmarks.convert", "--child", str(source), str(output), str(answer),
        "--to", arguments.to, "--device", arguments.device,
        "--windows", str(arguments.windows), "--window-length", str(arguments.window_length),
    ]  # fmt: skip
    return peers.run(command, answer)


def peer(source: Path, output: Path, answer: Path, arguments: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    answer.with_suffix(".config.json").write_text(json.dumps(plan.quantization))
    shape = [arguments.windows, arguments.window_length, arguments.peer_batch]
    device = str(pick_device(arguments.device))
    command = peers.command(
        arguments.peer_python, "awq" if plan.recipe.calibrated else "none", [source, output, answer], device, shape
    )
    return peers.run(command, answer, arguments.peer_limit)


def make_source(work: Path, arguments: argparse.Namespace) -> Path:
    """The checkpoint under `work`, made unless an earlier call kept it."""
    kind = "" if arguments.stored == "plain" else f"-{arguments.stored}"
    source = work / f"{arguments.shape}-{arguments.layers}x{arguments.experts or 'all'}-{arguments.narrower}{kind}"
    if not source.exists():
        config = wide_config(arguments.shape, arguments.layers, arguments.experts, arguments.narrower, arguments.stored)
        started = time.perf_counter()
        size = wide_checkpoint(source, config, pick_device(arguments.device).type)
        print(f"made {source} in {time.perf_counter() - started:.1f} s: {size / 1e9:.2f} GB", flush=True)
    return source


def measure(work: Path, source: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one recipe in one record."""
    device = pick_device(arguments.device)
    plan = plan_of(source, arguments.to, arguments.windows, arguments.window_length)
    result: dict[str, Any] = {
        "measured": time.strftime("%Y-%m-%d"),
        "shape": arguments.shape, "layers": arguments.layers, "recipe": arguments.to, "rounding": build_recipe(named_recipe(arguments.to)).rounding, "experts": arguments.experts,
        "narrower": arguments.narrower, "stored": arguments.stored, "windows": arguments.windows, "window_length": arguments.window_length,
        "machine": {
            "device": device_name(device), "cores": os.cpu_count(), "device_memory": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None, "torch": torch.__version__, "python": platform.python_version(),
        },
        "disk": floors.disk_floor(source, work, plan.output_bytes),
        "rates": {**floors.rates(device), "pack": floors.pack_rate(_main_scheme(plan), plan.recipe.format, device)},
        "cache": "warm" if arguments.warm else "dropped (posix_fadvise)", "ours": [], "peer": [],
    }  # fmt: skip
    if arguments.same_bytes:
        result["same_bytes_as_cpu"] = same_bytes(work, source, arguments)
    for _ in range(arguments.repeats):
        for name in ("ours", "peer") if arguments.against else ("ours",):
            output, answer = work / "out", work / "answer.json"
            shutil.rmtree(output, ignore_errors=True)
            if not arguments.warm:
                floors.drop_from_cache(source)
            if name == "ours":
                row = ours(source, output, answer, arguments)
            else:
                row = peer(source, output, answer, arguments, plan)
            result[name].append(row)
            print(f"{name}: {peers.outcome(row)}", flush=True)
            shutil.rmtree(output, ignore_errors=True)
    return {**result, "stages": stage_rows(result, plan)}


def _main_scheme(plan: Plan) -> str:
    return str(plan.recipe.scheme("routed_experts"))


def same_bytes(work: Path, source: Path, arguments: argparse.Namespace) -> bool:
    """Whether the CPU and the device write the same shards."""
    digests = []
    for device in ("cpu", arguments.device):
        output = work / "out"
        shutil.rmtree(output, ignore_errors=True)
        row = ours(source, output, work / "answer.json", argparse.Namespace(**{**vars(arguments), "device": device}))
        if "failed" in row:
            raise SystemExit(row["failed"])
        digests.append(json.loads((output / "m3quant.json").read_text())["shards"])
    return bool(digests[0] == digests[1])


def finished(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted((row for row in rows if "seconds" in row), key=lambda row: row["seconds"])


def stage_rows(result: dict[str, Any], plan: Plan) -> list[dict[str, Any]]:
    """One row a stage of the run of median time: bytes, busy seconds, the floor of moving those bytes, and the ratio."""
    runs = finished(result["ours"])
    if not runs:
        return []
    run, disk, rates = runs[(len(runs) - 1) // 2], result["disk"], result["rates"]
    workers = os.cpu_count() or 1
    on_gpu = "h2d" in rates
    own = {
        "read": disk["read"], "write": disk["write"], "hash": rates["hash"], "h2d": rates.get("h2d"), "d2h": rates.get("d2h"),
        "pack": rates["pack"] if on_gpu else rates["pack"] * workers,
    }  # fmt: skip
    rows = []
    for stage in run["timeline"]["stages"]:
        rate = own.get(stage["stage"])
        floor = stage["nbytes"] / rate if rate and stage["nbytes"] else None
        rows.append({**stage, "rate": rate, "floor": floor, "share": stage["busy"] / run["seconds"]})
    return rows


def print_result(result: dict[str, Any]) -> None:
    disk, runs = result["disk"], finished(result["ours"])
    print(
        f"\n{result['shape']} x{result['layers']}, {result['stored']}, to {result['recipe']} on {result['machine']['device']}, {result['machine']['cores']} cores, "
        f"torch {result['machine']['torch']}; {disk['bytes_in'] / 1e9:.2f} GB in, {disk['bytes_out'] / 1e9:.2f} GB out"
    )
    print(
        f"disk: read {disk['read'] / 1e9:.2f} GB/s ({disk['read_seconds']:.2f} s), from the page cache {disk['cached_read'] / 1e9:.2f} GB/s, "
        f"write {disk['write'] / 1e9:.2f} GB/s ({disk['write_seconds']:.2f} s), both at once {disk['both_seconds']:.2f} s"
    )
    if "same_bytes_as_cpu" in result:
        print(
            "the device and the CPU write " + ("the same bytes" if result["same_bytes_as_cpu"] else "DIFFERENT BYTES")
        )
    print(
        "rates: "
        + ", ".join(
            f"{k} {v / (1e12 if 'flops' in k else 1e9):.2f} {'TFLOP/s' if 'flops' in k else 'GB/s'}"
            for k, v in result["rates"].items()
        )
    )
    for name, rows in (("m3quant", runs), ("llm-compressor", finished(result["peer"]))):
        if not rows:
            continue
        seconds = [row["seconds"] for row in rows]
        middle = rows[(len(rows) - 1) // 2]
        print(
            f"{name}: median {median(seconds):.2f} s of {len(seconds)} ({min(seconds):.2f} to {max(seconds):.2f}), "
            f"{disk['bytes_in'] / median(seconds) / 1e9:.2f} GB/s of source, peak RSS {middle['peak_rss'] / 1e9:.2f} GB, "
            f"GPU {middle['peak_device'] / 1e9:.2f} GB, {median(seconds) / disk['both_seconds']:.2f}x the disk floor"
        )
    for row in result["ours"]:
        if "failed" in row:
            print(f"failed: {row['failed']}")
    for row in result["peer"]:
        print(f"llm-compressor{' ' * ('version' in row)}{row.get('version', '')}: {peers.outcome(row)}")
    if speed := peers.ratio(runs, result["peer"]):
        print(f"m3quant is {speed}")
    if result.get("peer_note"):
        print(result["peer_note"])
    for line in runs[(len(runs) - 1) // 2]["lines"] if runs else ():
        print(f"  at {line}")
    print(
        f"\n{'stage':>8} {'spans':>6} {'GB':>7} {'busy s':>7} {'GB/s':>6} {'floor s':>8} {'busy/floor':>10} {'of run':>7}"
    )
    for row in result["stages"]:
        rate = row["nbytes"] / row["busy"] / 1e9 if row["busy"] else 0.0
        floor = f"{row['floor']:8.2f} {row['busy'] / row['floor']:10.2f}" if row["floor"] else f"{'':8} {'':10}"
        print(
            f"{row['stage']:>8} {row['spans']:6} {row['nbytes'] / 1e9:7.2f} {row['busy']:7.2f} {rate:6.2f} {floor} {row['share']:7.0%}"
        )
    if runs:
        table = runs[(len(runs) - 1) // 2]["timeline"]["overlap"]
        print("\nshare of a stage's busy time (row) in which another was busy too (column)")
        print(f"{'':>8} " + " ".join(f"{name:>7}" for name in table))
        for name, others in table.items():
            print(f"{name:>8} " + " ".join(f"{others[b]:7.0%}" if b in others else f"{'':7}" for b in table))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=("m2", "m3"), default="m2")
    p.add_argument("--layers", type=int, default=1)
    p.add_argument(
        "--to", default="fp8", help="a shipped recipe, such as fp8, fp8-block, int4 or awq; several with commas"
    )
    p.add_argument("--experts", type=int, default=None, help="experts of a layer, instead of the release's")
    p.add_argument(
        "--stored", choices=("plain", "fp8-block", "mxfp8"), default="plain", help="how the source stores its weights"
    )
    p.add_argument("--narrower", type=int, default=1, help="divide hidden and expert sizes by this")
    p.add_argument("--device", default="auto")
    p.add_argument("--against", choices=("llm-compressor",), default=None)
    p.add_argument("--peer-python", default=sys.executable, help="a Python that has llmcompressor")
    p.add_argument(
        "--peer-batch", type=int, default=8, help="windows of a batch of its calibration (its own default: 1)"
    )
    p.add_argument("--peer-limit", type=float, default=None, help="stop a run of it that is longer than these seconds")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--warm", action="store_true", help="leave the source in the page cache")
    p.add_argument("--same-bytes", action="store_true", help="convert on the CPU first, and compare all shards")
    p.add_argument("--windows", type=int, default=128)
    p.add_argument("--window-length", type=int, default=512)
    p.add_argument("--work", type=Path, default=Path("bench-work"))
    p.add_argument("--keep", action="store_true", help="leave the source for the next call")
    p.add_argument("--json", type=Path, default=None)
    p.add_argument("--chart", type=Path, default=None)
    p.add_argument("--child", nargs=3, metavar=("SRC", "DST", "ANSWER"), help=argparse.SUPPRESS)
    return p


def main() -> None:
    arguments = parser().parse_args()
    if arguments.child:
        child(arguments)
        return
    note = None
    if arguments.against:
        device = str(pick_device(arguments.device))
        for recipe in arguments.to.split(","):
            calibration = "awq" if build_recipe(named_recipe(recipe)).calibrated else "none"
            if refused := peers.refusal(calibration, device):
                raise SystemExit(f"--against {arguments.against} --to {recipe}: {refused}")
        found = subprocess.run([arguments.peer_python, "-c", "import llmcompressor"], capture_output=True)
        if found.returncode:
            note = f"llm-compressor is not installed in {arguments.peer_python}: give --peer-python"
            arguments.against = None
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    source = make_source(work, arguments)
    results = []
    for recipe in arguments.to.split(","):
        result = measure(work, source, argparse.Namespace(**{**vars(arguments), "to": recipe}))
        if note:
            result["peer_note"] = note
        print_result(result)
        if arguments.chart:
            write_chart(arguments.chart.with_name(f"{arguments.chart.stem}-{recipe}{arguments.chart.suffix}"), result)
        for row in result["ours"]:
            row.pop("spans", None)
        results.append(result)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if not arguments.keep:
        shutil.rmtree(source)
    if not all(finished(r["ours"]) and r.get("same_bytes_as_cpu", True) for r in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
