"""Secrets, machine paths, hosts and people in what would be published, over decoded text, archives and tensor metadata.

Findings name the kind and the place, and show at most the first characters: a report of a secret must not spread it.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

from ...checkpoint import parse_header
from ...checkpoint.bounded import TOKENIZER_BYTES, read_bounded
from ...checkpoint.reader import open_file, read_header
from ...errors import PublishError
from ..files import PublishFile
from .allow import Allowed, shipped
from .decoding import Budget, Unread, View, views
from .hosts import KINDS as OF_A_MACHINE
from .hosts import PERSON
from .hosts import RULES as MACHINE
from .lists import REPEATING, without_repeats
from .rules import ISSUED, assigned, library_matches

# Vocabularies hold every fragment of text there is; a path in one says nothing of a machine.
VOCABULARIES = frozenset({"vocab.json", "merges.txt", "added_tokens.json", "vocab.txt", "tokenizer.model"})
# Regexes of the library are not all linear: each looks at this much at once.
WINDOW, OVERLAP = 8192, 1024
FILE_SECONDS = 1800.0  # a megabyte of text takes about 4 s on one core
MOST_FINDINGS = 50  # of one file
UNREAD = "not looked into"
OWN_TEXT = "text of this machine"
_SECRET_VARIABLE = re.compile(r"(?i)(?:token|secret|passw(?:or)?d|api_?key|access_?key|private_?key)$")
_ASCII_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)
LEAST_OWN = 6
LEAST_OWN_SECRET = 12


@dataclass(frozen=True)
class Finding:
    """Something that must not be sent. file: its path in the repo; kind: what it is; shown: a masked excerpt; line: from 1.

    where: how it was reached inside the file ("" for its plain text); found: the text itself, for the allow list, never shown.
    """

    file: str
    kind: str
    shown: str
    line: int
    where: str = ""
    found: str = ""

    def __str__(self) -> str:
        inside = f", in {self.where}" if self.where else ""
        return f"{self.file}, line {self.line}{inside}: {self.kind} ({self.shown})"


def scan(files: Iterable[PublishFile], own: Iterable[str] = (), allowed: Allowed | None = None) -> list[Finding]:
    """Findings in `files`, in order. own: strings of this machine that must appear nowhere, such as the token in use.

    allowed: what is known to be harmless, each with a reason; the list that ships with m3quant where none is given.
    """
    forbidden = [text for text in own if len(text) >= LEAST_OWN]
    known = allowed or shipped()
    return [f for file in files for f in scan_file(file, forbidden) if not known.allows(f.file, f.kind, f.found)]


def scan_file(file: PublishFile, own: Iterable[str] = ()) -> Iterator[Finding]:
    """Findings in one file, each once: of safetensors the header alone (tensor bytes are noise), of everything else all bytes."""
    own = list(own)
    seen: dict[str, list[str]] = {}
    count, ends = 0, time.monotonic() + FILE_SECONDS
    try:
        for view, vocabulary in _views(file, own):
            for kind, at, found in _matches(view.text, own, vocabulary, ends):
                if _seen(seen, kind, found):
                    continue
                count += 1
                if count > MOST_FINDINGS:
                    yield _unread(file, f"more than {MOST_FINDINGS} findings")
                    return
                line = view.line + view.text.count("\n", 0, at)
                yield Finding(file.path_in_repo, kind, _shown(kind, found), line, view.where, found)
    except Unread as reason:
        yield _unread(file, str(reason))


def machine_strings(*folders: Path) -> list[str]:
    """What must be in nothing published: the Hub token in use, secrets of the environment, these folders, home, this host's name."""
    from huggingface_hub import get_token

    token = get_token()
    secrets = {v for k, v in os.environ.items() if _SECRET_VARIABLE.search(k) and len(v) >= LEAST_OWN_SECRET}
    host = socket.gethostname()
    named = {host} if re.search(r"[0-9-]", host) and len(host) >= LEAST_OWN else set()
    return sorted({*([token] if token else []), *secrets, *named, *(str(folder.resolve()) for folder in folders)})


def _views(file: PublishFile, own: list[str]) -> Iterator[tuple[View, bool]]:
    """Texts of a file, and whether only rules that hold in vocabularies are meant for it."""
    name = Path(file.path_in_repo).name
    if file.local_path.suffix == ".safetensors":
        _, raw, stamp = read_header(file.local_path)
        parse_header(raw, stamp.size, file.local_path.name, str(file.local_path))
        yield from ((view, False) for view in views(io.BytesIO(raw), "", Budget()))
        return
    vocabulary = name in VOCABULARIES
    body = None
    if name == "tokenizer.json":
        raw = read_bounded(file.local_path, TOKENIZER_BYTES, error=PublishError)
        body = _without_vocabulary(raw)
        vocabulary = body is not None
    with open_file(file.local_path) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as stream:
        text = without_repeats(stream, own, _tells) if file.path_in_repo in REPEATING else stream
        yield from ((view, vocabulary) for view in views(text, "", Budget()))
    if body is not None:
        yield from ((view, False) for view in views(io.BytesIO(body), "", Budget()))


def _without_vocabulary(raw: bytes) -> bytes | None:
    """tokenizer.json without its vocabulary and merges; None where it is no such file."""
    try:
        parsed = json.loads(raw)
        parsed["model"] = {k: v for k, v in parsed["model"].items() if k not in ("vocab", "merges")}
        return json.dumps(parsed, ensure_ascii=False, indent=0).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _matches(text: str, own: list[str], vocabulary: bool, ends: float) -> Iterator[tuple[str, int, str]]:
    """(kind, place, text) of everything in one text."""
    lowered = text.lower()
    if len(lowered) != len(text):  # a few letters grow, and places must stay; hints are ASCII
        lowered = text.translate(_ASCII_LOWER)
    for string in own:
        if (at := text.find(string)) >= 0:
            yield OWN_TEXT, at, string
    # Most rules are out at once: none of their hints is anywhere, and a list of tensors has thousands of windows.
    meant = [rule for rule in ISSUED if rule.vocabulary] if vocabulary else [*ISSUED, *MACHINE]
    rules = [rule for rule in meant if rule.may_match(lowered)]
    for start in range(0, len(text), WINDOW):
        if time.monotonic() > ends:
            raise Unread(f"looking through it took more than {FILE_SECONDS:.0f} s")
        # Rules look behind a match: the window begins before the part that it answers for.
        begin, end = max(0, start - OVERLAP), start + WINDOW + OVERLAP
        window, low = text[begin:end], lowered[begin:end]
        for rule in rules:
            for at, found in rule.matches(window, low):
                yield rule.kind, begin + at, found
        if not vocabulary:
            for at, found in assigned(window, low):
                yield "assigned secret", begin + at, found
        for kind, at, found in library_matches(window, low):
            yield kind, begin + at, found


def _tells(line: str) -> bool:
    """Whether anything is found in a line by itself."""
    return next(_matches(line, [], False, math.inf), None) is not None


def _seen(seen: dict[str, list[str]], kind: str, found: str) -> bool:
    """Whether this was found before, also as part of something longer, or by another rule for keys."""
    plain = re.sub(r"[\\/]+", "/", found)
    group = kind if kind in OF_A_MACHINE or kind == OWN_TEXT else "secret"
    before = seen.setdefault(group, [])
    if any(plain in other or (group == kind and other in plain) for other in before):
        return True
    before.append(plain)
    return False


def _shown(kind: str, found: str) -> str:
    text = found if kind in OF_A_MACHINE - {PERSON} else f"{found[:4]}... {len(found)} characters"
    return "".join(c if c.isprintable() else "?" for c in text[:80])


def _unread(file: PublishFile, reason: str) -> Finding:
    return Finding(file.path_in_repo, UNREAD, reason, 1, "", reason)


__all__ = ["OF_A_MACHINE", "Allowed", "Finding", "machine_strings", "scan", "scan_file"]
