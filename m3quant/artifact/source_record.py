"""What the manifest keeps of the source's files: enough to publish an output long after the source is gone. No path of the machine."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..checkpoint.bounded import ExpansionError, front_matter, parse_yaml
from ..checkpoint.copying import Copied
from ..checkpoint.origin import Origin, origin_of
from ..checkpoint.reader import open_file
from ..checkpoint.strict_json import described
from ..errors import CheckpointError
from ..planning.plan import REPLACED_FILES

CARD = "README.md"
VALUE_CHARACTERS = 4096
DOWNLOADERS_OWN = (".cache/", ".git/")  # made by hf download and git clone, no part of the repo
CARD_KEYS = ("license", "license_name", "license_link", "base_model", "pipeline_tag", "library_name", "language")


class SourceRecord:
    """Facts about the files next to the weights, filled while they are carried over."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        names = [*checkpoint.shards, *checkpoint.other_files, "config.json"]
        store = checkpoint.remote
        if store is None:
            self.origin = origin_of(Path(checkpoint.root), names)
        else:  # of an object store nothing is kept: its address would be published
            self.origin = Origin(store.repo, store.revision, store.marks if store.repo else {})
        replaced = [name for name in checkpoint.other_files if name in REPLACED_FILES]
        skipped = {name: why for name, why in checkpoint.skipped_files.items() if name not in DOWNLOADERS_OWN}
        self.left_behind = {
            **skipped,
            **dict.fromkeys(replaced, "describes the source: the output has or gets its own"),
        }
        self.files: dict[str, dict[str, Any]] = {}
        self.card = card_facts(checkpoint)

    def add(self, name: str, copied: Copied) -> str:
        """Record one carried file; returns its sha256. as_on_hub: whether its bytes are those the Hub sent, null if unknown."""
        etag = self.origin.etags.get(name)
        known = True if self.origin.repo else copied.has_etag(etag) if etag else None
        self.files[name] = {"size": copied.size, "sha256": copied.sha256, "as_on_hub": known}
        return copied.sha256

    def to_json(self) -> dict[str, Any]:
        return {
            "repo": self.origin.repo,
            "revision": self.origin.revision,
            "files": self.files,
            "left_behind": self.left_behind,
            "card": self.card,
        }


def check_carried(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a file next to the weights that could not be carried over, or a model card that cannot be recorded.

    Called before the first weight is read: what the end of a conversion needs must not fail there.
    """
    for name in checkpoint.other_files if checkpoint.local else ():
        with open_file(Path(checkpoint.root) / name):
            pass
    card_facts(checkpoint)


def card_facts(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the source's model card says about licence and kind, as text or lists of text; None without a card.

    A card that is no YAML gives {"unreadable": why}. Raises CheckpointError for a card or metadata beyond the bounds of
    `checkpoint.bounded`, or a value that is neither text nor a list of text.
    """
    if CARD not in checkpoint.other_files:
        return None
    where = f"{checkpoint.root}/{CARD}"
    block = front_matter(checkpoint.file_bytes(CARD).decode("utf-8", errors="replace"))
    if block is None:
        return {}
    try:
        data = parse_yaml(block, f"{where}: its metadata")
    except ExpansionError:
        raise
    except CheckpointError as error:
        return {"unreadable": str(error)}
    if not isinstance(data, dict):
        return {}
    return {key: _texts(data[key], f"{where}: '{key}' of its metadata") for key in CARD_KEYS if key in data}


def _texts(value: Any, where: str) -> str | list[str] | None:
    if value is None or (isinstance(value, str) and len(value) <= VALUE_CHARACTERS):
        return value
    if isinstance(value, bool | int | float | datetime.date):
        return str(value)
    texts = isinstance(value, list) and all(isinstance(v, str) for v in value)
    if texts and sum(map(len, value)) <= VALUE_CHARACTERS and len(value) <= VALUE_CHARACTERS:
        return list(value)
    raise CheckpointError(
        f"{where} is {described(value, 60)}, neither a text nor a list of texts of at most {VALUE_CHARACTERS} characters: "
        "correct the card, or take it out of the folder."
    )
