"""Pins: the cache size that an engine measured once, so that later starts get the same pool even if other things change.

A first start measures with --gpu-memory-utilization and serves with what it measured. Restarting at once to pin would load the
weights twice for nothing, so the pin is for the next start. It is keyed by everything that changes the measurement.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..checkpoint import write_json_atomic
from ..checkpoint.bounded import read_json
from ..engines.start_log import EngineLog
from ..errors import CheckpointError
from .fit import Fit

PIN_BYTES = 65536


def pin_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "m3quant" / "pins"


def pin_key(fit: Fit, engine_version: str, arguments: list[str]) -> str:
    """sha256 over the model's sizes, the node, the engine and its arguments (where the server listens left out)."""
    facts: dict[str, Any] = {
        "config": dict(fit.model.config),
        "bytes": fit.model.stored_bytes,
        "node": [fit.node.count, fit.node.gpu.name, fit.node.gpu.total_bytes],
        "engine": engine_version,
        "arguments": arguments,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def read_pin(key: str, folder: Path | None = None) -> int | None:
    """Bytes of KV cache per GPU pinned under `key`, or None."""
    path = (folder or pin_folder()) / f"{key}.json"
    try:
        value = read_json(path, PIN_BYTES, "", follow=True)["kv_cache_memory_bytes"]
    except (CheckpointError, KeyError):
        return None  # no pin, or a damaged one: the engine measures again, which is always right
    return value if type(value) is int and value > 0 else None


def pinned_bytes(log: EngineLog) -> int | None:
    """What to pin: the engine's own suggestion, which keeps its 150 MiB of slack, never more than it used."""
    sizes = [size for size in (log.suggested_pin, log.kv_available) if size and size > 0]
    return min(sizes) if log.suggested_pin and sizes else None


def write_pin(key: str, size: int, fit: Fit, folder: Path | None = None) -> Path:
    folder = folder or pin_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.json"
    write_json_atomic(
        path,
        {"kv_cache_memory_bytes": size, "checkpoint": fit.model.where, "node": fit.node.name, "context": fit.context},
    )
    return path
