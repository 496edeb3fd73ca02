"""llm-compressor's GPTQ or AWQ on a model in memory: `PYTHON -m tests.benchmarks.quality_llmcompressor JOB.json`, for the Python that has it (0.14).

`oneshot` over the given windows with everything at llm-compressor's defaults (GPTQ: damping 0.01, static order of columns;
AWQ: 20 grid points; experts calibrated by every token, but for "gptq-routed", where each sees those that are routed to
it), in float32, since a CPU without BF16 products takes hours otherwise. On a GPU llm-compressor takes the first that it sees.
What it saves of MiniMax models is not what engines read, so the weights are taken from memory: codes under the scales that
it found, dequantized with the scales in BF16, as it would store them, and whatever else it changed (norms, routers).
JOB.json: source, windows (a file with "ids" [S, L]), bits, group_size, experts_only, method, device; output and answer to write.
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

from tests.benchmarks.peer_awq import NoProcessor, is_m3, load_model, mappings

BATCH = 8
EXPERTS = r"re:.*\.experts\.\d+\.(gate|up|down)_proj$"
LAYERS = {"minimax_m2": "MiniMaxM2DecoderLayer", "minimax_m3_vl": "MiniMaxM3VLDecoderLayer"}


def smoothed(model: Any) -> list[Any]:
    """peer_awq's mappings of a MiniMax model around its experts; those of attention, which is not quantized here, left out.

    llm-compressor matches a mapping layer by layer, so that it must name no layer that lacks one of its weights.
    """
    _, norm, *rest = mappings(is_m3(model.config))
    layers = [name.split(".")[-4] for name, _ in model.named_modules() if name.endswith(".mlp.experts.0")]
    norm.smooth_layer = rf"re:.*\.layers\.({'|'.join(layers)})\.post_attention_layernorm$"
    return [norm, *rest]


def recipe(job: dict[str, Any], model: Any) -> list[Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(
        num_bits=job["bits"], type="int", symmetric=True, strategy="group", group_size=job["group_size"]
    )
    targets = [EXPERTS] if job["experts_only"] else ["Linear"]
    given = {
        "config_groups": {"group_0": QuantizationScheme(targets=targets, weights=weights)},
        "ignore": ["re:.*lm_head"],
    }
    if job["method"].startswith("gptq"):
        return [GPTQModifier(**given)]
    own = {"mappings": smoothed(model)} if job["experts_only"] else {}
    return [AWQModifier(**own), QuantizationModifier(**given)]


def calibrate(model: Any, job: dict[str, Any]) -> None:
    from llmcompressor import oneshot
    from llmcompressor.args import DatasetArguments
    from llmcompressor.pipelines.cache import IntermediatesCache

    # AWQModifier pins its cache whatever the machine, which torch refuses without a GPU.
    IntermediatesCache.pin_memory = lambda *_, **__: None
    ids = load_file(job["windows"])["ids"]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    kind = model.config.model_type
    oneshot(
        model=model,
        processor=NoProcessor(),
        dataset=torch.utils.data.DataLoader(rows, batch_size=BATCH),
        recipe=recipe(job, model),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        moe_calibrate_all_experts=job["method"] != "gptq-routed",
        tracing_ignore=[*DatasetArguments().tracing_ignore, "get_placeholder_mask"],  # M3's, of images
        **({"sequential_targets": [LAYERS[kind]]} if kind in LAYERS else {}),
    )


def dequantized(module: torch.nn.Module, bits: int) -> torch.Tensor:
    """[N, K] float32 as an engine would compute it: codes under llm-compressor's scales times those scales in BF16."""
    weight, scale = module.weight.detach().float().cpu(), module.weight_scale.detach().float().cpu()
    groups = weight.unflatten(-1, (scale.shape[-1], -1))
    codes = (groups / scale[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scale.bfloat16().float()[..., None]).flatten(-2)


def main(job: dict[str, Any]) -> None:
    torch.manual_seed(job["seed"])
    started = time.perf_counter()
    model = load_model(job["source"], "cpu", "float32")
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    calibrate(model, job)
    found = {
        f"{name}.weight": dequantized(module, job["bits"])
        for name, module in model.named_modules()
        if hasattr(module, "weight_scale")
    }
    quantized = len(found)
    for name, tensor in model.named_parameters():
        own = tensor.detach().cpu()
        if name in before and name not in found and not torch.equal(own.bfloat16(), before[name].bfloat16()):
            found[name] = own
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, job["output"])
    import compressed_tensors
    import llmcompressor
    import transformers

    versions = {one.__name__: one.__version__ for one in (llmcompressor, compressed_tensors, torch, transformers)}
    answer = {"seconds": time.perf_counter() - started, "quantized": quantized, "changed": len(found) - quantized}
    Path(job["answer"]).write_text(json.dumps({**answer, "versions": versions}))


if __name__ == "__main__":
    main(JOB)
