"""How fast stored weights of a source become BF16, beside FP8 in blocks: `python -m tests.benchmarks.decode_sources [--device cuda]`.

One weight at a time through `quant.reading.densify`, the path of a CPU and of what no kernel takes on a GPU; the formats take turns, and the
median of each is divided by that of FP8 in blocks. `tests.benchmarks.convert --stored` times the kernels in a conversion.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from m3quant.checkpoint import Checkpoint
from m3quant.planning.source_tensors import source_tensors
from m3quant.quant.reading import densify
from tests.support.convert import fp4_sources, integer_sources
from tests.support.convert.common import config_of
from tests.support.convert.sources import to_fp8_block, write_parts
from tests.support.paths import FIXTURES

NAME = "model.layers.0.block_sparse_moe.experts.0.w1"


def fp8_block(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, scale, dense = to_fp8_block(weight)
    return {f"{module}.weight": codes, f"{module}.weight_scale_inv": scale}, dense


def group(form: str, **weights: Any) -> dict[str, Any]:
    own = {"targets": ["Linear"], "weights": {"type": "float", "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": own}}


def integers(bits: int) -> Any:
    return lambda module, weight: integer_sources.packed(module, weight, bits, 128, True)


FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "FP8 in blocks": (fp8_block, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "FP8 per row": (fp4_sources.fp8_rows, group("float-quantized", num_bits=8, strategy="channel")),
    "MXFP8": (fp4_sources.mxfp8_modelopt, {"quant_method": "modelopt", "quant_algo": "MXFP8"}),
    "NVFP4": (fp4_sources.nvfp4_packed, group("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16)),
    "MXFP4": (fp4_sources.mxfp4_packed, group("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32)),
    "INT4 g128": (integers(4), integer_sources.packed_section((4, 128, True))),
    "INT8 g128": (integers(8), integer_sources.packed_section((8, 128, True))),
    "INT3 g128": (integers(3), integer_sources.packed_section((3, 128, True))),
    "AutoAWQ g128": (lambda module, weight: integer_sources.awq(module, weight, 128), integer_sources.awq_section(128)),
}  # fmt: skip


def source(folder: Path, name: str, shape: tuple[int, int]) -> tuple[Any, dict[str, torch.Tensor]]:
    """One weight of that shape in a checkpoint that holds nothing else: what is known of it, and its parts."""
    make, section = FORMATS[name]
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    config = config_of(FIXTURES / "tiny-m2")
    config |= {"hidden_size": shape[1], "intermediate_size": shape[0], "quantization_config": section}
    write_parts(folder, config, {"all": make(NAME, weight)[0]}, index=False)
    checkpoint = Checkpoint.open(folder)
    found = source_tensors(checkpoint)[f"{NAME}.weight"]
    return found, checkpoint.read_many(list(found.names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shape", type=int, nargs=2, default=(1536, 3072))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    device, shape = torch.device(asked.device), (asked.shape[0], asked.shape[1])
    made = {name: source(asked.work / str(number), name, shape) for number, name in enumerate(FORMATS)}
    times: dict[str, list[float]] = {name: [] for name in FORMATS}
    for _ in range(asked.repeats + 1):
        for name, (found, raw) in made.items():
            moved = {part: tensor.to(device) for part, tensor in raw.items()}
            out = torch.empty(shape, dtype=torch.bfloat16, device=device)
            started = time.perf_counter()
            densify(found, moved, out)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(own[1:]) for name, own in times.items()}  # the first one compiles
    one = medians["FP8 in blocks"]
    rows = {name: {"seconds": seconds, "of FP8 in blocks": seconds / one} for name, seconds in medians.items()}
    for name, row in rows.items():
        print(f"{name:14s} {row['seconds'] * 1e3:8.2f} ms  {row['of FP8 in blocks']:5.2f}")
    if asked.json:
        asked.json.write_text(json.dumps({"shape": shape, "device": str(device), "torch": torch.__version__, "rows": rows}, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
