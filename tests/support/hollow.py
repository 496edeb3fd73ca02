"""Outputs of real shapes whose weights are holes: complete for whoever reads headers, and for an engine that makes its own weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from m3quant.checkpoint import header_bytes
from m3quant.planning.headers import from_config
from m3quant.planning.plan import INDEX_FILE, make_plan
from m3quant.planning.unit import SHARD_METADATA, Unit
from m3quant.recipe.recipe import build_recipe, named_recipe

from .hostile import sparse
from .paths import FIXTURES

TOKENIZER = FIXTURES / "tiny-m2"  # whose special tokens the engine's parsers want


def write_hollow(folder: Path, source: Path, recipe: str) -> Path:
    """What `convert --to RECIPE` writes of the release whose config.json lies in `source`, its weights holes, with a tokenizer of as many tokens.

    For `m3quant serve` with `--load-format dummy`. Without `auto_map`: engines have the architecture, and there is no code to trust.
    """
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plan = make_plan(from_config(folder / "config.json"), build_recipe(named_recipe(recipe)))
    (folder / "config.json").write_bytes(plan.config_bytes)
    (folder / INDEX_FILE).write_bytes(plan.index_bytes)
    for unit in plan.units:
        _write_shard(folder, unit)
    write_tokenizer(folder, config.get("text_config", config)["vocab_size"])
    return folder


def _write_shard(folder: Path, unit: Unit) -> None:
    sparse(folder / unit.shard, unit.bytes_out, header_bytes(unit.entries, SHARD_METADATA))


def write_tokenizer(folder: Path, tokens: int) -> None:
    """A tokenizer of `tokens` words, the fixtures' special tokens the last: every id is a word of its own, so that random ids survive being
    written as text and read again."""
    document: dict[str, Any] = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    added = document["added_tokens"]
    words = tokens - len(added)
    document |= {
        "added_tokens": [token | {"id": words + number} for number, token in enumerate(added)],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {f"w{number}": number for number in range(words)}, "unk_token": "w0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / name, folder / name)
