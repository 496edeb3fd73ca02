"""Build the bundled evaluation texts, `texts.jsonl`, from freely licensed Debian packages.

    python m3quant/evaluate/data/build.py PACKAGES_FOLDER          # the archives that sources.yaml names

Only a maintainer who changes the texts runs this: the same archives (checked by SHA-256) give the same bytes. Paragraphs
that the calibration corpus has too, by any 50 characters, are left out. Reading archives and pages is the calibration
corpus's code.
"""

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3quant.calibration.corpus import load_documents
from m3quant.calibration.documents import Document, interleave
from m3quant.checkpoint.bounded import read_yaml

HERE = Path(__file__).parent
DOCUMENT_BYTES = 20_000  # long enough for lm-eval's rolling windows to roll
ORDER_SEED = 0
SHINGLE = 50


def _calibration_build() -> Any:
    """calibration/data/build.py: a script, not a module of the package."""
    path = HERE.parents[2] / "calibration" / "data" / "build.py"
    spec = importlib.util.spec_from_file_location("calibration_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shingles(text: str) -> Iterator[str]:
    """Every run of 50 characters, white space taken as one space."""
    plain = " ".join(text.split())
    return (plain[i : i + SHINGLE] for i in range(len(plain) - SHINGLE + 1))


def without_shared(text: str, taken: set[str]) -> str:
    """The text without paragraphs that have a part in a shingle in common with the calibration corpus."""
    paragraphs = text.split("\n\n")
    while True:
        plain = [" ".join(p.split()) for p in paragraphs]
        owner = [number for number, p in enumerate(plain) for _ in range(len(p) + 1)]
        joined = " ".join(plain)
        shared = [i for i in range(len(joined) - SHINGLE + 1) if joined[i : i + SHINGLE] in taken]
        out = {number for i in shared for number in owner[i : i + SHINGLE]}
        if not out:
            return "\n\n".join(paragraphs)
        paragraphs = [p for number, p in enumerate(paragraphs) if number not in out]


def build(packages: Path) -> list[Document]:
    tools = _calibration_build()
    taken: set[str] = set()
    for document in load_documents(None):
        taken.update(shingles(document.content_bytes().decode() if document.text is None else document.text))
    documents: list[Document] = []
    for name, spec in read_yaml(HERE / "sources.yaml", "sources").items():
        path = packages / spec["file"]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != spec["sha256"]:
            raise SystemExit(f"{path} has SHA-256 {digest}; sources.yaml says {spec['sha256']}")
        with tools.open_archive(path) as archive:
            if "licence_member" in spec:
                notice = tools.member_bytes(archive, spec["licence_member"])
                (HERE / "licences" / f"{name}.txt").write_bytes(notice)
            for entry in spec["texts"]:
                documents += _documents(tools, name, spec, entry, archive, taken)
    # English and code first, mixed: that is what a few windows from the start are then of.
    other = [d for d in documents if d.kind == "text" and d.lang != "en"]
    first = [d for d in documents if d not in other]
    return [*interleave(first, seed=ORDER_SEED), *interleave(other, seed=ORDER_SEED)]


def _documents(
    tools: Any, name: str, spec: dict[str, Any], entry: dict[str, Any], archive: Any, taken: set[str]
) -> Iterator[Document]:
    data = tools.member_bytes(archive, entry["member"])
    reader = tools.READERS[entry.get("reader", spec.get("reader", "plain"))]
    text = tools.read_janeaustenr(data, entry["novel"]) if "novel" in entry else reader(data)
    first = text.index(entry["start"]) if "start" in entry else 0
    left = entry.get("bytes", len(text.encode()))
    title = entry.get("title", f"{spec['title']}, {Path(entry['member']).name}")
    for offset, piece in tools.cut(text[first:], DOCUMENT_BYTES):
        if left < DOCUMENT_BYTES // 2 and offset:
            return
        left -= len(piece.encode())
        kept = without_shared(piece, taken).strip("\n")
        if len(kept) < 1000:
            continue
        begin = first + offset
        source = f"{title}; {name}: {entry['member']}, characters {begin}-{begin + len(piece)}"
        yield Document(
            entry["kind"] if "kind" in entry else spec["kind"], entry["lang"], source, spec["licence"], text=kept
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder with the archives that sources.yaml names")
    documents = build(parser.parse_args().packages)
    records = (
        {"kind": d.kind, "lang": d.lang, "source": d.source, "licence": d.licence, "text": d.text} for d in documents
    )
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    (HERE / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(documents)} documents, {(HERE / 'texts.jsonl').stat().st_size} bytes")


if __name__ == "__main__":
    main()
