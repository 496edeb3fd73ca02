"""GPTQModel's GPTQ on a model: `PYTHON -m tests.benchmarks.quality_gptqmodel JOB.json`, for the Python that has gptqmodel (7.6).

`quantize` over the given windows with its defaults (damping 0.05, act_group_aware), in float32 on the CPU, then `save`; the
weights are what the saved codes, zero points, scales (FP16) and g_idx mean.
JOB.json: source, windows (a file with "ids" [S, L]), bits, group_size, experts_only, device ("cpu"); output and answer to write.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from contextlib import chdir
from pathlib import Path
from typing import Any

from tests.benchmarks.quality_job import read_job

if __name__ == "__main__":  # before torch is imported; not where a test imports a function
    JOB = read_job()
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # on a machine of two cores it starts one, and then refuses it

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

BATCH = 8
NOT_EXPERTS = (
    r"-:.*(self_attn|mlp\.gate_up_proj|mlp\.gate_proj|mlp\.up_proj|mlp\.down_proj|shared_experts|mlp\.gate$).*"
)


def unpacked(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 words -> the unsigned codes in them along dim, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.movedim(-1, dim + 1).flatten(dim, dim + 1)


def dequantized(parts: dict[str, torch.Tensor], bits: int, zero_offset: int) -> torch.Tensor:
    """[N, K] float32 from qweight [K * bits / 32, N], qzeros [G, N * bits / 32], scales [G, N] and g_idx [K]."""
    codes, zeros = unpacked(parts["qweight"], bits, 0), unpacked(parts["qzeros"], bits, 1) + zero_offset
    groups = parts["g_idx"].long()
    return ((codes - zeros[groups]).float() * parts["scales"].float()[groups]).T


def read_saved(folder: str, bits: int) -> dict[str, torch.Tensor]:
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    zero_offset = 0 if config.get("checkpoint_format", config.get("format")) == "gptq_v2" else 1
    stored: dict[str, dict[str, torch.Tensor]] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            names = list(shard.keys())
            for name in names:
                module, _, part = name.rpartition(".")
                if part in ("qweight", "qzeros", "scales", "g_idx"):
                    stored.setdefault(module, {})[part] = shard.get_tensor(name)
    return {f"{module}.weight": dequantized(parts, bits, zero_offset) for module, parts in stored.items()}


def quantize(job: dict[str, Any], folder: str) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    ids = load_file(job["windows"])["ids"]
    rest = {"dynamic": {NOT_EXPERTS: {}}} if job["experts_only"] else {}
    config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], sym=True, **rest)
    model = GPTQModel.load(job["source"], config, device="cpu", dtype=torch.float32, backend=BACKEND.TORCH)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    model.quantize(rows, batch_size=BATCH)
    model.save(folder)


def main(job: dict[str, Any]) -> None:
    torch.manual_seed(job["seed"])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):  # it leaves logs where it runs
        quantize(job, folder)
        found = {name: weight.contiguous() for name, weight in read_saved(folder, job["bits"]).items()}
    if not found:
        raise SystemExit("GPTQModel quantized none of the weights that it was asked for")
    save_file(found, job["output"])
    import gptqmodel
    import transformers

    versions = {one.__name__: one.__version__ for one in (gptqmodel, torch, transformers)}
    answer = {"seconds": time.perf_counter() - started, "quantized": len(found)}
    Path(job["answer"]).write_text(json.dumps({**answer, "versions": versions}))


if __name__ == "__main__":
    main(JOB)
