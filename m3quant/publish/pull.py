"""Download a checkpoint from the Hub and verify it: every file against the sha256 that its publisher recorded in the repo.

A repo that m3quant published states its files twice: SHA256SUMS (all files) and m3quant.json (shards, and files
written with them). Both, and what the Hub says, must agree before a large file is fetched. A repo without them, such as a base
model, is compared with the Hub's own checksums: that finds a damaged download, and says nothing about who wrote the files.
"""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..artifact.manifest import MANIFEST, Sums, load_manifest
from ..checkpoint import CONFIG_NAME, INDEX_NAME, make_folder, sha256_file
from ..checkpoint.bounded import MANIFEST_BYTES, read_text
from ..checkpoint.checkpoint import REPO_ID
from ..checkpoint.copying import hash_file
from ..checkpoint.hub import HubStore
from ..checkpoint.remote import TransientError, passing
from ..errors import CheckpointError, HubError, OutputError, StoppedError, VerifyError
from ..running.progress import Progress
from ..running.retry import again
from .files import CHECKSUMS

FILES_AT_ONCE = 4
SHA256_DIGITS = 64
_SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")
# The downloader's own records and unfinished files, in the folder that it fills.
DOWNLOADERS_OWN = ".cache"


@dataclass(frozen=True)
class Pulled:
    """A folder whose files were all compared. manifest: how many of them with sha256 sums from the repo itself."""

    repo: str
    revision: str
    path: str
    files: int
    bytes: int
    manifest: int
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def split_revision(text: str, revision: str | None) -> tuple[str, str | None]:
    """ "org/name@revision" in its parts. Raises HubError for no repo id, or two revisions."""
    repo, at, inline = text.partition("@")
    if not REPO_ID.fullmatch(repo) or (at and not inline):
        raise HubError(f"{text!r} is no name of a Hub repo: give it as ORG/NAME or ORG/NAME@REVISION.")
    if inline and revision and inline != revision:
        raise HubError(f"Two revisions are given, {inline!r} and {revision!r}: give one.")
    return repo, inline or revision


def pull(text: str, destination: Path | None, revision: str | None, progress: Progress) -> Pulled:
    """Fetch what a checkpoint needs into `destination` (None: the Hub's cache) and compare every file.

    Raises CheckpointError or HubError (exit 2) where it cannot be fetched, VerifyError (1) for a file that is not what the
    repo says, StoppedError (4) where the same command continues.
    """
    repo, revision = split_revision(text, revision)
    _quiet()
    try:
        store = again(lambda: HubStore(repo, revision), passing, say=progress.say)
        return _Pull(store, destination, progress).run()
    except TransientError as error:
        raise StoppedError(f"{error} The same command continues.") from None


def local_copy(path_or_repo: str | Path, progress: Progress, revision: str | None = None) -> Path:
    """The folder of a checkpoint that is given as a folder or as a Hub id; the latter is pulled into the Hub's cache first.

    What is neither is returned as it is: the command that wanted it says so. Raises as `pull`.
    """
    path = Path(path_or_repo).expanduser()
    if path.exists() or not REPO_ID.fullmatch(str(path_or_repo).partition("@")[0]):
        return path
    pulled = pull(str(path_or_repo), None, revision, progress)
    progress.say(f"{path_or_repo} is no folder here: using {pulled.repo}@{pulled.revision[:8]} in {pulled.path}")
    return Path(pulled.path)


def _quiet() -> None:
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    disable_progress_bars()


class _Pull:
    """One run of `pull`."""

    def __init__(self, store: HubStore, destination: Path | None, progress: Progress) -> None:
        self.store, self.destination, self.progress = store, destination, progress
        listing = store.listing()
        if not listing.has_config:
            raise CheckpointError(f"{store.where} has no {CONFIG_NAME}, so it is no checkpoint: check the name.")
        self.left_out = listing.skipped
        own = [CONFIG_NAME, *([INDEX_NAME] if listing.has_index else [])]
        self.names = sorted({*listing.shards, *listing.other, *own})

    def run(self) -> Pulled:
        self._check_destination()
        proofs = {name: self._fetch(name) for name in (MANIFEST, CHECKSUMS) if name in self.names}
        expected = self._expected(proofs)
        total = sum(self.store.file_size(name) for name in self.names)
        present = self._present()
        self._check_disk(total - present)
        self.progress.start(total, 0)
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            paths = list(pool.map(lambda name: self._fetch_and_compare(name, expected.get(name)), self.names))
        index = self.names.index(CONFIG_NAME)
        return Pulled(
            self.store.repo, self.store.revision, str(paths[index].parent), len(self.names), total,
            sum(name in expected for name in self.names), self.left_out,
        )  # fmt: skip

    def _check_destination(self) -> None:
        folder = self.destination
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file: give a folder for {self.store.repo}.")
        make_folder(folder)
        found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        others = [n for n in found if n not in self.names and not n.startswith(f"{DOWNLOADERS_OWN}/")]
        if others:
            raise OutputError(
                f"{folder} holds files that are not of {self.store.where} ({min(others)}): choose another folder, or empty this one."
            )

    def _present(self) -> int:
        """Bytes of the wanted files that are in the destination already."""
        if self.destination is None:
            from huggingface_hub import try_to_load_from_cache

            cached = (try_to_load_from_cache(self.store.repo, n, revision=self.store.revision) for n in self.names)
            return sum(Path(path).stat().st_size for path in cached if isinstance(path, str))
        return sum(p.stat().st_size for n in self.names if (p := self.destination / n).is_file())

    def _check_disk(self, needed: int) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = self.destination or Path(HF_HUB_CACHE)
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise StoppedError(
                f"{self.store.where} needs {needed} more bytes and {folder} has {free} free: free space, or give another folder."
            )

    def _fetch(self, name: str) -> Path:
        return again(lambda: self._fetch_once(name), passing, say=self.progress.say)

    def _fetch_once(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with self.store.errors(name):
            path = hf_hub_download(self.store.repo, name, revision=self.store.revision, local_dir=self.destination)
        return Path(path)

    def _expected(self, proofs: dict[str, Path]) -> dict[str, str]:
        """Name -> sha256 that the repo's own manifests state. Raises VerifyError where they disagree or a file is missing."""
        where = self.store.where
        expected: dict[str, str] = {}
        for proof, path in proofs.items():
            read = _manifest_sums if proof == MANIFEST else _checksums
            for name, digest in read(path, f"{where}/{proof}").items():
                if expected.setdefault(name, digest) != digest:
                    raise VerifyError(
                        f"{where}: {MANIFEST} and {CHECKSUMS} state different sums for {name}: do not use it."
                    )
        for name, digest in expected.items():
            if name not in self.store.sizes:
                raise VerifyError(f"{where} lacks {name}, which its manifest lists: it is incomplete.")
            there = self.store.marks[name]
            if len(there) == SHA256_DIGITS and there != digest:
                raise VerifyError(
                    f"{where}/{name} is not the file that its manifest lists ({there[:12]}, not {digest[:12]})."
                )
        unlisted = [n for n in self.names if n.endswith(".safetensors") and n not in expected]
        if expected and unlisted:
            raise VerifyError(f"{where} holds {unlisted[0]}, which its manifest does not list: do not use it.")
        if not expected:
            self.progress.say(
                f"{where} has no manifest of m3quant: its files are compared with the Hub's own checksums"
            )
        return expected

    def _fetch_and_compare(self, name: str, expected: str | None) -> Path:
        path = self._fetch(name)
        wanted = expected or self.store.marks[name]
        if len(wanted) == SHA256_DIGITS:
            found, kind = sha256_file(path), "sha256"
        else:
            found, kind = hash_file(path).git_sha1, "git sha1"
        if found != wanted:
            raise VerifyError(
                f"{path} is not {name} of {self.store.where}: its {kind} is {found[:12]}..., not {wanted[:12]}...; "
                f"remove {path.resolve()} and pull again."
            )
        self.progress.advance(self.store.file_size(name))
        return path


def _checksums(path: Path, where: str) -> dict[str, str]:
    """A file as sha256sum writes it."""
    out = {}
    for line in read_text(path, MANIFEST_BYTES, error=VerifyError).splitlines():
        match = _SUM.fullmatch(line)
        if match is None:
            raise VerifyError(f"{where} has a line that sha256sum would not write: it is damaged.")
        out[match[2]] = match[1]
    return out


def _manifest_sums(path: Path, where: str) -> dict[str, str]:
    try:
        sums = load_manifest(path, Sums)
    except ValueError:
        raise VerifyError(f"{where} cannot be read as a manifest of m3quant: it is damaged.") from None
    return {**sums.files, **{name: shard.sha256 for name, shard in sums.shards.items()}}
