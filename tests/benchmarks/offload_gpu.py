"""Weights and KV cache in host memory: what vLLM really moves, and what it costs, on one GPU.

    PYTHONPATH=SITE python -m tests.benchmarks.offload_gpu WORK --out FILE.json [--only NAME,NAME]

SITE has vLLM. M3's `awq` cut to seven layers (four with experts of 3.9 GB each) and M2.7's cut to twelve, dummy weights, FP8 cache.
Each case is an engine in a process of its own. The engines of a wave start at once and are measured one after the other, since they
share the host link; then all are killed (vLLM may hang at its exit). Of every case: bytes on the GPU without the cache, pinned bytes
on the host, and
  weights  decode tokens/s at 1, 4 and 16 requests of 128 tokens and at one of 8,192, and the prefill of that one;
  cache    seconds until the first token of a prompt that is new, that the GPU's cache holds, and that others have driven out of it.
A case that fails is recorded with the end of its log; exit code 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

GIB = 2**30
WAVE_S, CASE_S = 150, 60  # to start a wave, to measure one case
M3_LAYERS, M2_LAYERS = 7, 12
OFFLOADED_GIB = 7.0  # of M3's routed experts: the codes and scales of two layers take 7.2
POOL = {"m3": 2 * GIB, "m2": 800 * 2**20}  # M2: one long prompt and little more
PROMPT, SHORT = 32_768, 128
EXPERTS = {"experts"}
PREFETCH = {
    "offload_backend": "prefetch",
    "offload_group_size": 7,
    "offload_num_in_group": 2,
    "offload_params": EXPERTS,
}
UVA = {"offload_backend": "uva", "cpu_offload_gb": OFFLOADED_GIB, "cpu_offload_params": EXPERTS}
CACHED = {"enable_prefix_caching": True, "moe_backend": "marlin"}
# name -> (model, what is measured, settings of the engine, environment)
Case = tuple[str, str, dict[str, Any], dict[str, str]]
WAVES: tuple[dict[str, Case], ...] = (
    {
        "marlin": ("m3", "weights", {"moe_backend": "marlin"}, {}),
        "prefetch-marlin": ("m3", "weights", {**PREFETCH, "moe_backend": "marlin"}, {}),
        "uva-triton": ("m3", "weights", {**UVA, "moe_backend": "triton"}, {}),
        "cache": ("m2", "cache", CACHED, {}),
        "cache-offloaded": ("m2", "cache", {**CACHED, "kv_offloading_size": 8.0}, {}),
    },
    {
        "humming": ("m3", "weights", {}, {}),
        "triton": ("m3", "weights", {"moe_backend": "triton"}, {}),
        "uva-humming": ("m3", "memory", UVA, {}),
        "prefetch-humming": ("m3", "memory", PREFETCH, {}),
    },
    {"uva-marlin": ("m3", "memory", {**UVA, "moe_backend": "marlin"}, {})},
)  # fmt: skip


def write_config(folder: Path, release: str, layers: int) -> None:
    """config.json of the release's awq output, of its first layers."""
    from m3quant.planning.headers import from_config
    from m3quant.planning.plan import make_plan
    from m3quant.recipe.recipe import build_recipe, named_recipe
    from tests.benchmarks.serve_gpu import shortened
    from tests.support.paths import DATA

    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((DATA / release / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    (folder / "config.json").write_text(json.dumps(shortened(config, layers)), encoding="utf-8")
    plan = make_plan(from_config(folder / "config.json"), build_recipe(named_recipe("awq")))
    (folder / "config.json").write_bytes(plan.config_bytes)


def run_wave(cases: dict[str, Case], work: Path, keep: Callable[[str, dict[str, Any]], None]) -> None:
    """keep: what is done with a case's name and figures, as soon as they are there."""
    started, began = {}, time.monotonic()
    for name, (model, what, settings, env) in cases.items():
        for old in ("ready", "go", "json"):
            (work / f"{name}.{old}").unlink(missing_ok=True)
        settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        command = [sys.executable, "-m", "tests.benchmarks.offload_gpu", str(work), "--case", json.dumps([name, model, what, settings])]  # fmt: skip
        with (work / f"{name}.log").open("wb") as log:
            started[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **env}, start_new_session=True
            )
    try:
        wait(lambda: all((work / f"{n}.ready").exists() or p.poll() is not None for n, p in started.items()), WAVE_S)
        for name, process in started.items():
            result = work / f"{name}.json"
            (work / f"{name}.go").touch()
            if (work / f"{name}.ready").exists():
                wait(lambda path=result, child=process: path.exists() or child.poll() is not None, CASE_S)
            found = read(result) or failure(work / f"{name}.log")
            end(process)
            keep(name, found)
            print(name, json.dumps(found), f"{time.monotonic() - began:.0f} s", flush=True)
    finally:
        for process in started.values():
            end(process)


def wait(done: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.5)


def end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def failure(log: Path) -> dict[str, Any]:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line[-300:] for line in lines if "Error" in line][-3:]
    return {"failed": said or lines[-5:]}


def measure(work: Path, name: str, model: str, what: str, settings: dict[str, Any]) -> None:
    """The engine's process."""
    from tests.benchmarks.engine_bits import engine

    settings = {key: set(value) if isinstance(value, list) else value for key, value in settings.items()}
    began = time.monotonic()
    llm = engine(
        work / model, load_format="dummy", max_model_len=PROMPT + 256, kv_cache_dtype="fp8", gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=POOL[model], max_num_batched_tokens=8192, max_num_seqs=16,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}, **settings,
    )  # fmt: skip
    import torch
    import vllm

    answer: dict[str, Any] = {
        "vllm": vllm.__version__, "start_s": time.monotonic() - began, "gpu_gib": (torch.cuda.memory_allocated() - POOL[model]) / GIB,
        "pinned_gib": torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) / GIB,
        "pool_tokens": getattr(llm.llm_engine.vllm_config.cache_config, "kv_cache_size_tokens", None),
    }  # fmt: skip
    seconds(llm, [prompt(SHORT, 0)], 2)  # compiles what the first request needs
    (work / f"{name}.ready").touch()
    wait((work / f"{name}.go").exists, 2 * WAVE_S)
    answer |= {"weights": weights, "cache": cache}[what](llm) if what != "memory" else {}
    part = work / f"{name}.part"
    part.write_text(json.dumps(answer), encoding="utf-8")
    part.rename(work / f"{name}.json")
    time.sleep(600)  # killed: its exit may hang


def prompt(length: int, salt: int) -> dict[str, Any]:
    return {"prompt_token_ids": [(i * 37 + 11 + 4099 * salt) % 190_000 + 3 for i in range(length)]}


def seconds(llm: Any, texts: list[dict[str, Any]], tokens: int) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    llm.generate(texts, sampling, use_tqdm=False)
    return time.perf_counter() - began


def weights(llm: Any) -> dict[str, Any]:
    rows = []
    for count, length, tokens in ((1, SHORT, 16), (4, SHORT, 16), (16, SHORT, 16), (1, 8192, 8)):
        texts = [prompt(length, salt) for salt in range(count)]
        seconds(llm, texts, 1)
        first, whole = seconds(llm, texts, 1), seconds(llm, texts, tokens + 1)
        rows.append(
            {"requests": count, "prompt": length, "prefill_s": first, "step_ms": 1000 * (whole - first) / tokens}
        )
    return {"speed": rows}


def cache(llm: Any) -> dict[str, Any]:
    """Each prompt takes most of the pool, so the second drives the first out of the GPU."""
    seconds(llm, [prompt(PROMPT, 9)], 1)
    new = seconds(llm, [prompt(PROMPT, 1)], 1)
    held = seconds(llm, [prompt(PROMPT, 1)], 1)
    seconds(llm, [prompt(PROMPT, 2)], 1)
    time.sleep(1)  # stores to the host end
    driven_out = seconds(llm, [prompt(PROMPT, 1)], 1)
    texts = [prompt(SHORT, 20 + salt) for salt in range(16)]
    seconds(llm, texts, 1)
    first, whole = seconds(llm, texts, 1), seconds(llm, texts, 65)
    return {"new_s": new, "held_s": held, "driven_out_s": driven_out, "step_ms_16": 1000 * (whole - first) / 64}


def link() -> float:
    """GB/s from pinned memory to the GPU."""
    import torch

    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    device = host.to("cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(8):
        device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return 8 * GIB / (time.perf_counter() - began) / 1e9


def machine() -> dict[str, Any]:
    import torch

    with open("/proc/meminfo", encoding="utf-8") as file:
        total = next(int(line.split()[1]) for line in file if line.startswith("MemTotal"))
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "host_gib": total / 2**20, "link_gb_per_s": link(),
        "shm_free_gib": shutil.disk_usage("/dev/shm").free / GIB,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="names of cases, with commas")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.case:
        measure(options.work, *json.loads(options.case))
        return 0
    write_config(options.work / "m3", "minimax-m3", M3_LAYERS)
    write_config(options.work / "m2", "minimax-m2.7", M2_LAYERS)
    asked = subprocess.run(
        [sys.executable, "-c", "import json; from tests.benchmarks.offload_gpu import machine; print(json.dumps(machine()))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = {
        "machine": json.loads(asked.stdout.splitlines()[-1]),
        "layers": {"m3": M3_LAYERS, "m2": M2_LAYERS},
        "cases": {},
    }
    print(json.dumps(result["machine"]), flush=True)
    only = set(options.only.split(",")) if options.only else None

    def keep(name: str, found: dict[str, Any]) -> None:
        result["cases"][name] = found
        if options.out:
            options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")

    for wave in WAVES:
        run_wave({name: case for name, case in wave.items() if only is None or name in only}, options.work, keep)
    print(json.dumps(result), flush=True)
    return 0 if not any("failed" in row for row in result["cases"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
