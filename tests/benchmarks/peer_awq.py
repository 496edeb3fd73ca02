"""llm-compressor's own AWQ on a folder: `PYTHON -m tests.benchmarks.peer_awq SRC DST OUT.json DEVICE WINDOWS LENGTH BATCH`.

For the Python that has llmcompressor (0.14): `load_quantizable_moe`, then `oneshot` with `AWQModifier` and a
`QuantizationModifier` of the groups that m3quant would write (OUT.config.json), then `save_pretrained`. The windows are
random token ids, as in m3quant's run. Everything else is llm-compressor's default (20 grid points, every expert calibrated by every
token), except what makes it faster: the weights are loaded onto the device and, where they fit, the cached activations stay
there. Writes the seconds of load, oneshot and save and the peaks; imports are not counted.

M3 needs four things that llm-compressor 0.14 lacks, each given where it lets others be added (load_m3, mappings).
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.benchmarks.peer_llmcompressor import write_answer, write_progress

BF16_BYTES = 2
ROOM = 0.8  # of free memory: the rest is for outputs of the unquantized layer and for the search itself


def is_m3(config: Any) -> bool:
    return bool(config.model_type == "minimax_m3_vl")


def mappings(m3: bool) -> list[Any]:
    """What AWQ smooths in a MiniMax layer: it has no entry in llm-compressor's registry of mappings.

    The router is a balance layer, as in llm-compressor's mappings for other mixtures of experts, so that it sees what it
    saw before; so are M3's indexer and shared expert. v_proj to o_proj is left out: with grouped queries their sizes differ,
    and llm-compressor skips it. up_proj to down_proj is left out of M3: its gate adds 1 to up, which no scale commutes with.
    """
    from llmcompressor.modifiers.transform.awq import AWQMapping

    layer = "re:.*language_model.*" if m3 else "re:.*"
    attention = ["q_proj", "k_proj", "v_proj", *(["indexer.q_proj", "indexer.k_proj"] if m3 else [])]
    experts = ["gate", "experts.*.gate_proj", "experts.*.up_proj", *(["shared_experts.gate_up_proj"] if m3 else [])]
    norms = [
        AWQMapping(f"{layer}input_layernorm$", [f"{layer}self_attn.{name}$" for name in attention]),
        AWQMapping(f"{layer}post_attention_layernorm$", [f"{layer}mlp.{name}$" for name in experts]),
    ]
    return norms if m3 else [*norms, AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])]


def groups(wanted: dict[str, Any]) -> dict[str, Any]:
    """The config groups that m3quant would write, with two changes for M3.

    Its indexer is targeted by transformers' name for it too. Its shared expert takes the routed experts' scheme: the norm
    before them is searched as one, and AWQModifier quantizes all layers of one search by the scheme of the last.
    """
    found: dict[str, Any] = wanted["config_groups"]
    routed = next(group for group in found.values() if any(r"\.experts\.\d+" in target for target in group["targets"]))
    for group in list(found.values()):
        targets = group["targets"]
        shared = [target for target in targets if "shared_experts" in target]
        group["targets"] = [target for target in targets if target not in shared]
        routed["targets"] += shared
        if any("index_q_proj" in target for target in targets):
            group["targets"].append(r"re:.*\.self_attn\.indexer\.(q_proj|k_proj)$")
    return found


def load_model(source: str, device: str, dtype: str = "bfloat16") -> Any:
    """The model with a module for each expert, on the device."""
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    if is_m3(config):
        return load_m3(source, config, device, dtype)
    with load_quantizable_moe():
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device)


def has_vision(source: str) -> bool:
    index = Path(source) / "model.safetensors.index.json"
    return any("vision_tower" in name for name in json.loads(index.read_text())["weight_map"])


def load_m3(source: str, config: Any, device: str, dtype: str) -> Any:
    """M3, which transformers knows only with its vision tower: a source that has none gets one of no size."""
    from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modeling.offset_norm import CalibrationOffsetNorm, NormCalibrationModule
    from transformers import AutoModelForImageTextToText

    NormCalibrationModule.register_value(CalibrationOffsetNorm, name="MiniMaxM3VLRMSNorm")  # scales by 1 + weight
    if not has_vision(source):
        sizes = {"num_hidden_layers": 0, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        for name, size in sizes.items():
            setattr(config.vision_config, name, size)
        config.projector_hidden_size = 1
    with load_quantizable_moe(AutoModelForImageTextToText):
        model = AutoModelForImageTextToText.from_pretrained(source, config=config, dtype=dtype, device_map=device)
    for module in model.modules():
        if isinstance(module, LinearExperts2D):
            module.swiglu_alpha = (
                config.text_config.swiglu_alpha
            )  # M3's gate reads it; LinearExperts2D does not keep it
    return model


def cached_bytes(config: Any, tokens: int, m3: bool) -> int:
    """Activations that AWQ holds of one layer: what attention and the experts take in, and on M2 each expert's down_proj."""
    pairs = 0 if m3 else config.num_local_experts * config.intermediate_size
    return int(tokens * BF16_BYTES * (2 * config.hidden_size + pairs))


def cache_device(needed: int, device: str) -> str:
    """Where the cached activations go: the device if one layer's fit, otherwise llm-compressor's default, the host."""
    import torch

    if not device.startswith("cuda"):
        return "cpu"
    free, _ = torch.cuda.mem_get_info()
    return device if needed < ROOM * free else "cpu"


def packed_tensors(folder: str) -> int:
    """How many INT4 weights the folder has."""
    from safetensors import safe_open

    count = 0
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            names = shard.keys()
            count += sum(name.endswith(".weight_packed") for name in names)
    return count


class NoProcessor:
    """oneshot asks for a tokenizer to save with the model; token ids need none."""


def count_mappings(awq: type, answer: str, started: float) -> list[str]:
    """Make `awq` note each mapping whose scales it searches, here and in the progress file; the list of their names."""
    search = awq._compute_best_scale
    searched: list[str] = []

    def counted(self: Any, mapping: Any, *rest: Any) -> Any:
        searched.append(mapping.smooth_name)
        place = {"mapping": len(searched), "mappings": len(self._resolved_mappings)}
        write_progress(answer, started=started, stage="oneshot", **place)
        return search(self, mapping, *rest)

    awq._compute_best_scale = counted
    return searched


def main() -> None:
    source, output, answer, device, windows, length, batch = sys.argv[1:]
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # llm-compressor takes the first GPU that it sees
    import torch
    from llmcompressor import oneshot
    from llmcompressor.args import DatasetArguments
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if device == "cpu":
        # AWQModifier pins its cache whatever the machine, which torch refuses without a GPU.
        IntermediatesCache.pin_memory = lambda *_, **__: None
    else:
        torch.zeros(1, device=device)  # the driver's start is not the conversion's; both programs get it for free
    wanted = json.loads(Path(answer).with_suffix(".config.json").read_text())
    clock = time.time()
    searched = count_mappings(AWQModifier, answer, clock)
    write_progress(answer, started=clock, stage="load")
    marks = [time.perf_counter()]

    model = load_model(source, device)
    config, m3 = model.config.get_text_config(), is_m3(model.config)
    marks.append(time.perf_counter())

    write_progress(answer, started=clock, stage="oneshot")
    ids = torch.randint(0, config.vocab_size, (int(windows), int(length)), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    cache = cache_device(cached_bytes(config, ids.numel(), m3), device)
    recipe = [
        AWQModifier(mappings=mappings(m3), offload_device=torch.device(cache)),
        QuantizationModifier(config_groups=groups(wanted), ignore=wanted["ignore"]),
    ]
    oneshot(
        model=model,
        processor=NoProcessor(),
        dataset=torch.utils.data.DataLoader(rows, batch_size=int(batch)),
        recipe=recipe,
        num_calibration_samples=int(windows),
        max_seq_length=int(length),
        sequential_offload_device=cache,
        sequential_targets=["MiniMaxM3VLDecoderLayer" if m3 else "MiniMaxM2DecoderLayer"],
        tracing_ignore=[*DatasetArguments().tracing_ignore, "get_placeholder_mask"],  # M3's, of images
    )
    marks.append(time.perf_counter())

    write_progress(answer, started=clock, stage="save")
    model.save_pretrained(output, save_compressed=True)
    marks.append(time.perf_counter())

    packed = packed_tensors(output)
    experts = 3 * config.num_local_experts * config.num_hidden_layers
    if not searched or packed < experts:
        raise SystemExit(
            f"llm-compressor's AWQ searched {len(searched)} mappings and wrote {packed} INT4 tensors of {experts} expert weights: "
            "this run is no comparison"
        )
    load, calibrated, save = (end - start for start, end in pairwise(marks))
    write_answer(
        answer, output, seconds=marks[-1] - marks[0], split={"load": load, "oneshot": calibrated, "save": save},
        mappings=len(searched), packed=packed, batch=int(batch), cache=cache,
    )  # fmt: skip


if __name__ == "__main__":
    main()
