"""Checkpoints of a release's real shapes with random weights, made fast and shard by shard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from m3quant.checkpoint import ShardWriter, write_json_atomic
from m3quant.families import family_of

ROOT = Path(__file__).resolve().parents[2]
RELEASES = {"m2": "minimax-m2.7", "m3": "minimax-m3"}
SMALL_VOCABULARY = 8192  # the embedding table is not what is measured
SHARD_BYTES = 2_000_000_000
LEAST_SHARDS = 4  # so that a program that works shard by shard has several to work on at once
POOL = 1 << 22  # random values that a CPU draws weights from
CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def wide_config(shape: str, layers: int, experts: int | None = None, narrower: int = 1) -> dict[str, Any]:
    """config.json of `shape` ("m2" or "m3") with this many MoE layers; fewer experts and narrower by a factor if asked."""
    config: dict[str, Any] = json.loads((ROOT / "tests" / "data" / RELEASES[shape] / "config.json").read_text())
    text = config.get("text_config", config)
    text.update(num_hidden_layers=layers, vocab_size=SMALL_VOCABULARY // narrower)
    for size in ("hidden_size", "intermediate_size", "shared_intermediate_size", "dense_intermediate_size"):
        if size in text:
            text[size] //= narrower
    if experts:
        text["num_local_experts"] = experts
        text["num_experts_per_tok"] = min(text["num_experts_per_tok"], experts)
    if "moe_layer_freq" in text:
        text["moe_layer_freq"] = [1] * layers
        sparse = [1] * layers
        text["sparse_attention_config"].update(sparse_attention_freq=sparse, sparse_disable_index_value=sparse)
        config.pop("vision_config")
    else:
        text["attn_type_list"] = [1] * layers
    config.pop("quantization_config", None)
    return config


def wide_checkpoint(folder: Path, config: dict[str, Any], device: str = "cpu") -> int:
    """Write the checkpoint that `config` describes with random weights in shards of about 2 GB, or four; its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    facts = family_of(config).expected_tensors(config)
    entries = []
    for name, fact in facts.items():
        dtype = torch.float32 if fact.float32 else torch.bfloat16
        entries.append((name, dtype, tuple(fact.shape)))
    whole = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in entries)
    shard_bytes = min(SHARD_BYTES, -(-whole // LEAST_SHARDS))
    groups: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    taken = 0
    for entry in sorted(entries, key=lambda e: e[1].itemsize, reverse=True):  # F32 first: every tensor is aligned
        size = math.prod(entry[2]) * entry[1].itemsize
        if groups[-1] and taken + size > shard_bytes:
            groups.append([])
            taken = 0
        groups[-1].append(entry)
        taken += size
    draw = _drawer(device)
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups):
        shard = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        with ShardWriter(folder, shard, [(name, CODES[dtype], shape) for name, dtype, shape in group]) as writer:
            for name, dtype, shape in group:
                writer.write(name, draw(shape, dtype))
                weight_map[name] = shard
        assert writer.record is not None
        total += writer.record.size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json_atomic(folder / "model.safetensors.index.json", index)
    return total


def _drawer(device: str) -> Any:
    """(shape, dtype) -> random weights: fresh normal values on a GPU; on a CPU, stretches of a pool, each at its own scale."""
    generator = torch.Generator(device).manual_seed(0)
    pool = torch.randn(POOL, generator=generator, device=device, dtype=torch.float32) if device == "cpu" else None

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = math.prod(shape)
        if len(shape) == 1:
            return (torch.randn(shape, generator=generator, device=device) * 0.1 + 1).to(dtype).cpu()
        spread = shape[-1] ** -0.5
        if pool is None:
            return (torch.randn(shape, generator=generator, device=device) * spread).to(dtype).cpu()
        start = int(torch.randint(0, POOL, (1,), generator=generator))
        spread *= 0.5 + float(torch.rand(1, generator=generator))
        scaled = (pool * spread).to(dtype).roll(-start)
        return scaled.repeat(-(-count // POOL))[:count].view(shape)

    return draw
