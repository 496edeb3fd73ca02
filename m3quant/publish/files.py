"""Which files of a finished output are published, each with its size and sha256. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact.eval_record import EVAL_FILE
from ..artifact.journal import FOLDER
from ..artifact.manifest import MANIFEST
from ..artifact.uploads import UPLOADS, read_uploads
from ..checkpoint import CONFIG_NAME, INDEX_NAME, sha256_file
from ..checkpoint.links import require_regular
from ..errors import PublishError
from ..planning.plan import RECIPE_FILE

CARD = "README.md"
NOTICE = "NOTICE"
CHECKSUMS = "SHA256SUMS"  # of every published file but the card and itself; `sha256sum -c` reads it
REPORT_FOLDER = "m3quant-report"
EVAL_RESULTS_FOLDER = ".eval_results"
# What convert makes itself: never the bytes of a file of the base.
OWN = frozenset({CONFIG_NAME, INDEX_NAME, RECIPE_FILE})
# What convert, eval and card write in addition to the files that the manifest lists.
BESIDE = (MANIFEST, CARD, CHECKSUMS, EVAL_FILE)
# A licence text at the top: carried from the base, or supplied by the user where the base had none.
LICENCE_FILE = re.compile(r"(LICEN[SC]E|COPYING)([-_.].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class PublishFile:
    """One file to send. path_in_repo: relative, with '/'; sha256: hex, of the whole file.

    base_copy: the bytes of the base's file of the same name, so that a server-side copy may replace an upload.
    hashed: sha256 was taken of these bytes by this run, so that the client need not read them twice. dropped: the file is on the
    Hub and no longer here.
    """

    path_in_repo: str
    local_path: Path
    size: int
    sha256: str
    base_copy: bool = False
    hashed: bool = False
    dropped: bool = False


def files_to_publish(out: Path, manifest: Mapping[str, Any]) -> list[PublishFile]:
    """Every file of `out` that belongs to the publication, by name. manifest: as `verify.structure.read_manifest` returns it.

    Shards have the sha256 that was recorded when they were written (`verify` compares it with the bytes; the upload
    must, too); everything else is hashed here. Shards that were dropped after their upload are listed as such. Raises PublishError for a file that the manifest lists and `out` lacks, and for
    a link: only regular files inside the folder are sent.
    """
    files = []
    uploads = read_uploads(out)
    gone = set(uploads.dropped) if uploads else set()
    for name, facts in manifest["shards"].items():
        if name in gone:
            files.append(PublishFile(name, out / name, facts["size"], facts["sha256"], dropped=True))
            continue
        path = require_regular(out, name, PublishError)
        if path.stat().st_size != facts["size"]:
            raise PublishError(f"{path} is missing or has another size than when it was written: convert again.")
        files.append(PublishFile(name, path, facts["size"], facts["sha256"]))
    carried = carried_files(manifest)
    listed = {*manifest["files"], *carried} - {CARD}
    for name in sorted(listed | beside(out, manifest)):
        path = require_regular(out, name, PublishError)
        digest = sha256_file(path)
        files.append(PublishFile(name, path, path.stat().st_size, digest, carried.get(name) == digest))
    return sorted(files, key=lambda f: f.path_in_repo)


def beside(out: Path, manifest: Mapping[str, Any]) -> set[str]:
    """Names of the files that m3quant, or a user with a licence, added to what convert wrote; links among them."""

    def is_file(path: Path) -> bool:
        return path.is_symlink() or path.is_file()

    names = {name for name in (*BESIDE, notice_name(manifest)) if is_file(out / name)}
    names |= {p.name for p in out.iterdir() if is_file(p) and LICENCE_FILE.fullmatch(p.name)}
    for folder in (REPORT_FOLDER, EVAL_RESULTS_FOLDER):
        if (out / folder).is_symlink():
            names.add(folder)
        else:
            names |= {p.relative_to(out).as_posix() for p in (out / folder).rglob("*") if is_file(p)}
    return names


def notice_name(manifest: Mapping[str, Any]) -> str:
    """The file of our change statement: NOTICE, or another name where the base carries a NOTICE of its own."""
    return f"{NOTICE}.m3quant" if NOTICE in carried_files(manifest) else NOTICE


def carried_files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Name -> sha256 of the files that were carried over from the source byte for byte."""
    recorded = manifest["source"].get("files")
    if recorded is not None:
        return {name: facts["sha256"] for name, facts in recorded.items()}
    return {name: digest for name, digest in manifest["files"].items() if name not in OWN}


def files_left_out(out: Path, files: list[PublishFile]) -> list[str]:
    """Names in `out` that are not published, in order: the user should see them before anything is sent."""
    sent = {f.path_in_repo for f in files}
    found = (p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() or p.is_symlink())
    own = (f"{FOLDER}/", UPLOADS)
    return sorted(name for name in found if name not in sent and not name.startswith(own))
