"""Whether a source holds what an output was made of: by digest, which an average error could not show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..artifact.manifest import MANIFEST
from ..artifact.reread import recorded_digests, stored_infos
from ..checkpoint import Checkpoint, sha256_file
from ..planning.plan import Plan


def other_source_problems(plan: Plan, manifest: Mapping[str, Any], source: Checkpoint) -> Iterator[str]:
    """One sentence per shard that was made of other tensors than `source` has now, and per carried file that differs.

    plan: made from `source`. Cards (.md) are texts that users may edit; an output of schema 1 recorded no digests.
    """
    read = manifest["source"].get("read")
    for unit in plan.units if read is not None else ():
        if read.get(unit.shard) is None:
            yield f"{MANIFEST} does not say what {unit.shard} was made of: convert again"
            continue
        now = recorded_digests(source, stored_infos(unit))
        if other := [shard for shard in now if read[unit.shard].get(shard) != now[shard]]:
            yield (
                f"{unit.shard} ({unit.label}) was made of other tensors than {', '.join(other)} of {source.root} holds: give the "
                "source that it was made from"
            )
    for name, facts in manifest["source"].get("files", {}).items():
        if name.endswith(".md"):
            continue
        if name not in source.other_files:
            yield f"{name} was carried over, but {source.root} has no such file"
        elif _sha256(source, name) != facts["sha256"]:
            yield f"{source.root}/{name} is not the file that was carried over: it was edited, or belongs to another source"


def _sha256(source: Checkpoint, name: str) -> str:
    if source.remote is not None and not source.remote.is_small(name):
        return source.remote.digest(name)
    return sha256_file(source.files([name]) / name)
