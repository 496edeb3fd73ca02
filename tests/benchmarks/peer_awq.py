"""llm-compressor's own AWQ on a folder: `PYTHON peer_awq.py SRC DST OUT.json DEVICE WINDOWS LENGTH BATCH`.

For the Python that has llmcompressor (0.14): `load_quantizable_moe`, then `oneshot` with `AWQModifier` and a
`QuantizationModifier` of the groups that m3quant would write (OUT.config.json), then `save_pretrained`. The windows are
random token ids, as ours are. Everything else is llm-compressor's default (20 grid points, every expert calibrated by every
token), except what makes it faster: the weights are loaded onto the device and, where they fit, the cached activations stay
there. Writes the seconds of load, oneshot and save and the peaks; imports are not counted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from peer_llmcompressor import write_answer, write_progress

BF16_BYTES = 2
ROOM = 0.8  # of free memory: the rest is for outputs of the unquantized layer and for the search itself


def mappings() -> list[Any]:
    """What AWQ smooths in a MiniMax layer: it has no entry in llm-compressor's registry of mappings.

    The router is a balance layer, as in llm-compressor's mappings for other mixtures of experts, so that it sees what it
    saw before. v_proj to o_proj is left out: with grouped queries their sizes differ, and llm-compressor skips it.
    """
    from llmcompressor.modifiers.transform.awq import AWQMapping

    return [
        AWQMapping("re:.*input_layernorm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]),
        AWQMapping(
            "re:.*post_attention_layernorm$",
            ["re:.*mlp.gate$", "re:.*mlp.experts.*.gate_proj$", "re:.*mlp.experts.*.up_proj$"],
        ),
        AWQMapping("re:.*up_proj$", ["re:.*down_proj$"]),
    ]


def cached_bytes(config: Any, tokens: int) -> int:
    """Activations that AWQ holds of one layer: what attention, the experts and each expert's down_proj take in."""
    return tokens * BF16_BYTES * (2 * config.hidden_size + config.num_local_experts * config.intermediate_size)


def cache_device(config: Any, tokens: int, device: str) -> str:
    """Where the cached activations go: the device if one layer's fit, otherwise llm-compressor's default, the host."""
    import torch

    if not device.startswith("cuda"):
        return "cpu"
    free, _ = torch.cuda.mem_get_info()
    return device if cached_bytes(config, tokens) < ROOM * free else "cpu"


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
    """oneshot asks for a tokenizer to save beside the model; token ids need none."""


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
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM

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

    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, device_map=device)
    marks.append(time.perf_counter())

    write_progress(answer, started=clock, stage="oneshot")
    ids = torch.randint(
        0, model.config.vocab_size, (int(windows), int(length)), generator=torch.Generator().manual_seed(0)
    )
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    cache = cache_device(model.config, ids.numel(), device)
    recipe = [
        AWQModifier(mappings=mappings(), offload_device=torch.device(cache)),
        QuantizationModifier(config_groups=wanted["config_groups"], ignore=wanted["ignore"]),
    ]
    oneshot(
        model=model,
        processor=NoProcessor(),
        dataset=torch.utils.data.DataLoader(rows, batch_size=int(batch)),
        recipe=recipe,
        num_calibration_samples=int(windows),
        max_seq_length=int(length),
        sequential_offload_device=cache,
    )
    marks.append(time.perf_counter())

    write_progress(answer, started=clock, stage="save")
    model.save_pretrained(output, save_compressed=True)
    marks.append(time.perf_counter())

    packed = packed_tensors(output)
    experts = 3 * model.config.num_local_experts * model.config.num_hidden_layers
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
