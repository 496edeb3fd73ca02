"""Checkpoints of a release's real shapes with random weights, made fast and shard by shard."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from m3quant.checkpoint import ShardWriter, write_json_atomic
from m3quant.families import family_of
from m3quant.planning.source_format import config_format
from m3quant.planning.source_layouts import FP8_BLOCK, PLAIN, scale_layout
from m3quant.quant.fp8 import E4M3_MAX
from tests.support.paths import DATA

RELEASES = {"m2": "minimax-m2.7", "m3": "minimax-m3"}
SMALL_VOCABULARY = 8192  # the embedding table is not what is measured
SHARD_BYTES = 2_000_000_000
LEAST_SHARDS = 4  # so that a program that works shard by shard has several to work on at once
POOL = 1 << 22  # random values that a CPU draws weights from
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}
FP8_SPREAD = 100.0  # standard deviation of FP8 codes' values, so that the largest of a block are near 448
SCALE = "_scale_inv"
NOT_IN_FP8 = ("router", "embedding", "lm_head")  # of the matrices of a language model


class Entry(NamedTuple):
    """A tensor of the checkpoint; spread: the standard deviation of its values, of a scale the mean."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    spread: float

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def wide_config(
    shape: str, layers: int, experts: int | None = None, narrower: int = 1, stored: str = PLAIN
) -> dict[str, Any]:
    """config.json of `shape` ("m2" or "m3") with this many MoE layers; fewer experts and narrower by a factor if asked.

    stored: "plain" (BF16), or as the vendor's FP8 releases store their linear layers, "fp8-block" (M2's) or "mxfp8" (M3's).
    """
    config: dict[str, Any] = json.loads((DATA / RELEASES[shape] / "config.json").read_text())
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
    if stored != PLAIN:
        method, block = ("fp8", [128, 128]) if stored == FP8_BLOCK else ("mxfp8", [1, 32])
        config["quantization_config"] = {
            "quant_method": method,
            "activation_scheme": "dynamic",
            "weight_block_size": block,
        }
    return config


def stored_tensors(config: dict[str, Any]) -> list[Entry]:
    """Every tensor of the checkpoint that `config` describes."""
    family, kind = family_of(config), config_format(config, "this checkpoint").required_kind()
    entries: list[Entry] = []
    for name, fact in family.expected_tensors.items():
        shape = tuple(fact.shape)
        if kind == PLAIN or len(shape) != 2 or fact.float32 or family.role(name).kind in NOT_IN_FP8:
            entries.append(Entry(name, torch.float32 if fact.float32 else torch.bfloat16, shape, shape[-1] ** -0.5))
            continue
        scale = torch.float32 if kind == FP8_BLOCK else torch.uint8
        blocks, _ = scale_layout(kind, (shape[0], shape[1]))
        entries.append(Entry(name, torch.float8_e4m3fn, shape, FP8_SPREAD))
        entries.append(Entry(f"{name}{SCALE}", scale, blocks, shape[-1] ** -0.5 / FP8_SPREAD))
    return entries


def wide_checkpoint(folder: Path, config: dict[str, Any], device: str = "cpu") -> int:
    """Write the checkpoint that `config` describes with random weights in shards of about 2 GB, or four; its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    entries = stored_tensors(config)
    whole = sum(entry.nbytes for entry in entries)
    shard_bytes = min(SHARD_BYTES, -(-whole // LEAST_SHARDS))
    groups: list[list[Entry]] = [[]]
    taken = 0
    for entry in sorted(entries, key=lambda e: e.dtype.itemsize, reverse=True):  # F32 first: every tensor is aligned
        size = entry.nbytes
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
        with ShardWriter(folder, shard, [(e.name, CODES[e.dtype], e.shape) for e in group]) as writer:
            for entry in group:
                writer.write(entry.name, draw(entry))
                weight_map[entry.name] = shard
        assert writer.record is not None
        total += writer.record.size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json_atomic(folder / "model.safetensors.index.json", index)
    return total


def _drawer(device: str) -> Callable[[Entry], torch.Tensor]:
    """Random weights: fresh normal values on a GPU; on a CPU, stretches of a pool, each at its own scale."""
    generator = torch.Generator(device).manual_seed(0)
    pool = torch.randn(POOL, generator=generator, device=device, dtype=torch.float32) if device == "cpu" else None

    def normal(entry: Entry) -> torch.Tensor:
        if pool is None:
            return torch.randn(entry.shape, generator=generator, device=device).mul_(entry.spread)
        count = math.prod(entry.shape)
        start = int(torch.randint(0, POOL, (1,), generator=generator))
        spread = entry.spread * (0.5 + float(torch.rand(1, generator=generator)))
        return (pool * spread).roll(-start).repeat(-(-count // POOL))[:count].view(entry.shape)

    def draw(entry: Entry) -> torch.Tensor:
        if len(entry.shape) == 1:
            return (torch.randn(entry.shape, generator=generator, device=device) * 0.1 + 1).to(entry.dtype).cpu()
        if entry.name.endswith(SCALE):
            factors = torch.rand(entry.shape, generator=generator, device=device) + 0.5
            if entry.dtype == torch.uint8:  # E8M0: a power of two
                return (factors.log2() + math.log2(entry.spread) + 127).round().to(torch.uint8).cpu()
            return (factors * entry.spread).cpu()
        values = normal(entry)
        if entry.dtype == torch.float8_e4m3fn:
            values.clamp_(-E4M3_MAX, E4M3_MAX)
        return values.to(entry.dtype).cpu()

    return draw
