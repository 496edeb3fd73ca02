"""Which files of a finished output are published, each with its size and sha256. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import CONFIG_NAME, INDEX_NAME, sha256_file
from ..convert.journal import FOLDER, MANIFEST
from ..errors import PublishError
from ..evaluate.record import EVAL_FILE
from ..plan import RECIPE_FILE

CARD = "README.md"
NOTICE = "NOTICE"
CHECKSUMS = "SHA256SUMS"  # of every published file but the card and itself; `sha256sum -c` reads it
REPORT_FOLDER = "m3quant-report"
EVAL_RESULTS_FOLDER = ".eval_results"
# What convert makes itself: never the bytes of a file of the base.
OWN = frozenset({CONFIG_NAME, INDEX_NAME, RECIPE_FILE})
# What convert, eval and card write after or beside the files that the manifest lists.
BESIDE = (MANIFEST, CARD, NOTICE, CHECKSUMS, EVAL_FILE)


@dataclass(frozen=True)
class PublishFile:
    """One file to send. path_in_repo: relative, with '/'; sha256: hex, of the whole file.

    base_copy: the bytes of the base's file of the same name, so that a server-side copy may stand in for an upload.
    """

    path_in_repo: str
    local_path: Path
    size: int
    sha256: str
    base_copy: bool = False


def files_to_publish(out: Path, manifest: Mapping[str, Any]) -> list[PublishFile]:
    """Every file of `out` that belongs to the publication, by name. manifest: as `verify.structure.read_manifest` returns it.

    Shards have the sha256 that was recorded when they were written (`verify` compares it with the bytes; the upload
    must, too); everything else is hashed here. Raises PublishError for a file that the manifest lists and `out` lacks.
    """
    files = []
    for name, facts in manifest["shards"].items():
        path = out / name
        if not path.is_file() or path.stat().st_size != facts["size"]:
            raise PublishError(f"{path} is missing or has another size than when it was written: convert again.")
        files.append(PublishFile(name, path, facts["size"], facts["sha256"]))
    carried = carried_files(manifest)
    for name in sorted({*manifest["files"], *carried} - {CARD}):
        if not (out / name).is_file():
            raise PublishError(f"{out / name} is missing: convert again, or copy it from the source.")
    beside = {name for name in BESIDE if (out / name).is_file()}
    for folder in (REPORT_FOLDER, EVAL_RESULTS_FOLDER):
        beside |= {p.relative_to(out).as_posix() for p in (out / folder).rglob("*") if p.is_file()}
    for name in {*manifest["files"], *carried, *beside} - ({CARD} - beside):
        path = out / name
        digest = sha256_file(path)
        files.append(PublishFile(name, path, path.stat().st_size, digest, carried.get(name) == digest))
    return sorted(files, key=lambda f: f.path_in_repo)


def carried_files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Name -> sha256 of the files that were carried over from the source byte for byte."""
    return {name: digest for name, digest in manifest["files"].items() if name not in OWN}


def files_left_out(out: Path, files: list[PublishFile]) -> list[str]:
    """Names in `out` that are not published, in order: a person should see them before anything is sent."""
    sent = {f.path_in_repo for f in files}
    found = (p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() or p.is_symlink())
    return sorted(name for name in found if name not in sent and not name.startswith(f"{FOLDER}/"))
