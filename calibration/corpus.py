"""The calibration corpus: bundled, from files, or from a dataset on the Hub.

The rest of the package imports from here; `documents` has the file formats and `windows` the tokenizer's side.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from m3quant.calibration.documents import (
    Document,
    corpus_sha256,
    interleave,
    kind_of_file,
    parse_record,
    read_file,
    read_folder,
)
from m3quant.calibration.windows import Windows, load_tokenizer, render, tokenize_windows, tokenizer_sha256
from m3quant.errors import CalibrationError

logger = logging.getLogger(__name__)

BUNDLED_PATH = Path(__file__).parent / "data" / "corpus.jsonl"
BUNDLED_NAME = "bundled corpus"
# About 16 million tokens, over a hundred times what a calibration uses: a folder or dataset is read no further.
MAX_CHARACTERS = 64 * 2**20
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[^:]*))?(?::(?P<split>.+))?")


def load_documents(spec: str | None, *, max_characters: int = MAX_CHARACTERS) -> list[Document]:
    """The documents that `spec` names.

    Args:
        spec: None for the bundled corpus; a file (JSON lines with "text", "messages" or "conversations", Parquet with
            such columns, plain text or source code; .gz too); a folder of those; or a dataset on the Hub,
            "org/name[:config][:split]" ("org/name::validation" names only the split; the default split is train).
        max_characters: reading stops after this many, with a logged warning.

    Raises:
        CalibrationError: nothing there, not readable, or without text; names file, line and remedy.
    """
    if spec is None:
        return list(read_file(BUNDLED_PATH))
    if not spec.strip():
        raise CalibrationError("The name of the calibration data is empty; give a file, folder or Hub dataset id.")
    path = Path(spec)
    if path.is_dir():
        return _at_most(read_folder(path), max_characters, spec)
    if path.is_file():
        return _at_most(read_file(path), max_characters, spec)
    hub = HUB_ID.fullmatch(spec)
    if hub is None or kind_of_file(path) is not None:
        raise CalibrationError(
            f"Calibration data {spec!r}: no such file or folder, and not a Hub dataset id (org/name[:config][:split]); "
            f"check the path."
        )
    split = hub["split"] or "train"
    return _at_most(_hub(hub["name"], hub["config"] or None, split), max_characters, spec)


def _at_most(documents: Iterable[Document], max_characters: int, spec: str) -> list[Document]:
    taken: list[Document] = []
    characters = 0
    for document in documents:
        taken.append(document)
        characters += len(document.text) if document.text is not None else len(document.content_bytes())
        if characters >= max_characters:
            logger.warning("%s: reading stopped after %d documents and %d characters", spec, len(taken), characters)
            break
    if not taken:
        raise CalibrationError(f"{spec} has no document; give data with text.")
    return taken


def _hub(name: str, config: str | None, split: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"Calibration data {name!r} is no file here, and reading it from the Hub needs the datasets library; "
            f"install it with pip install 'm3quant[data]', or give a file or folder."
        ) from error
    records = _hub_records(datasets, name, config, split)
    for number, record in enumerate(records, 1):
        yield parse_record(record, f"{name}, split {split}, record {number}")


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
    "Document",
    "Windows",
    "corpus_sha256",
    "interleave",
    "load_documents",
    "load_tokenizer",
    "render",
    "tokenize_windows",
    "tokenizer_sha256",
]
