"""Assembles the training corpus from freely licensed text that packages carry, tokenizes it and splits it by document.

    apt-get download python3.11-doc r-cran-janeaustenr postgresql-doc-15 python-django-doc jargon-text rust-doc \
        python3-sympy python3-networkx python3-django python3-numpy r-cran-tokenizers
    # dpkg -x each of them into its own folder of PACKAGES
    python -m tests.training.corpus PACKAGES build/fixtures

Writes tokenizer.json, train.npz (uint16 tokens), heldout.txt (a mixture of held-out documents, shipped with the
fixtures), calibration.jsonl (other held-out documents, shipped too), and meta.json (counts, licences, trigram baseline)
into the output folder. CPU only, a few minutes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html.parser
import json
import random
import re
import struct
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.training import ngram
from tests.training import tokenizer as tok

HELD_OUT_NOVEL = "Persuasion"
HELD_OUT_SHARE = 40  # one document in 40 is held out
GRAM_WORDS = 13  # texts that share a run of so many words share a passage
PIECE_CHARACTERS = 12_000
# Near copies of training documents are no held-out text: at most this share of a document's 13-grams may be in training.
MAX_TRAINED_SHARE = 0.1
CALIBRATION_CHARACTERS = {
    "melville": 90_000,
    "python-docs": 50_000,
    "stdlib": 40_000,
    "django": 15_000,
    "sympy": 10_000,
}
KINDS = {"melville": ("text", "en", "public-domain"), "python-docs": ("text", "en", "PSF-2.0")} | {
    "stdlib": ("code", "python", "PSF-2.0"), "django": ("code", "python", "BSD-3-Clause"), "sympy": ("code", "python", "BSD-3-Clause"),
}  # fmt: skip
RUST_BOOKS = ("book", "reference", "rust-by-example", "nomicon", "edition-guide", "embedded-book", "rustc", "cargo")


@dataclass(frozen=True)
class Document:
    source: str
    name: str
    text: str


_BLOCK_TAGS = "p div li h1 h2 h3 h4 h5 h6 tr dt dd pre br table ul ol dl section article"
_SKIPPED_TAGS = "script style nav head header footer form button svg title"


class _HtmlText(html.parser.HTMLParser):
    """Visible text of a documentation page: block tags break lines, `pre` keeps its spaces, navigation is left out."""

    BLOCK = frozenset(_BLOCK_TAGS.split())
    SKIP = frozenset(_SKIPPED_TAGS.split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skip = 0
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skip += tag in self.SKIP
        self.pre += tag == "pre"
        if tag in self.BLOCK:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skip -= tag in self.SKIP and self.skip > 0
        self.pre -= tag == "pre" and self.pre > 0
        if tag in self.BLOCK:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skip:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    parser = _HtmlText()
    parser.feed(page)
    lines = [line.rstrip() for line in "".join(parser.parts).replace("¶", "").split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def r_strings(rdb: Path) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database: zlib blocks behind a 4-byte length, XDR-serialized strings."""
    blob, at = rdb.read_bytes(), 0
    while at < len(blob):
        inflate = zlib.decompressobj()
        raw = inflate.decompress(blob[at + 4 :])
        at = len(blob) - len(inflate.unused_data)
        (count,) = struct.unpack_from(">i", raw, 27)  # after 14 bytes of version, 9 of native encoding, 4 of type
        pos, strings = 31, []
        for _ in range(count):
            _, size = struct.unpack_from(">ii", raw, pos)
            strings.append(raw[pos + 8 : pos + 8 + max(size, 0)].decode("utf-8", "replace"))
            pos += 8 + max(size, 0)
        yield strings


def novels(rdb: Path) -> Iterator[Document]:
    for lines in r_strings(rdb):
        yield Document("austen", lines[0].strip().title(), "\n".join(lines) + "\n")


def chapters(rdb: Path) -> Iterator[Document]:
    """Moby-Dick by chapters, without what its distributor put before and after it. The models never saw it."""
    text = next(r_strings(rdb))[0].replace("\r\n", "\n")
    text = text[text.index("\nCHAPTER 1. ") : text.index("\nEpilogue\n")]
    for chapter in re.split(r"\n(?=CHAPTER \d+\. )", text)[1:]:
        yield Document("melville", "Moby-Dick, " + chapter.split(".")[0].lower(), chapter.strip() + "\n")


def _files(root: Path, pattern: str) -> Iterator[Path]:
    yield from sorted(p for p in root.rglob(pattern) if p.is_file() and not p.is_symlink())


def documents(packages: Path) -> Iterator[Document]:
    """Every document of the corpus. Licences: docs and standard library PSF, Django/SymPy/NetworkX/NumPy BSD-3-Clause,
    PostgreSQL manual PostgreSQL licence, Rust books MIT or Apache-2.0, Jargon File and Austen public domain."""
    docs = packages / "python3.11-doc"
    for path in _files(docs, "*.rst.txt"):
        yield Document("python-docs", str(path.relative_to(docs)), path.read_text("utf-8", "replace"))
    for source, folder in (("postgresql-docs", "postgresql-doc-15"), ("django-docs", "python-django-doc")):
        for path in _files(packages / folder, "*.html"):
            if "genindex" in path.name or "_modules" in path.parts or "releases" in path.parts:
                continue
            yield Document(source, path.name, html_text(path.read_text("utf-8", "replace")))
    rust = packages / "rust-doc/usr/share/doc/rust-doc/html"
    for book in RUST_BOOKS:
        for path in _files(rust / book, "*.html"):
            if path.name not in ("print.html", "toc.html"):
                yield Document("rust-books", f"{book}/{path.name}", html_text(path.read_text("utf-8", "replace")))
    jargon = packages / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz"
    yield Document("jargon", jargon.name, gzip.decompress(jargon.read_bytes()).decode("utf-8", "replace"))
    yield from novels(next((packages / "r-cran-janeaustenr").rglob("Rdata.rdb")))
    code = [("stdlib", Path(sysconfig.get_paths()["stdlib"]))]
    for name in ("sympy", "networkx", "django", "numpy"):
        code.append((name, packages / f"python3-{name}/usr/lib/python3/dist-packages/{name}"))
    for source, root in code:
        for path in _files(root, "*.py"):
            inside = path.relative_to(root).parts
            if {"site-packages", "test", "idlelib", "lib2to3", "encodings", "conf"} & set(inside):
                continue
            text = path.read_text("utf-8", "replace")
            if (source == "sympy" and "tests" in inside) or len(text) > 400_000:
                continue
            yield Document(source, "/".join(inside), text)


def held_out(doc: Document) -> bool:
    if doc.source == "austen":
        return doc.name == HELD_OUT_NOVEL
    return int(hashlib.sha256(f"{doc.source}/{doc.name}".encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def heldout_mixture(docs: list[Document], seed: int = 0) -> str:
    """About 200 kB: pieces of up to 12 kB of held-out documents, by source in fixed shares, shuffled."""
    rng = random.Random(seed)
    budget = {"austen": 90_000, "python-docs": 50_000, "stdlib": 40_000, "django-docs": 15_000, "sympy": 10_000}
    pieces = []
    for source, want in budget.items():
        pool = [d for d in docs if d.source == source and len(d.text) > 3_000]
        rng.shuffle(pool)
        if source == "austen":
            text = pool[0].text
            pieces += [text[i : i + 15_000] for i in range(40_000, 40_000 + want, 15_000)]
            continue
        for doc in pool:
            piece = doc.text[:12_000]
            if want <= 0:
                break
            pieces.append(piece)
            want -= len(piece)
    rng.shuffle(pieces)
    return "\n\n".join(p.strip() for p in pieces) + "\n"


def grams(text: str) -> set[tuple[str, ...]]:
    """Every run of 13 words, without case and punctuation."""
    words = [word.lower() for word in re.findall(r"\w+", text)]
    return set(zip(*(words[i:] for i in range(GRAM_WORDS)), strict=False))


def calibration_documents(heldout: list[Document], training: list[Document], evaluation: str) -> list[Document]:
    """About 200 kB of text of the same kinds as `evaluation` (heldout.txt), from documents that it has nothing of.

    `heldout` are the held-out documents and the chapters of the novel. A document is left out if it shares one run of
    13 words with `evaluation`, or more than a tenth of its runs with the training text. In pieces of up to 12 kB.
    """
    pool = [d for d in heldout if d.source in CALIBRATION_CHARACTERS and len(d.text) > 2_000]
    evaluation_grams = grams(evaluation)
    pool_grams = {d: found for d in pool if not (found := grams(d.text)) & evaluation_grams}
    wanted = set().union(*pool_grams.values())
    seen = set().union(*(grams(d.text) & wanted for d in training))
    trained = {d: len(found & seen) / len(found) for d, found in pool_grams.items()}
    chosen: list[Document] = []
    for source, want in CALIBRATION_CHARACTERS.items():
        new = [d for d in pool_grams if d.source == source and trained[d] <= MAX_TRAINED_SHARE]
        random.Random(0).shuffle(new)
        for piece in (p for d in new for p in pieces(d)):
            if want <= 0:
                break
            chosen.append(piece)
            want -= len(piece.text)
    return chosen


def pieces(doc: Document) -> Iterator[Document]:
    """`doc` cut at ends of lines, at most 12,000 characters each."""
    start = 0
    while start < len(doc.text):
        end = min(start + PIECE_CHARACTERS, len(doc.text))
        end = end if end == len(doc.text) else doc.text.rindex("\n", start, end) + 1
        yield Document(doc.source, f"{doc.name}, characters {start}-{end}", doc.text[start:end])
        start = end


def record(doc: Document) -> dict[str, str]:
    kind, lang, licence = KINDS[doc.source]
    return {"kind": kind, "lang": lang, "source": f"{doc.source}/{doc.name}", "licence": licence, "text": doc.text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    docs = list(documents(args.packages))
    train = [d for d in docs if not held_out(d)]
    random.Random(0).shuffle(train)
    kept_out = [d for d in docs if held_out(d)]
    heldout = heldout_mixture(kept_out)
    (args.out / "heldout.txt").write_text(heldout, "utf-8")
    novel = chapters(next((args.packages / "r-cran-tokenizers").rglob("Rdata.rdb")))
    calibration = calibration_documents([*kept_out, *novel], train, heldout)
    lines = [json.dumps(record(d), ensure_ascii=False) for d in calibration]
    (args.out / "calibration.jsonl").write_text("\n".join(lines) + "\n", "utf-8")

    tok.train([d.text for d in train], args.out / "tokenizer.json")
    encode = tok.load(args.out / "tokenizer.json")
    bos = encode.token_to_id(tok.BOS)
    ids: list[np.ndarray] = []
    for start in range(0, len(train), 256):
        for enc in encode.encode_batch([d.text for d in train[start : start + 256]], add_special_tokens=False):
            ids.append(np.array([bos, *enc.ids], np.uint16))
    tokens = np.concatenate(ids)
    held = np.array(encode.encode(heldout, add_special_tokens=False).ids, np.uint16)
    np.savez_compressed(args.out / "train.npz", train=tokens, heldout=held)
    sources = {s: sum(len(d.text.encode()) for d in train if d.source == s) for s in sorted({d.source for d in docs})}
    meta = {
        "train_tokens": int(tokens.size),
        "train_documents": len(train),
        "train_bytes_by_source": sources,
        "heldout_bytes": len(heldout.encode()),
        "heldout_tokens": int(held.size),
        "heldout_sha256": hashlib.sha256(heldout.encode()).hexdigest(),
        "trigram": ngram.kneser_ney_perplexity(tokens, held, tok.VOCAB_SIZE),
    }
    (args.out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    print(json.dumps(meta, indent=1))


if __name__ == "__main__":
    main()
