"""The same M3 with more query heads per KV head: `widen_heads.py SOURCE OUTPUT FACTOR`.

Every query head is repeated FACTOR times and its columns of o_proj divided by FACTOR (a power of two, so exactly): the function
is the same, the engine's kernels see another GQA group. tiny-m3 has 2 query heads per KV head, the release 16.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def widen(source: Path, output: Path, factor: int) -> None:
    shutil.copytree(source, output)
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    dim = text["head_dim"]
    text["num_attention_heads"] *= factor
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for shard in output.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith(".self_attn.q_proj.weight") and "language_model" in name:
                heads = tensor.unflatten(0, (-1, dim))
                tensors[name] = heads.repeat_interleave(factor, 0).flatten(0, 1).contiguous()
            elif name.endswith(".self_attn.o_proj.weight") and "language_model" in name:
                heads = tensor.unflatten(1, (-1, dim)) / factor
                tensors[name] = heads.repeat_interleave(factor, 1).flatten(1, 2).to(torch.bfloat16).contiguous()
        save_file(tensors, shard, metadata={"format": "pt"})


if __name__ == "__main__":
    widen(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
