"""Two, three, four and mixed bits in a real vLLM on a GPU, against the same weights dequantized in the same engine.

    python -m tests.benchmarks.engine_bits prepare WORK          # converts the fixtures, writes the twins and the prompts; needs m3quant
    python -m tests.benchmarks.engine_bits presets WORK          # full-size folders of the fitted recipes: config.json alone
    PYTHONPATH=SITE python engine_bits.py score WORK/NAME WORK/prompts.json OUT.json [MOE_BACKEND]      # needs vLLM alone
    PYTHONPATH=SITE python engine_bits.py load WORK/NAME OUT.json CONTEXT UTILIZATION     # dummy weights: memory and speed
    python -m tests.benchmarks.engine_bits compare SCORES        # the table, from SCORES/*.json

score: log-probs of one text past the 2,048 tokens that M3's attention reads whole, and of 16 short ones, all at once and
one by one. A twin holds what an engine computes with, in BF16, so a difference is that of kernels and of what they round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LONG, SHORT, COUNT = 3000, 100, 16
SPLIT = 2048
MIX = {
    "tiny-m2": {"0": "int3-g128-asym", "1": "int2-g128-asym"},
    "tiny-m3": {"1": "int3-g128-asym", "2": "int2-g128-asym"},
}
EXPERTS = {"int2": "int2-g128-asym", "int3": "int3-g128-asym", "int4": "int4-g128", "mixed": "int4-g128"}
PRESETS = ("fit-m3-1xh200", "fit-m3-2xh100", "fit-m2.7-1xh200", "fit-m2.7-1xh100")
ENV = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def prepare(work: Path) -> None:
    import torch

    from m3quant.calibration.corpus import load_tokenizer
    from tests.support.engine.reference import write_dequantized
    from tests.support.paths import FIXTURES

    work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(FIXTURES / "tiny-m2")
    ids = tokenizer.encode((FIXTURES / "heldout.txt").read_text()[:60_000])
    short = [ids[LONG + i * SHORT : LONG + (i + 1) * SHORT] for i in range(COUNT)]
    (work / "prompts.json").write_text(json.dumps({"long": ids[:LONG], "short": short}))

    def one(case: tuple[str, str]) -> None:
        model, name = case
        mixed = MIX[model] if name == "mixed" else {}
        layers = {index: {"routed_experts": scheme} for index, scheme in mixed.items()}
        convert(FIXTURES / model, work / f"{model}-{name}", EXPERTS[name], layers)
        write_dequantized(work / f"{model}-{name}", work / f"{model}-{name}-twin", torch.bfloat16)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, [(model, name) for model in MIX for name in EXPERTS]))


def convert(source: Path, output: Path, experts: str, layers: dict[str, Any]) -> None:
    """By the command line, as a user would."""
    import subprocess

    import yaml

    recipe = {
        "name": output.name, "format": "compressed-tensors", "calibration": "text", "rounding": "feedback",
        "schemes": dict.fromkeys(("shared_experts", "dense_mlp", "attention"), "int8-g128") | {"routed_experts": experts},
        **({"layers": layers} if layers else {}),
    }  # fmt: skip
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    command = [
        sys.executable, "-m", "m3quant", "convert", str(source), str(output), "--recipe", str(path),
        "--calibration", str(source.parent / "calibration.jsonl"), "--device", "cuda",
    ]  # fmt: skip
    subprocess.run(command, check=True)


def presets(work: Path) -> None:
    """config.json of the fitted recipes, from the releases' own."""
    from m3quant.planning.headers import from_config
    from m3quant.planning.plan import make_plan
    from m3quant.recipe.recipe import build_recipe, named_recipe
    from tests.support.paths import DATA

    for preset in PRESETS:
        release = "minimax-m3" if "-m3-" in preset else "minimax-m2.7"
        source = DATA / release
        plan = make_plan(from_config(source / "config.json"), build_recipe(named_recipe(preset)))
        config = json.loads((source / "config.json").read_text())
        config.pop("quantization_config", None)
        (work / preset).mkdir(parents=True, exist_ok=True)
        (work / preset / "config.json").write_text(json.dumps(config | {"quantization_config": plan.quantization}))


def engine(path: Path, **more: Any) -> Any:
    """vLLM's LLM; M3's Gemma norm as plain operations, since its own wants flashinfer."""
    os.environ.update(ENV)
    import torch
    from vllm import LLM

    settings: dict[str, Any] = {"skip_tokenizer_init": True, "enable_prefix_caching": False, **more}
    if "m3" in json.loads((path / "config.json").read_text())["model_type"]:
        import vllm.models.minimax_m3.nvidia.model as m3

        def forward(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            total = x if residual is None else x + residual
            wide = total.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
            out = (wide * (1.0 + self.weight.float())).to(x.dtype)
            return out if residual is None else (out, total)

        m3.MiniMAXGemmaRMSNorm.forward = forward
        settings |= {"block_size": 128, "limit_mm_per_prompt": {"image": 0, "video": 0}}
    return LLM(model=str(path), **settings)


def score(path: Path, prompts: Path, out: Path, moe_backend: str = "auto") -> None:
    started = time.perf_counter()
    llm = engine(
        path,
        enforce_eager=True,
        max_model_len=4096,
        kv_cache_memory_bytes=2 << 30,
        gpu_memory_utilization=0.1,
        max_num_batched_tokens=4096,
        moe_backend=moe_backend,
    )
    import vllm
    from vllm import SamplingParams

    loaded = time.perf_counter() - started
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False, prompt_logprobs=0)

    def run(texts: list[list[int]]) -> list[dict[str, Any]]:
        rows = []
        for text, found in zip(
            texts, llm.generate([{"prompt_token_ids": t} for t in texts], sampling, use_tqdm=False), strict=True
        ):
            rows.append(
                {
                    "logprobs": [p[i].logprob for p, i in zip(found.prompt_logprobs[1:], text[1:], strict=True)],
                    "tokens": list(found.outputs[0].token_ids),
                }
            )
        return rows

    given = json.loads(prompts.read_text())
    answer = {
        "name": path.name, "vllm": vllm.__version__, "moe_backend": moe_backend, "load_seconds": loaded, "long": run([given["long"]])[0],
        "batch": run(given["short"]), "single": [run([text])[0] for text in given["short"]],
    }  # fmt: skip
    out.write_text(json.dumps(answer))
    print("scored", path.name, f"{loaded:.0f} s to load", flush=True)


def load(path: Path, out: Path, context: int, utilization: float) -> None:
    started = time.perf_counter()
    llm = engine(
        path, load_format="dummy", max_model_len=context, kv_cache_dtype="fp8", gpu_memory_utilization=utilization,
        max_num_batched_tokens=4096, max_num_seqs=16,
    )  # fmt: skip
    import torch
    import vllm
    from vllm import SamplingParams

    cache = llm.llm_engine.vllm_config.cache_config
    answer: dict[str, Any] = {
        "name": path.name, "vllm": vllm.__version__, "device": torch.cuda.get_device_name(), "context": context, "utilization": utilization,
        "up_seconds": time.perf_counter() - started, "kv_tokens": getattr(cache, "kv_cache_size_tokens", None), "blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size, "allocated": torch.cuda.memory_allocated(), "speed": [],
    }  # fmt: skip
    out.write_text(json.dumps(answer, indent=1))

    def seconds(texts: list[dict[str, Any]], tokens: int) -> float:
        begin = time.perf_counter()
        llm.generate(
            texts, SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True, detokenize=False), use_tqdm=False
        )
        return time.perf_counter() - begin

    for count, length, tokens in ((1, 128, 32), (4, 128, 32), (16, 128, 32), (1, 8192, 16), (1, context - 64, 16)):
        texts = [{"prompt_token_ids": [(i * 37 + 11 + b) % 190_000 + 3 for i in range(length)]} for b in range(count)]
        seconds(texts, 1)
        first, whole = seconds(texts, 1), seconds(texts, tokens + 1)
        answer["speed"].append(
            {
                "requests": count,
                "prompt": length,
                "prefill": count * length / first,
                "decode": count * tokens / (whole - first),
            }
        )
        print(path.name, answer["speed"][-1], flush=True)
        out.write_text(json.dumps(answer, indent=1))


def compare(folder: Path) -> list[dict[str, Any]]:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    rows = []
    for name, own in found.items():
        other = found.get(f"{name}-twin")
        if other is None or "long" not in own:
            continue
        differences = [abs(a - b) for a, b in zip(own["long"]["logprobs"], other["long"]["logprobs"], strict=True)]
        batch = [
            abs(a - b)
            for x, y in zip(own["batch"], own["single"], strict=True)
            for a, b in zip(x["logprobs"], y["logprobs"], strict=True)
        ]
        rows.append(
            {
                "checkpoint": name, "vllm": own["vllm"], "mean": statistics.mean(differences), "p99": sorted(differences)[int(0.99 * len(differences))],
                "after": statistics.mean(differences[SPLIT:]), "batch": statistics.mean(batch), "batch_max": max(batch),
                "same_tokens": sum(x["tokens"] == y["tokens"] for x, y in zip(own["batch"], own["single"], strict=True)),
                "twin_batch": statistics.mean(abs(a - b) for x, y in zip(other["batch"], other["single"], strict=True) for a, b in zip(x["logprobs"], y["logprobs"], strict=True)),
                "load_seconds": own["load_seconds"],
            }
        )  # fmt: skip
    print(
        f"| checkpoint | mean | p99 | past {SPLIT} | 16 at once against one by one | the same in BF16 | same greedy tokens of 16 | load, s |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['checkpoint']} | {row['mean']:.4f} | {row['p99']:.3f} | {row['after']:.4f} | {row['batch']:.4f} | {row['twin_batch']:.4f} "
            f"| {row['same_tokens']} | {row['load_seconds']:.0f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "presets", "score", "load", "compare"))
    parser.add_argument("given", nargs="+")
    options = parser.parse_args()
    paths = [Path(text) for text in options.given]
    if options.what == "prepare":
        prepare(paths[0])
    elif options.what == "presets":
        presets(paths[0])
    elif options.what == "score":
        score(paths[0], paths[1], paths[2], *options.given[3:])
    elif options.what == "load":
        load(paths[0], paths[1], int(options.given[2]), float(options.given[3]))
    else:
        rows = compare(paths[0])
        (paths[0] / "rows").mkdir(exist_ok=True)
        (paths[0] / "rows" / "rows.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
