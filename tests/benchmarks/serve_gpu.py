"""Predicted against measured memory of a serving node: vLLM with full-size shapes and dummy weights, on real GPUs.

    python -m tests.benchmarks.serve_gpu OUT [--tp 2 --card-gib 79.1] [--only m2|m3]

Each case is an engine in a process of its own, bounded in time: the awq output's config.json of the release, `--load-format dummy`,
FP8 cache, text only, then 16 tokens generated. M3 is cut to as many layers as the memory holds (stated in the result).
`--card-gib` lowers the memory utilization to what a smaller card has. The engine's log goes through `m3quant plan --check-log`'s own
code; OUT/serve_gpu.json gets every line, OUT/*.log the logs. A case that fails is recorded with its last lines; exit code 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from m3quant.engines.vllm.log import parse_log
from m3quant.engines.vllm.probe import replace_gemma_norm
from m3quant.families.minimax_m3_vl import MiniMaxM3VL
from m3quant.planning.headers import from_config
from m3quant.planning.plan import make_plan
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.checklog import check_log
from m3quant.runtime.fit import Ask, assess
from m3quant.runtime.hardware import GIB, Gpu, Node
from m3quant.runtime.model import open_subject
from tests.support.paths import DATA, ROOT

RELEASES = {"m2": "minimax-m2.7", "m3": "minimax-m3"}
LIMIT_S = 420  # the first INT4 engine compiles Marlin, 75-110 s, and M3's first prefill its sparse kernels
MIN_TOKENS = 32_768
ENV = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO", "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}  # fmt: skip
CHILD = "M3QUANT_SERVE_GPU_CASE"  # set in the engine's processes: the case


def shortened(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config of the first `layers` layers."""
    out = json.loads(json.dumps(config))
    text = out.get("text_config", out)
    whole = text["num_hidden_layers"]
    text["num_hidden_layers"] = layers

    def cut(values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, list) and len(value) == whole:
                values[key] = value[:layers]
            elif isinstance(value, dict):
                cut(value)

    cut(text)
    return out


def write_config(folder: Path, release: str, layers: int | None) -> None:
    """config.json of the awq output of `release`, as `m3quant convert --to awq` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((DATA / release / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)  # the engine has the architecture; there is no code to trust
    (folder / "config.json").write_text(json.dumps(shortened(config, layers) if layers else config), encoding="utf-8")
    plan = make_plan(from_config(folder / "config.json"), build_recipe(named_recipe("awq")))
    (folder / "config.json").write_bytes(plan.config_bytes)


def model_of(folder: Path, release: str, layers: int | None) -> Any:
    """The prediction's view of the same: recipe over the release's config."""
    source = folder.with_name(folder.name + "-source")
    source.mkdir(parents=True, exist_ok=True)
    config = json.loads((DATA / release / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(shortened(config, layers) if layers else config), encoding="utf-8")
    return open_subject(str(source)).converted(build_recipe(named_recipe("awq")))


def run(case: str, folder: Path, model: Any, node: Node, ask: Ask, out: Path) -> dict[str, Any]:
    fit = assess(model, node, ask)
    row: dict[str, Any] = {
        "case": case,
        "layers": model.text["num_hidden_layers"],
        "node": node.name,
        "fits": fit.fits,
        "why_not": fit.why_not,
    }
    if not fit.fits:
        return row
    settings = {
        "model": str(folder), "load_format": "dummy", "skip_tokenizer_init": True, "kv_cache_dtype": fit.setup.kv_dtype,
        "max_model_len": min(fit.longest_context, 131_072), "max_num_seqs": fit.setup.max_num_seqs,
        "max_num_batched_tokens": fit.setup.max_num_batched_tokens, "block_size": fit.setup.block_size,
        "gpu_memory_utilization": ask.utilization, "tensor_parallel_size": fit.setup.split.tp,
    }  # fmt: skip
    if case == "m3":
        settings["limit_mm_per_prompt"] = {"image": 0, "video": 0}
    log_path = out / f"{case}-tp{fit.setup.split.tp}.log"
    began = time.monotonic()
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.serve_gpu", json.dumps(settings)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENV, CHILD: case},
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            code = f"stopped after {LIMIT_S} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log_path.read_text(encoding="utf-8", errors="replace")
    row |= {
        "exit": code,
        "seconds": round(time.monotonic() - began, 1),
        "settings": settings,
        "tail": text.splitlines()[-15:],
    }
    done = [line.split("SERVE_GPU ", 1)[1] for line in text.splitlines() if "SERVE_GPU " in line]
    row["generated"] = json.loads(done[-1]) if done else None
    parsed = parse_log(text)
    if parsed.weights is None:
        return row
    check = check_log(model, parsed, node, ask)
    row |= {
        "holds": check.holds,
        "vllm": parsed.version,
        "total_gib": (parsed.total or 0) / GIB,
        "lines": [line.to_json() for line in check.lines],
    }
    return row


def cases(arguments: argparse.Namespace, node: Node) -> list[tuple[str, int | None]]:
    wanted = [arguments.only] if arguments.only else ["m2", "m3"]
    return [(case, None if case == "m2" else layers_that_fit(arguments, node)) for case in wanted]


def layers_that_fit(arguments: argparse.Namespace, node: Node) -> int:
    """The most layers of M3 whose awq output leaves MIN_TOKENS of cache."""
    for layers in range(60, 3, -1):
        model = model_of(arguments.out / "m3", RELEASES["m3"], layers)
        if assess(model, node, ask_of(arguments, node)).longest_context >= MIN_TOKENS:
            return layers
    raise SystemExit(f"{node.name} holds not even four layers of M3.")


def ask_of(arguments: argparse.Namespace, node: Node) -> Ask:
    utilization = (
        0.92 if arguments.card_gib is None else round(0.92 * arguments.card_gib * GIB / node.gpu.total_bytes, 4)
    )
    return Ask(kv_dtype="fp8", tp=arguments.tp, pp=1, utilization=utilization)


def generate(settings: dict[str, Any]) -> None:
    """The engine's process: start it, make 16 tokens, say so."""
    from vllm import LLM, SamplingParams

    began = time.monotonic()
    llm = LLM(**settings)
    loaded = time.monotonic()
    prompt = {"prompt_token_ids": list(range(5, 69))}
    out = llm.generate([prompt], SamplingParams(max_tokens=16, ignore_eos=True, detokenize=False))
    result = {"start_s": round(loaded - began, 1), "generated": len(out[0].outputs[0].token_ids)}
    print("SERVE_GPU " + json.dumps(result), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--card-gib", type=float, help="memory of the card to imitate")
    parser.add_argument("--only", choices=sorted(RELEASES))
    parser.add_argument("--dry-run", action="store_true", help="write the configs and the predictions, start nothing")
    parser.add_argument("--total-gib", type=float, help="memory of one GPU; asked of torch unless given")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "given"
    if arguments.total_gib is None:
        # In a process of its own: a CUDA context here would take memory from the engine.
        asked = "import torch; print(torch.cuda.get_device_name(0)); print(torch.cuda.mem_get_info()[1])"
        answer = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        name, total = answer[0], int(answer[1])
    else:
        total = int(arguments.total_gib * GIB)
    node = Node(arguments.tp, Gpu(name.replace(" ", "-"), total, 0.0, "torch.cuda.mem_get_info"))
    rows = []
    for case, layers in cases(arguments, node):
        folder = arguments.out / case
        write_config(folder, RELEASES[case], layers)
        model = model_of(folder, RELEASES[case], layers)
        ask = ask_of(arguments, node)
        if arguments.dry_run:
            fit = assess(model, node, ask)
            rows.append(
                {"case": case, "layers": layers, "fits": fit.fits, "why_not": fit.why_not, "pool": fit.pool.tokens}
            )
        else:
            rows.append(run(case, folder, model, node, ask, arguments.out))
        result = {
            "device": name,
            "total_bytes": total,
            "tp": arguments.tp,
            "card_gib": arguments.card_gib,
            "rows": rows,
        }
        (arguments.out / "serve_gpu.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(json.dumps({k: v for k, v in rows[-1].items() if k not in ("tail", "settings")}, indent=1), flush=True)
    return 0 if all(row.get("generated") or arguments.dry_run for row in rows) else 1


if os.environ.get(CHILD) == "m3":  # here, for a worker that multiprocessing spawns imports this file as __mp_main__
    replace_gemma_norm(MiniMaxM3VL.engines["vllm"].probe_norm)

if __name__ == "__main__":
    if CHILD in os.environ:
        generate(json.loads(sys.argv[1]))
    else:
        sys.exit(main())
