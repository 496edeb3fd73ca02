"""Calibration documents: what one is, their hash, their order, and the count of records that gave none."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from m3quant.errors import CalibrationError


class EmptyRecord(CalibrationError):
    """A record without any text: left out and counted, no fault of the file."""


class OddRecord(CalibrationError):
    """A record that we cannot read as a document: left out, counted, and shown; a run ends only where nothing is left."""


@dataclass
class Skipped:
    """Records that were left out: how many were empty or odd, and the first reason of the odd ones."""

    counts: Counter[str] = field(default_factory=Counter)
    first: CalibrationError | None = None
    first_odd: OddRecord | None = None

    def add(self, reason: CalibrationError) -> None:
        self.counts["odd" if isinstance(reason, OddRecord) else "empty"] += 1
        self.first = self.first or reason
        if isinstance(reason, OddRecord):
            self.first_odd = self.first_odd or reason

    def sentence(self, taken: int) -> str | None:
        """What was left out of `taken` records and these, or None where nothing was."""
        if not self.counts:
            return None
        parts = [f"{count:,} {kind}" for kind in ("empty", "odd") if (count := self.counts[kind])]
        total = taken + self.counts.total()
        reason = f"; the first odd one: {self.first_odd}" if self.first_odd else ""
        return f"{self.counts.total():,} of {total:,} records left out ({', '.join(parts)}){reason}"


@dataclass(frozen=True)
class Document:
    """One document: either `text`, or `messages` (and `tools`) that a chat template will render.

    `kind` is text, code, chat or tools (a user's records may name others); `lang` an ISO 639-1 code, "mixed", a
    programming language, or "und"; `source` says where exactly it came from.
    """

    kind: str
    lang: str
    source: str
    licence: str
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()

    def content_bytes(self) -> bytes:
        """Everything that decides its tokens and its place in the order, as canonical JSON in UTF-8."""
        fields = [self.kind, self.lang, self.text, self.messages, self.tools]
        return json.dumps(fields, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")


def corpus_sha256(documents: Iterable[Document]) -> str:
    """SHA-256 over the documents in their order: the name under which a run records its calibration corpus."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.content_bytes()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def interleave(documents: Sequence[Document], *, seed: int) -> list[Document]:
    """The documents in an order in which any prefix has about the mixture of the whole.

    Documents are grouped by kind and language; inside its group each is drawn in an order that hashes of `seed` and
    content decide, and its place overall is the share of the group's bytes before it. So the order does not
    depend on the order given, on the platform, or on the Python version.
    """
    groups: dict[tuple[str, str], list[tuple[bytes, int, Document]]] = defaultdict(list)
    for document in documents:
        content = document.content_bytes()
        draw = hashlib.sha256(f"{seed}:".encode() + content).digest()
        groups[document.kind, document.lang].append((draw, len(content), document))
    placed: list[tuple[float, bytes, Document]] = []
    for members in groups.values():
        members.sort(key=lambda member: member[0])
        total = sum(size for _, size, _ in members)
        before = 0
        for draw, size, document in members:
            jitter = int.from_bytes(draw[:4], "little") / 2**32
            placed.append(((before + jitter * size) / total, draw, document))
            before += size
    placed.sort(key=lambda place: place[:2])
    return [document for _, _, document in placed]
