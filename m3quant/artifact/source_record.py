"""What the manifest keeps of the source's files: enough to publish an output long after the source is gone. No path of the machine."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint import Checkpoint
from ..checkpoint.origin import matches_etag, origin_of
from ..planning.plan import REPLACED_FILES

_FRONT_MATTER = re.compile(rb"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
DOWNLOADERS_OWN = (".cache/", ".git/")  # made by hf download and git clone, no part of the repo
CARD_KEYS = ("license", "license_name", "license_link", "base_model", "pipeline_tag", "library_name", "language")


class SourceRecord:
    """Facts about the files beside the weights, filled while they are carried over."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        names = [*checkpoint.shards, *checkpoint.other_files, "config.json"]
        self.origin = origin_of(Path(checkpoint.root), names)
        replaced = [name for name in checkpoint.other_files if name in REPLACED_FILES]
        skipped = {name: why for name, why in checkpoint.skipped_files.items() if name not in DOWNLOADERS_OWN}
        self.left_behind = {
            **skipped,
            **dict.fromkeys(replaced, "describes the source: the output has or gets its own"),
        }
        self.files: dict[str, dict[str, Any]] = {}
        self.card: dict[str, Any] | None = None

    def add(self, name: str, data: bytes) -> str:
        """Record one carried file; returns its sha256. as_on_hub: whether its bytes are those the Hub sent, null if unknown."""
        etag = self.origin.etags.get(name)
        known = True if self.origin.repo else matches_etag(data, etag) if etag else None
        digest = sha256(data).hexdigest()
        self.files[name] = {"size": len(data), "sha256": digest, "as_on_hub": known}
        if name == "README.md":
            self.card = card_facts(data)
        return digest

    def to_json(self) -> dict[str, Any]:
        return {
            "repo": self.origin.repo,
            "revision": self.origin.revision,
            "files": self.files,
            "left_behind": self.left_behind,
            "card": self.card,
        }


def card_facts(readme: bytes) -> dict[str, Any]:
    """What a model card's metadata says of licence and kind; empty where it has none that can be read."""
    match = _FRONT_MATTER.match(readme)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        data = None
    return {key: data[key] for key in CARD_KEYS if key in data} if isinstance(data, dict) else {}
