"""The calibration corpus: bundled, from files, or from a dataset on the Hub.

The rest of the package imports from here; `files` has the file formats, `dialects` the forms of a record, and `windows` the tokenizer's side.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3quant.calibration.dialects import parse_record
from m3quant.calibration.documents import (
    Document,
    EmptyRecord,
    OddRecord,
    Skipped,
    corpus_sha256,
    interleave,
)
from m3quant.calibration.files import kind_of_file, read_file, read_folder
from m3quant.calibration.windows import (
    Windows,
    load_tokenizer,
    render,
    tokenize_windows,
    tokenizer_sha256,
)
from m3quant.errors import CalibrationError

logger = logging.getLogger(__name__)

BUNDLED_PATH = Path(__file__).parent / "data" / "corpus.jsonl"
EXTENSION_PATH = BUNDLED_PATH.with_name("extension.jsonl.gz")
BUNDLED_NAME = "bundled corpus"
BUNDLED_SPEC = "bundled"
# About 16 million tokens, over a hundred times what a calibration uses: a folder or dataset is read no further.
MAX_CHARACTERS = 64 * 2**20
# Public sets by the names that `eval --data` has too; there it is their test split that is measured, here the one to learn from.
PUBLIC = {
    "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1:train",
    "wikitext-2-documents": "EleutherAI/wikitext_document_level:wikitext-2-raw-v1:train",
    "pg19": "deepmind/pg19::train",
}
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[^:]*))?(?::(?P<split>.+))?")


def load_documents(spec: str | None, *, max_characters: int = MAX_CHARACTERS) -> list[Document]:
    """The documents of `read_source`; what was left out is logged."""
    loaded = read_source(spec, max_characters=max_characters)
    for note in loaded.notes:
        logger.warning("%s", note)
    return list(loaded.documents)


@dataclass(frozen=True)
class Loaded:
    """What one source of text gave. notes: what the user should know of it: records left out, reading cut short.
    more: further documents, for runs that these are too little for."""

    name: str
    documents: tuple[Document, ...]
    notes: tuple[str, ...] = ()
    more: Callable[[], Sequence[Document]] | None = None


def read_source(spec: str | None, *, max_characters: int = MAX_CHARACTERS) -> Loaded:
    """The documents that `spec` names.

    Args:
        spec: None or "bundled" for the bundled corpus; a file (JSON lines, JSON, CSV, TSV or Parquet in a form of
            `dialects`, plain text or source code; .gz too); a folder of those; or a dataset on the Hub,
            "org/name[:config][:split]" ("org/name::validation" names only the split; the default split is train), or one of
            PUBLIC by its short name.
        max_characters: reading stops after this many.

    Raises:
        CalibrationError: nothing there, not readable, or without any usable record; names file, line and remedy.
    """
    skipped = Skipped()
    if spec is None or spec == BUNDLED_SPEC:
        return Loaded(BUNDLED_NAME, tuple(read_file(BUNDLED_PATH, skipped)), more=bundled_extension)
    if not spec.strip():
        raise CalibrationError("The name of the calibration data is empty; give a file, folder or Hub dataset id.")
    path = Path(spec)
    if path.is_dir():
        return _at_most(read_folder(path, skipped), skipped, max_characters, spec, path.name)
    if path.is_file():
        return _at_most(read_file(path, skipped), skipped, max_characters, spec, path.name)
    hub = HUB_ID.fullmatch(PUBLIC.get(spec, spec))
    if hub is None or kind_of_file(path) is not None:
        raise CalibrationError(
            f"Calibration data {spec!r}: no such file or folder, not a Hub dataset id (org/name[:config][:split]), and none of "
            f"bundled, {', '.join(PUBLIC)}; check the path."
        )
    split = hub["split"] or "train"
    return _at_most(_hub(hub["name"], hub["config"] or None, split, skipped), skipped, max_characters, spec, spec)


def bundled_extension() -> tuple[Document, ...]:
    """What the bundled corpus has beyond its first part, which the default run is cut from."""
    return tuple(read_file(EXTENSION_PATH, Skipped()))


def _at_most(
    documents: Iterable[Document], skipped: Skipped, max_characters: int, spec: str, name: str
) -> Loaded:  # manifests hold no path of this machine: `name`
    taken: list[Document] = []
    characters = 0
    notes: list[str] = []
    for document in documents:
        taken.append(document)
        characters += len(document.text) if document.text is not None else len(document.content_bytes())
        if characters >= max_characters:
            notes.append(f"{name}: reading stopped after {len(taken)} documents and {characters} characters")
            break
    if not taken and skipped.first is not None:
        raise CalibrationError(
            f"{spec} has no usable record: all {skipped.counts.total()} are empty or odd, the first because: {skipped.first_odd or skipped.first}"
        )
    if not taken:
        raise CalibrationError(f"{spec} has no document; give data with text.")
    if left_out := skipped.sentence(len(taken)):
        notes.append(f"{name}: {left_out}")
    return Loaded(name, tuple(taken), tuple(notes))


def _hub(name: str, config: str | None, split: str, skipped: Skipped) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"Calibration data {name!r} is no file here, and reading it from the Hub needs the datasets library; "
            f"install it with pip install 'm3quant[data]', or give a file or folder."
        ) from error
    for number, record in enumerate(_hub_records(datasets, name, config, split), 1):
        try:
            yield parse_record(record, f"{name}, split {split}, record {number}")
        except (EmptyRecord, OddRecord) as reason:
            skipped.add(reason)


def _hub_records(datasets: Any, name: str, config: str | None, split: str) -> Iterator[object]:
    # `datasets` and the filesystems beneath it raise their own, requests', aiohttp's and pyarrow's errors: all of them
    # mean the same to the person who gave the id.
    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        wanted = f"Hub dataset {name!r}" + (f", config {config!r}" if config else "") + f", split {split!r}"
        raise CalibrationError(
            f"{wanted} cannot be loaded ({reason}); check the id, config, split and network, or give a file or folder."
        ) from error


__all__ = [
    "BUNDLED_NAME",
    "BUNDLED_PATH",
    "BUNDLED_SPEC",
    "Document",
    "Loaded",
    "Windows",
    "corpus_sha256",
    "interleave",
    "load_documents",
    "load_tokenizer",
    "read_source",
    "render",
    "tokenize_windows",
    "tokenizer_sha256",
]
