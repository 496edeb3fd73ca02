"""Text to measure on: bundled, from a file or folder, or the usual public sets where the network allows."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact.eval_record import Data
from ..calibration.corpus import load_documents
from ..calibration.documents import Document, Skipped, corpus_sha256
from ..calibration.files import read_file
from ..calibration.tokenizing import encode
from ..calibration.windows import refusals, rendered
from ..errors import CalibrationError, EvaluationError

logger = logging.getLogger(__name__)

BUNDLED = "bundled"
BUNDLED_PATH = Path(__file__).parent / "data" / "texts.jsonl"
# name -> (Hub dataset, config, split, column, licence of the text)
PUBLIC = {
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", "CC-BY-SA-3.0"),
    "wikitext-2-documents": ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test", "page", "CC-BY-SA-3.0"),
    "pg19": ("deepmind/pg19", None, "test", "text", "public domain"),
}
_PG19_BOOKS = 10  # enough for any length that is measured; the whole test split is 100 books


@dataclass(frozen=True)
class Texts:
    """Documents as strings. shown: what the model reads of each; documents: the originals, which words are counted of."""

    name: str
    sha256: str
    licence: str | None
    documents: tuple[str, ...]
    shown: tuple[str, ...]

    def data(self) -> Data:
        return Data(name=self.name, sha256=self.sha256, licence=self.licence)

    def joined(self) -> str:
        """All documents with a blank line between, as the GPTQ convention joins them."""
        return "\n\n".join(self.shown)


@lru_cache(maxsize=64)
def token_ids(tokenizer: Any, text: str) -> np.ndarray:
    """Ids [N] int64 of a text, no special token added. Read-only: the tasks of a suite share the text, and so its ids."""
    ids = np.array(encode(tokenizer, text), dtype=np.int64)
    ids.flags.writeable = False
    return ids


def load_texts(spec: str, tokenizer: Any) -> Texts:
    """The texts called `spec`: "bundled", a name of `PUBLIC`, or a file, folder or Hub dataset id as calibration takes them.

    Chat records go through the tokenizer's template. Raises EvaluationError or CalibrationError for what is not there, not
    readable, not UTF-8 or empty.
    """
    if spec == BUNDLED:
        return _texts(BUNDLED, list(read_file(BUNDLED_PATH, Skipped())), tokenizer)
    if spec in PUBLIC:
        return _public(spec)
    documents = load_documents(spec)
    name = Path(spec).name if Path(spec).exists() else spec
    return _texts(name, documents, tokenizer)


def _texts(name: str, documents: Sequence[Document], tokenizer: Any) -> Texts:
    refused: list[str] = []
    read = list(rendered(documents, tokenizer, refused))
    if not read:
        raise CalibrationError(refused[0])
    for note in refusals(refused, len(documents)):
        logger.warning("%s: %s", name, note)
    shown = tuple(text for _, text in read)
    licences = sorted({document.licence for document, _ in read})
    return Texts(name, corpus_sha256([document for document, _ in read]), ", ".join(licences), shown, shown)


def _public(spec: str) -> Texts:
    dataset, config, split, column, licence = PUBLIC[spec]
    rows = _rows(dataset, config, split, column, _PG19_BOOKS if spec == "pg19" else None)
    shown = [wikitext_plain(row) for row in rows] if spec == "wikitext-2-documents" else rows
    digest = hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
    return Texts(spec, digest, licence, tuple(rows), tuple(shown))


def _rows(dataset: str, config: str | None, split: str, column: str, most: int | None) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise EvaluationError(
            f"{dataset} is read with the datasets library: pip install 'm3quant[data]', or give --data FILE."
        ) from None
    try:
        found = datasets.load_dataset(dataset, config, split=split, streaming=most is not None)
        return list(_first(found, column, most))
    except Exception as error:  # datasets raises its own errors and those of every library beneath it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvaluationError(
            f"{dataset} ({split}) cannot be loaded ({reason}): check the network, or give --data FILE; --data bundled needs none."
        ) from error


def _first(rows: Iterable[dict[str, Any]], column: str, most: int | None) -> Iterator[str]:
    for number, row in enumerate(rows):
        if most is not None and number >= most:
            return
        yield row[column]


# WikiText writes spaces around punctuation and @ around joiners within words and numbers. What lm-eval's wikitext task does
# about it, in its order, as (pattern, replacement); tests compare with lm-eval's own function.
_WIKITEXT = [
    ("s '", "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    *[(re.escape(a), b) for a, b in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))],
    *[(rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"],
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    *[("= " * (n - 1) + "=", "=" * n) for n in (4, 3, 2)],
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


def wikitext_plain(page: str) -> str:
    """A WikiText page as ordinary text."""
    for pattern, replacement in _WIKITEXT:
        page = re.sub(pattern, replacement, page)
    return page
