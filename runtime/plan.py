"""What a finished checkpoint serves on the standard nodes: the rows that `m3quant plan --all` and the model card show. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServingRow:
    """One node and KV dtype. pool_tokens: KV tokens that all requests share; longest_context: of one request, within the model's
    own limit; command: the exact `vllm serve` line; why_not: empty where it fits."""

    node: str
    fits: bool
    kv_dtype: str
    pool_tokens: int
    longest_context: int
    command: str
    why_not: str


def serving_table(folder: Path) -> list[ServingRow]:
    """Rows for the standard nodes, in order of size. Reads config.json and headers only. Raises CheckpointError."""
    raise NotImplementedError
