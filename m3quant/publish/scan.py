"""Secrets and machine paths in what would be published. Few false positives: every pattern has the shape of the real thing.

Findings name the kind and the place, and show at most the first characters: a report of a secret must not spread it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import parse_header
from ..checkpoint.reader import read_header
from .files import PublishFile

# Prefixes and lengths as the issuers document them; `distinct` characters tell a key from a placeholder such as hf_xxxx.
SECRETS: tuple[tuple[str, str], ...] = (
    ("Hugging Face token", r"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{30,}"),
    ("API key", r"(?<![A-Za-z0-9_-])sk-(?:[a-z]+-)*(?=[A-Za-z0-9_]*[0-9])(?=[A-Za-z0-9_]*[A-Za-z])[A-Za-z0-9_]{20,}"),
    ("API key", r"(?<![A-Za-z0-9_-])sk-ant-[a-z]+[0-9]+-[A-Za-z0-9_-]{40,}"),
    ("AWS access key", r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    ("AWS secret key", r"(?i)aws_?secret_?access_?key[\"'\s]*[:=][\"'\s]*[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])"),
    ("GitHub token", r"(?<![A-Za-z0-9_])(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,})"),
    ("Slack token", r"(?<![A-Za-z0-9])xox[abprs]-[A-Za-z0-9-]{20,}"),
    ("Google API key", r"(?<![A-Za-z0-9_-])AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
    ("private key", r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----(?:\\[rn]|\s)*[A-Za-z0-9+/=]{16,}"),
    ("JSON web token", r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    ("password in a URL", r"[a-z][a-z0-9+.-]{1,12}://[^/\s:@\"'<>]{1,64}:[^/\s:@\"'<>{}$]{3,128}@[A-Za-z0-9.-]+"),
)
# A path below a person's or a machine's own root, with at least one name after it. Not /usr, /etc or ~, which all machines have.
PATHS: tuple[tuple[str, str], ...] = (
    (
        "machine path",
        r"(?:(?<![\w./~$}-])|(?<=file://))/(?:home|Users|mnt|media|scratch|workspace)/[A-Za-z0-9._-]+(?:/[^\s\"'<>:,;)\\]*)?",
    ),
    ("machine path", r"(?:(?<![\w./~$}-])|(?<=file://))/(?:root|tmp|var/tmp)/[A-Za-z0-9._-]+[^\s\"'<>:,;)\\]*"),
    ("machine path", r"(?<![A-Za-z])[A-Za-z]:\\{1,2}Users\\{1,2}[A-Za-z0-9._ -]+"),
)
DISTINCT = 10
# Vocabularies hold every fragment of text there is; a path in one says nothing of a machine.
VOCABULARIES = frozenset({"vocab.json", "merges.txt", "added_tokens.json", "vocab.txt", "tokenizer.model"})
_SECRETS = [(kind, re.compile(pattern)) for kind, pattern in SECRETS]
_PATHS = [(kind, re.compile(pattern)) for kind, pattern in PATHS]


@dataclass(frozen=True)
class Finding:
    """Something that must not be sent. file: its path in the repo; kind: what it is; shown: a masked excerpt; line: from 1."""

    file: str
    kind: str
    shown: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.kind} ({self.shown})"


def scan(files: Iterable[PublishFile], own: Iterable[str] = ()) -> list[Finding]:
    """Findings in `files`, in order. own: strings of this machine that must appear nowhere, such as the token in use."""
    forbidden = [text for text in own if len(text) > 5]
    return [finding for file in files for finding in scan_file(file, forbidden)]


def scan_file(file: PublishFile, own: Iterable[str] = ()) -> Iterator[Finding]:
    """Findings in one file: of safetensors the header alone (tensor bytes are noise), of everything else all bytes."""
    text = _text(file.local_path).replace("\\/", "/")  # as some writers of JSON escape it
    for string in own:
        for at in _occurrences(text, string):
            yield _finding(file, "text of this machine", text, at, string)
    for kind, pattern in _SECRETS:
        for match in pattern.finditer(text):
            if len(set(match[0])) >= DISTINCT and not match[0].endswith("EXAMPLE"):
                yield _finding(file, kind, text, match.start(), match[0])
    if Path(file.path_in_repo).name in VOCABULARIES:
        return
    body = _without_vocabulary(text) if Path(file.path_in_repo).name == "tokenizer.json" else text
    for kind, pattern in _PATHS:
        for match in pattern.finditer(body):
            yield _finding(file, kind, body, match.start(), match[0])


def machine_strings(*folders: Path) -> list[str]:
    """The Hub token in use, if any, and these folders' absolute paths: nothing published may hold them."""
    from huggingface_hub import get_token

    token = get_token()
    return ([token] if token else []) + sorted({str(folder.resolve()) for folder in folders})


def _text(path: Path) -> str:
    if path.suffix == ".safetensors":
        _, raw, stamp = read_header(path)
        parse_header(raw, stamp.size, path.name, str(path))
        return raw.decode()
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8", errors="replace")


def _without_vocabulary(text: str) -> str:
    """tokenizer.json without its vocabulary and merges; the text itself where it is no such file."""
    try:
        parsed = json.loads(text)
        parsed["model"] = {k: v for k, v in parsed["model"].items() if k not in ("vocab", "merges")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return text
    return json.dumps(parsed, ensure_ascii=False, indent=0)


def _occurrences(text: str, string: str) -> Iterator[int]:
    at = text.find(string)
    while at >= 0:
        yield at
        at = text.find(string, at + 1)


def _finding(file: PublishFile, kind: str, text: str, at: int, found: str) -> Finding:
    shown = found if kind == "machine path" else f"{found[:4]}... {len(found)} characters"
    return Finding(file.path_in_repo, kind, shown[:80], text.count("\n", 0, at) + 1)
