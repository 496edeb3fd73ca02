"""The last steps of a conversion: index, recipe, carried files, manifest, and config.json as the very last."""

from __future__ import annotations

import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from .. import __version__
from ..artifact.journal import MANIFEST, Journal
from ..artifact.source_record import SourceRecord
from ..checkpoint import make_folder, write_bytes_atomic, write_json_atomic
from ..planning.plan import INDEX_FILE, RECIPE_FILE, Plan, bits_per_weight, passed_through, role_table

SCHEMA = 1


def finish(plan: Plan, output: Path, journal: Journal, extra: dict[str, Any]) -> dict[str, Any]:
    """Write everything beside the shards and return the manifest. config.json comes last: a folder that has one is complete."""
    own = {INDEX_FILE: plan.index_bytes, RECIPE_FILE: plan.recipe.dump().encode(), "config.json": plan.config_bytes}
    digests = {name: sha256(data).hexdigest() for name, data in own.items()}
    write_bytes_atomic(output / INDEX_FILE, plan.index_bytes)
    write_bytes_atomic(output / RECIPE_FILE, plan.recipe.dump().encode())
    source = SourceRecord(plan.checkpoint)
    for name in plan.copied_files:
        target = output / name
        make_folder(target.parent)
        digest = source.add(name, plan.checkpoint.copy_file(name, target))
        if target.suffix != ".md":  # cards are for people, and are rewritten when an output is published
            digests[name] = digest
    manifest = make_manifest(plan, journal, {"files": digests, **extra})
    manifest["source"] |= source.to_json()
    write_json_atomic(output / MANIFEST, manifest)
    write_bytes_atomic(output / "config.json", plan.config_bytes)
    return manifest


def make_manifest(plan: Plan, journal: Journal, extra: dict[str, Any]) -> dict[str, Any]:
    """What the output was made from and of: enough to verify it without the source."""
    shards = {
        journal.records[u.index]["shard"]: {k: journal.records[u.index][k] for k in ("size", "sha256")}
        for u in plan.units
    }
    return {
        "schema": SCHEMA,
        "m3quant": __version__,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "fingerprint": plan.fingerprint(),
        "source": {
            "fingerprint": plan.checkpoint.fingerprint(),
            "bytes": sum(u.bytes_in for u in plan.units),
            "tensors": {
                t.name: {
                    "dtype": t.source.info.dtype,
                    "shape": list(t.source.info.shape),
                    "kind": t.source.kind,
                    **({"scale": t.source.scale.dtype} if t.source.scale else {}),
                }
                for t in plan.tensors
            },
        },
        "recipe": plan.recipe.model_dump(),
        "output_bytes": plan.output_bytes,
        "bits_per_weight": round(bits_per_weight(plan), 4) if plan.quantization else None,
        "roles": role_table(plan),
        "passed_through": passed_through(plan),
        "notes": plan.notes,
        "shards": shards,
        **extra,
    }
