"""Compare an output with its base on the Hub, by the hashes that the Hub lists: nothing but the file list is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.copying import hash_file
from ..checkpoint.hub import HubStore
from ..checkpoint.listing import classify
from ..planning.plan import REPLACED_FILES
from .base import Base
from .files import CARD, LICENCE_FILE
from .licences import Licence


def base_problems(
    out: Path, manifest: Mapping[str, Any], base: Base, licence: Licence, weights: bool = True
) -> list[str]:
    """Sentences on where `out` is not made from `base` as the Hub has it. Raises CheckpointError where the Hub cannot be asked.

    Every file next to the weights that the base has at that commit must be here with the same bytes, so that a partial
    download or an edited tokenizer is found; a licence supplied by hand is refused where the base has one of its own. weights: whether
    a draft's weights are looked for, too.
    """
    store = HubStore(base.repo, base.revision)
    problems = []
    if store.revision != base.revision:
        problems.append(f"{base.repo} has no commit {base.revision}: the Hub answers with {store.revision}.")
    listing = classify(store.sizes, base.repo)
    for name in listing.other:
        path = out / name
        if name in REPLACED_FILES or name == CARD or (name.endswith(".safetensors") and not weights):
            continue
        if not path.is_file():
            problems.append(f"{base.repo} has {name}, which {out} lacks: download the base whole and convert again.")
        elif not hash_file(path).has_etag(store.marks[name]):
            problems.append(
                f"{out / name} is not the file that {base.repo} has at {base.revision[:12]}: copy it byte for byte."
            )
    theirs = [name for name in listing.other if LICENCE_FILE.fullmatch(name)]
    if theirs and not licence.carried:
        problems.append(
            f"{base.repo} carries {theirs[0]}, but {licence.file} was supplied by hand: take the base's own."
        )
    here = manifest["source"].get("files", {})
    problems += [
        f"{name} was carried over, but {base.repo} has no such file at {base.revision[:12]}: is that the base?"
        for name in here
        if name not in listing.other
    ]
    return problems
