"""From the Hub and to the Hub: `python -m tests.benchmarks.hub_streaming --shape m2 --stored fp8-block --layers 4 --to fp8 --rate 1GB`.

A Hub on localhost synthesizes a checkpoint (any config.json with --config, whole models too) and throws away what is uploaded, both at a
limited rate. `m3quant convert REPO OUT --publish --drop-uploaded` runs against it in a process of its own, and it is measured: wall time
against the slowest of fetching, converting and uploading alone, the most that lay on the disk, bytes fetched against the model's, peak
memory. Fetching and uploading alone take their bytes over the rate; converting alone is the same command on the same weights in a folder.
Of a model that the disk cannot hold, --sample-layers N and then half of them are converted, and the line through both gives the whole.
--converting SECONDS is what an earlier run printed. --work on a file system in memory takes the disk's speed out of the figures.
Ended by SIGTERM (a machine's time limit), it keeps in --json how far the run was every few seconds, and the peaks.

    tests.benchmarks.hub_streaming --config tests/data/minimax-m2.7/config.json --to fp8 --rate 1GB --cache-disk 20GB --sample-layers 8

--source folder leaves fetching out. On a CPU: --shape m2 --layers 3 --experts 8 --narrower 4 --rate 20MB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support.convert.common import add_tokenizer
from tests.support.publish.client import TOKEN
from tests.support.publish.outputs import CARDS, TEXTS, record_download
from tests.support.publish.synthetic import SHARD_BYTES, SyntheticModel
from tests.support.publish.synthetic_hub import Started, rate, started

from .wide import wide_config

OUTPUT_REPO = "someone/streamed"
BASES = {"minimax_m2": "MiniMaxAI/MiniMax-M2", "minimax_m3_vl": "MiniMaxAI/MiniMax-M3"}
LOOK_SECONDS = 0.05
COURSE_SECONDS = 5.0
LEAST_SAMPLE = 8  # a start differs by a second from the next, and a layer takes three
CACHE = ".m3quant/source"  # where fetched shards lie in the output while they are needed


@dataclass
class Peaks:
    """The most bytes at a time: on the disk of everything below the watched folders; of them fetched shards and the rest of the output;
    memory of the process and of the device. course: every few seconds (seconds, bytes fetched, bytes uploaded)."""

    disk: int = 0
    cache: int = 0
    output: int = 0
    memory: int = 0
    device_memory: int = 0
    course: list[tuple[float, int, int]] = field(default_factory=list)


@dataclass
class Run:
    """One combined run. seconds: wall; alone: of each stream by itself; ratio: seconds over the slowest of them."""

    rate: str
    seconds: float
    alone: dict[str, float]
    ratio: float
    peaks: Peaks
    model_bytes: int
    fetched_bytes: int
    uploaded_bytes: int
    output_bytes: int
    published: dict[str, Any]


def config_of(asked: argparse.Namespace, layers: int | None = None) -> dict[str, Any]:
    """The config.json that is asked for, of `layers` layers if that is given; without the code that a release carries beside it."""
    config: dict[str, Any]
    if asked.config is None:
        config = wide_config(asked.shape, layers or asked.layers, asked.experts, asked.narrower, asked.stored)
    else:
        config = json.loads(asked.config.read_text())
    config.pop("auto_map", None)
    if asked.config is not None and layers is not None:
        text = config.get("text_config", config)
        text["num_hidden_layers"] = layers
        for key in ("attn_type_list", "moe_layer_freq", "layer_types"):
            if key in text:
                text[key] = text[key][:layers]
        for key, value in text.get("sparse_attention_config", {}).items():
            if isinstance(value, list):
                text["sparse_attention_config"][key] = value[:layers]
    return config


def files_beside(folder: Path, config: dict[str, Any]) -> str:
    """A tokenizer of bytes, the licence and the card of the base that such a model has; the base's name."""
    folder.mkdir(parents=True)
    base = BASES[config["model_type"]]
    add_tokenizer(folder)
    (folder / "LICENSE").write_text(TEXTS[base], encoding="utf-8")
    (folder / "README.md").write_text(CARDS[base], encoding="utf-8")
    return base


class Cut(BaseException):
    """SIGTERM has come. peaks: of the run until then, None where none was under way."""

    def __init__(self, peaks: Peaks | None = None) -> None:
        self.peaks = peaks


def cut(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice
    raise Cut


def measured(
    words: Sequence[str], environment: dict[str, str], watched: Sequence[Path], output: Path, hub: Started | None = None
) -> tuple[float, dict[str, Any], Peaks]:
    """Run m3quant; its wall time, its JSON and its peaks, with their course at a hub. SystemExit with its last words if it fails, Cut."""
    peaks, done = Peaks(), threading.Event()
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "m3quant", *words], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )

    def watch() -> None:
        while not done.wait(LOOK_SECONDS):
            now = round(time.perf_counter() - began, 1)
            if hub is not None and now >= len(peaks.course) * COURSE_SECONDS:
                stats = hub.stats()
                peaks.course.append((now, stats["down"], stats["up"]))
            peaks.disk = max(peaks.disk, sum(map(lies_in, watched)))
            cache = lies_in(output / CACHE)
            peaks.cache = max(peaks.cache, cache)
            peaks.output = max(peaks.output, lies_in(output) - cache)
            peaks.memory = max(peaks.memory, resident(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    smi = device_memory_log(peaks, done) if "cpu" not in words else None
    try:
        told, _ = process.communicate()
    except Cut:
        process.kill()
        raise Cut(peaks) from None
    finally:
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
        if smi:
            smi.join()
    if process.returncode:
        raise SystemExit(f"m3quant {' '.join(words)} ended with {process.returncode}")
    return seconds, json.loads(told), peaks


def lies_in(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # it went while we looked
    return total


def resident(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 if "VmHWM:" in status else 0


def device_memory_log(peaks: Peaks, done: threading.Event) -> threading.Thread | None:
    """A thread that asks nvidia-smi once a second; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]

    def ask() -> None:
        while not done.wait(1.0):
            used = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
            peaks.device_memory = max([peaks.device_memory, *(int(mib) * 2**20 for mib in used)])

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def in_folder(work: Path, asked: argparse.Namespace, layers: int | None, commit: str) -> tuple[Path, str]:
    """The checkpoint as a folder, and its base."""
    folder, beside = work / "folder", work / "beside-folder"
    for path in (folder, beside):
        shutil.rmtree(path, ignore_errors=True)
    config = config_of(asked, layers)
    base = files_beside(beside, config)
    path = work / "config.json"
    path.write_text(json.dumps(config))
    SyntheticModel(
        path, shard_bytes=int(asked.shard_bytes), beside={p.name: p.read_bytes() for p in beside.iterdir()}
    ).write(folder)
    record_download(folder, commit)
    return folder, base


def environment(work: Path, url: str) -> dict[str, str]:
    return {
        "HF_ENDPOINT": url, "HF_HOME": str(work / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1", "TMPDIR": str(work / "tmp"),
    }  # fmt: skip


def converting_alone(work: Path, asked: argparse.Namespace, layers: int, commit: str) -> float:
    """Seconds of the conversion from a folder and to a folder, of all layers: what starting takes counts once."""
    if asked.converting is not None:
        return float(asked.converting)
    if asked.sample_layers is None or asked.sample_layers >= layers:
        return _converting(work, asked, layers, commit)
    many, few = asked.sample_layers, asked.sample_layers // 2
    of_many, of_few = (_converting(work, asked, sample, commit) for sample in (many, few))
    return of_many + (layers - many) * (of_many - of_few) / (many - few)


def _converting(work: Path, asked: argparse.Namespace, layers: int, commit: str) -> float:
    folder, _ = in_folder(work, asked, layers, commit)
    out = work / "alone"
    shutil.rmtree(out, ignore_errors=True)
    words = ["convert", str(folder), str(out), *asked.recipe, "--device", asked.device, "--json"]
    seconds, _, _ = measured(words, environment(work, ""), [out], out)
    shutil.rmtree(out)
    shutil.rmtree(folder)
    return seconds


def combined(work: Path, asked: argparse.Namespace, hub: Started, base: str, limit: str, converting: float) -> Run:
    out, watched = work / "out", [work / "out", work / "hf", work / "tmp"]
    for path in watched:
        shutil.rmtree(path, ignore_errors=True)
    (work / "tmp").mkdir()
    source = hub.repo
    if asked.source == "folder":
        source = str(in_folder(work, asked, None, hub.commit)[0])
    words = ["convert", source, str(out), *asked.recipe, "--device", asked.device, "--json"]
    words += ["--publish", OUTPUT_REPO, "--base-repo", base, "--drop-uploaded"]
    if asked.source == "hub" and asked.cache_disk:
        words += ["--cache-disk", asked.cache_disk]
    seconds, facts, peaks = measured(words, environment(work, hub.url), watched, out, hub)
    published, facts = facts["published"], json.loads((out / "m3quant.json").read_text())
    stats = hub.stats()
    shard_bytes = sum(shard["size"] for shard in facts["shards"].values())
    alone = {"convert": converting, "upload": shard_bytes / rate(limit)}
    if asked.source == "hub":
        alone["fetch"] = hub.size / rate(limit)
    if stats["shards"] != len(facts["shards"]) or stats["public"]:
        raise SystemExit(f"main of {OUTPUT_REPO} holds {stats['shards']} of {len(facts['shards'])} shards")
    return Run(
        limit, seconds, alone, seconds / max(alone.values()), peaks, hub.size, stats["down"], stats["up"],
        facts["output_bytes"], published,
    )  # fmt: skip


def print_run(run: Run, asked: argparse.Namespace) -> None:
    alone = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in sorted(run.alone.items()))
    print(f"\nat {run.rate}/s: {run.seconds:.1f} s; alone: {alone}; {run.ratio:.2f} times the slowest")
    limit = f" of --cache-disk {asked.cache_disk}" if asked.cache_disk else ""
    print(
        f"most on the disk {run.peaks.disk / 1e9:.3f} GB: fetched shards {run.peaks.cache / 1e9:.3f} GB{limit}, output {run.peaks.output / 1e9:.3f} GB "
        f"of {run.output_bytes / 1e9:.3f} GB; memory {run.peaks.memory / 1e9:.2f} GB, device {run.peaks.device_memory / 1e9:.2f} GB"
    )
    if asked.source == "hub":
        print(
            f"fetched {run.fetched_bytes / 1e9:.3f} GB of {run.model_bytes / 1e9:.3f} GB: {run.fetched_bytes / run.model_bytes:.4f} times"
        )
    print(f"uploaded {run.uploaded_bytes / 1e9:.3f} GB, published at {run.published['commit'][:12]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=None, help="config.json of a whole model, instead of --shape")
    parser.add_argument("--shape", choices=("m2", "m3"), default="m2")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=None)
    parser.add_argument("--narrower", type=int, default=1)
    parser.add_argument("--stored", choices=("plain", "fp8-block", "mxfp8"), default="plain")
    parser.add_argument("--shard-bytes", type=rate, default=SHARD_BYTES)
    parser.add_argument("--to", default="fp8")
    parser.add_argument("--calibration-tokens", default=None)
    parser.add_argument(
        "--rate", action="append", default=None, help="of the server, both ways; several for several runs [1GB]"
    )
    parser.add_argument("--cache-disk", default=None)
    parser.add_argument("--source", choices=("hub", "folder"), default="hub")
    parser.add_argument(
        "--sample-layers", type=int, default=None, help="layers that are converted alone, from the disk [all]"
    )
    parser.add_argument("--converting", type=float, default=None, help="seconds of converting alone, known already")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=Path("hub-streaming"))
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args()
    asked.recipe = ["--to", asked.to]
    if asked.calibration_tokens:
        asked.recipe += ["--calibration-tokens", asked.calibration_tokens]
    work = asked.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "tmp").mkdir()
    config = config_of(asked)
    base = files_beside(work / "beside", config)
    (work / "hub.json").write_text(json.dumps(config))
    layers = config.get("text_config", config)["num_hidden_layers"]
    if asked.sample_layers is not None and asked.sample_layers < min(LEAST_SAMPLE, layers):
        parser.error(f"--sample-layers: a line through fewer than {LEAST_SAMPLE} layers and half of them says nothing")
    signal.signal(signal.SIGTERM, cut)
    runs: list[Run] = []
    try:
        converting = converting_alone(work, asked, layers, "0" * 40)
        print(f"converting alone: {converting:.1f} s", flush=True)
        run_all(work, asked, base, converting, runs)
    except Cut as end:
        print("cut by SIGTERM", flush=True)
        keep(asked, runs, end.peaks)
        raise SystemExit(3) from None
    keep(asked, runs, None)
    shutil.rmtree(work)


def run_all(work: Path, asked: argparse.Namespace, base: str, converting: float, runs: list[Run]) -> None:
    for limit in asked.rate or ["1GB"]:
        server = ("--shard-bytes", str(int(asked.shard_bytes)))
        with started(work / "hub.json", base, limit, limit, work / "beside", *server) as hub:
            print(f"the Hub has {hub.size / 1e9:.2f} GB, hashed in {hub.hashed:.1f} s", flush=True)
            runs.append(combined(work, asked, hub, base, limit, converting))
        print_run(runs[-1], asked)


def keep(asked: argparse.Namespace, runs: list[Run], unfinished: Peaks | None) -> None:
    if asked.json:
        told = {
            k: str(v) if isinstance(v, Path) else v
            for k, v in vars(asked).items()
            if k not in ("json", "work", "config")
        }
        told |= {
            "model": asked.config.parent.name if asked.config else asked.shape,
            "measured": time.strftime("%Y-%m-%d"),
        }
        told |= {"cores": os.cpu_count(), "runs": [asdict(run) for run in runs]}
        told |= {"unfinished": asdict(unfinished)} if unfinished else {}
        asked.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
