"""The last steps of a conversion: index, recipe, carried files, manifest, and config.json as the very last."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from .. import __version__
from ..artifact.identity import SOURCE
from ..artifact.journal import Journal
from ..artifact.manifest import MANIFEST_SCHEMA, Manifest, tensor_facts, write_manifest
from ..artifact.source_record import SourceRecord
from ..checkpoint import make_folder, write_bytes_atomic
from ..errors import OutputError
from ..planning.plan import INDEX_FILE, RECIPE_FILE, Plan, bits_per_weight, passed_through, role_table
from ..planning.source_format import source_format


def finish(plan: Plan, output: Path, journal: Journal, extra: dict[str, Any]) -> dict[str, Any]:
    """Write everything except the shards and return the manifest. config.json comes last: a folder that has one is complete."""
    digests, source = _write_beside(
        plan, output, plan.copied_files, lambda name, digest: _check_unchanged(output, name, digest, journal)
    )
    facts = make_manifest(plan, journal.records, {"files": digests, **extra})
    facts["source"] |= {"identity": journal.read[SOURCE], **source.to_json()}
    return _write_last(plan, output, facts)


def write_rehearsal(plan: Plan, folder: Path, extra: dict[str, Any]) -> None:
    """Write into `folder` what `finish` will write, so that it can be looked at before a shard is made.

    Of shards their sizes are known; in place of their sha256 stand zeros, and of what was read nothing. The weights of a draft are left
    out: they may be as large as a shard, and on the Hub.
    """
    texts = [name for name in plan.copied_files if not name.endswith(".safetensors")]
    digests, source = _write_beside(plan, folder, texts, lambda name, digest: None)
    promised = {u.index: {"shard": u.shard, "size": u.bytes_out, "sha256": "0" * 64, "read": {}} for u in plan.units}
    facts = make_manifest(plan, promised, {"files": digests, **extra})
    facts["source"] |= source.to_json()
    _write_last(plan, folder, facts)


def _write_beside(
    plan: Plan, output: Path, carried: Sequence[str], check: Callable[[str, str], None]
) -> tuple[dict[str, str], SourceRecord]:
    """Index, recipe and carried files into `output`; the digests of what is listed, and the source's record. check: of each carried file."""
    own = {INDEX_FILE: plan.index_bytes, RECIPE_FILE: plan.recipe.dump().encode(), "config.json": plan.config_bytes}
    digests = {name: sha256(data).hexdigest() for name, data in own.items()}
    write_bytes_atomic(output / INDEX_FILE, plan.index_bytes)
    write_bytes_atomic(output / RECIPE_FILE, plan.recipe.dump().encode())
    source = SourceRecord(plan.checkpoint)
    for name in carried:
        target = output / name
        make_folder(target.parent)
        digest = source.add(name, plan.checkpoint.copy_file(name, target))
        check(name, digest)
        if target.suffix != ".md":  # cards are texts, and are rewritten when an output is published
            digests[name] = digest
    return digests, source


def _write_last(plan: Plan, output: Path, facts: dict[str, Any]) -> dict[str, Any]:
    manifest = Manifest.model_validate(facts)
    write_manifest(output, manifest)
    write_bytes_atomic(output / "config.json", plan.config_bytes)
    return manifest.to_json()


def _check_unchanged(output: Path, name: str, digest: str, journal: Journal) -> None:
    """Raise OutputError for a carried file that is not what it was when the conversion was begun.

    Of a large object no sha256 was known then: it was compared with its mark before and after it came (`object_store`).
    """
    begun = journal.read[SOURCE].files.get(name)
    if begun != digest and (begun is None or len(begun) == len(digest)):
        raise OutputError(
            f"{name} of the source has changed since the conversion into {output} was begun: put the earlier file back and "
            "run the same command again; finished shards are kept."
        )


def make_manifest(plan: Plan, records: Mapping[int, Mapping[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
    """What the output was made from and of: enough to verify it without the source. records: of every unit, as journalled."""
    shards = {records[u.index]["shard"]: {k: records[u.index][k] for k in ("size", "sha256")} for u in plan.units}
    return {
        "schema": MANIFEST_SCHEMA,
        "m3quant": __version__,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "fingerprint": plan.fingerprint(),
        "source": {
            "fingerprint": plan.checkpoint.fingerprint(),
            "bytes": sum(u.bytes_in for u in plan.units),
            "read": {records[u.index]["shard"]: records[u.index]["read"] for u in plan.units},
            "tensors": {t.name: tensor_facts(t.source) for t in plan.tensors},
            "quantization": source_format(plan.checkpoint).section or None,
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
