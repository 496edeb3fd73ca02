"""AutoRound on a model in memory: `PYTHON -m tests.benchmarks.quality_autoround JOB.json`, for the Python that has auto-round (0.16).

`AutoRound.quantize` over the given windows with its defaults (iterations of 8 windows per block, ranges learned, inputs
from the quantized blocks before), in float32 and without torch.compile (a CPU without BF16 products takes hours otherwise), on `device`. The
weights are taken from memory: AutoRound leaves them dequantized, under scales in FP16.
JOB.json: source, windows (a file with "ids" [S, L]), bits, group_size, experts_only, iterations, device; output and answer to write.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.quality_job import read_job

if __name__ == "__main__":  # before torch is imported; not where a test imports a function
    JOB = read_job()

import torch
from safetensors.torch import load_file, save_file

BATCH = 8


def is_vision(source: str) -> bool:
    return "vision_config" in json.loads((Path(source) / "config.json").read_text())


def load_model(source: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if is_vision(source) else AutoModelForCausalLM
    return kind.from_pretrained(source, dtype=torch.float32)


def kept(model: Any) -> list[str]:
    """Parts of names of linears that are not quantized where only routed experts are."""
    layers = {name.split(".experts")[0] for name, _ in model.named_modules() if name.endswith(".mlp.experts")}
    every = {name for name, _ in model.named_modules() if name.endswith(".mlp")}
    return ["self_attn", "mlp.gate", "shared_experts", "vision", "projector", *sorted(every - layers)]


def main(job: dict[str, Any]) -> None:
    import auto_round
    import transformers
    from auto_round import AutoRound

    torch.manual_seed(job["seed"])
    started = time.perf_counter()
    ids = load_file(job["windows"])["ids"]
    model = load_model(job["source"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["source"])
    rest: dict[str, Any] = {"ignore_layers": ",".join(kept(model))} if job["experts_only"] else {}
    if is_vision(job["source"]):  # it asks for a processor, which windows of text never reach
        rest["processor"] = tokenizer
    program = AutoRound(
        model,
        tokenizer,
        scheme={"bits": job["bits"], "group_size": job["group_size"], "sym": True, "data_type": "int", "act_bits": 16},
        dataset=list(ids.split(BATCH)),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=BATCH,
        iters=job["iterations"],
        amp=False,
        enable_torch_compile=False,
        device_map=job["device"],
        **rest,
    )
    model, _ = program.quantize()
    found = {
        f"{name}.weight": module.weight.detach().float().cpu().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and hasattr(module, "scale")
    }
    save_file(found, job["output"])
    versions = {one.__name__: one.__version__ for one in (auto_round, torch, transformers)}
    answer = {"seconds": time.perf_counter() - started, "quantized": len(found)}
    Path(job["answer"]).write_text(json.dumps({**answer, "versions": versions}))


if __name__ == "__main__":
    main(JOB)
