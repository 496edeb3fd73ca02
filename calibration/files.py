"""The files that documents are read from: JSON lines, JSON, CSV, Parquet, plain text and source code, and folders of them.

Nothing is read whole but what is one document or one record, and of that at most MAX_RECORD_BYTES. Nothing here imports
torch, transformers or pyarrow before it is needed.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from m3quant.calibration.dialects import FIELDS, KNOWN, parse_record
from m3quant.calibration.documents import Document, EmptyRecord, OddRecord, Skipped
from m3quant.calibration.parquet import parquet_rows
from m3quant.errors import CalibrationError

logger = logging.getLogger(__name__)

JSON_LINES = {".jsonl", ".ndjson", ".json"}
TABLES = {".csv", ".tsv"}
TEXT = {".txt", ".md", ".rst"}
CODE = {".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".go", ".rs", ".java", ".kt", ".swift", ".cs"} | {
    ".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".sh", ".sql", ".lua", ".jl", ".scala", ".html", ".css",
}  # fmt: skip
PARQUET = ".parquet"
READABLE = "JSONL, JSON, CSV, TSV, Parquet, plain text or source code (.gz too, except Parquet)"
# One document or one record; about 16 million tokens, over ten times what a calibration uses.
MAX_RECORD_BYTES = 64 * 2**20
MAX_COLUMNS = 10_000
# UTF-32's mark begins with UTF-16's, so it is looked for first.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


def kind_of_file(path: Path) -> str | None:
    """How `read_file` reads it, by its name: "json", "table", "parquet", "text", "code", or None if it does not."""
    suffix = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if suffix in JSON_LINES:
        return "json"
    if suffix in TABLES:
        return "table"
    if suffix == PARQUET:
        return "parquet" if path.suffix.lower() == PARQUET else None
    return "text" if suffix in TEXT else "code" if suffix in CODE else None


def read_file(path: Path, skipped: Skipped) -> Iterator[Document]:
    """The documents of one file, in its order. Records that give none are counted in `skipped`.

    Raises:
        CalibrationError: the name, encoding, compression or form of the file is not one we read; says where.
    """
    kind = kind_of_file(path)
    if kind is None:
        raise CalibrationError(f"{path}: this kind of file is not read; give {READABLE}.")
    try:
        if path.stat().st_size == 0:
            raise CalibrationError(f"{path} is empty; give a file with text.")
        if kind == "parquet":
            yield from _documents(parquet_rows(path, MAX_RECORD_BYTES), skipped)
            return
        with _open(path) as stream:
            lines = _lines(path, stream)
            if kind == "json":
                yield from _documents(_json(path, lines), skipped)
            elif kind == "table":
                yield from _documents(_table(path, lines), skipped)
            else:
                yield _plain(path, lines, kind)
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise CalibrationError(f"{path} cannot be read: {error}; check the file, or fetch it again.") from error


def _documents(records: Iterable[tuple[str, object]], skipped: Skipped) -> Iterator[Document]:
    for where, record in records:
        try:
            if isinstance(record, OddRecord):
                raise record
            document = parse_record(record, where)
        except (EmptyRecord, OddRecord) as reason:
            skipped.add(reason)
            continue
        yield document


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path, stream: BinaryIO) -> Iterator[str]:
    """The lines of a file with their ends, decoded as its byte-order mark says, or from UTF-8. Raises CalibrationError."""
    head = stream.read(4)
    mark, encoding = next((found for found in MARKS if head.startswith(found[0])), (b"", "utf-8"))
    # Every other byte of UTF-16 that is mostly ASCII is NUL; text in UTF-8 has none.
    if not mark and b"\0" in head:
        raise CalibrationError(
            f"{path} has NUL bytes at its start: it is UTF-16 without a byte-order mark, or no text; convert it with "
            f"iconv -f UTF-16LE -t UTF-8 (or UTF-16BE), or give a text file."
        )
    stream.seek(0)
    if encoding == "utf-8":
        stream.seek(len(mark))
        yield from _utf8_lines(path, stream)
        return
    wide = io.TextIOWrapper(stream, encoding=encoding, newline="")
    try:
        for number, line in enumerate(iter(lambda: wide.readline(MAX_RECORD_BYTES), ""), 1):
            _check_line(path, number, len(line))
            yield line
    except UnicodeError as error:
        raise CalibrationError(
            f"{path} begins with the byte-order mark of {encoding.upper()} and is not {encoding.upper()} throughout "
            f"({error}); save it again as UTF-8."
        ) from error


def _utf8_lines(path: Path, stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: stream.readline(MAX_RECORD_BYTES), b""), 1):
        _check_line(path, number, len(line))
        where = f"{path}, line {number}"
        if b"\0" in line:
            raise CalibrationError(
                f"{where} has a NUL byte: this is no text, or UTF-16 that was converted as if it were another encoding; give "
                f"a text file, or save the original as UTF-8."
            )
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"{where}: byte {error.start} (0x{line[error.start]:02x}) is not UTF-8; convert the file from the "
                f"encoding it was written in, for instance with iconv -f WINDOWS-1252 -t UTF-8."
            ) from error


def _check_line(path: Path, number: int, size: int) -> None:
    if size >= MAX_RECORD_BYTES:
        raise CalibrationError(
            f"{path}, line {number} is longer than {MAX_RECORD_BYTES // 2**20} MiB; give one document a line or file."
        )


def _check_value(path: Path, size: int, what: str) -> None:
    if size > MAX_RECORD_BYTES:
        raise CalibrationError(
            f"{path} is {what} of more than {MAX_RECORD_BYTES // 2**20} MiB; give JSON lines, or several files."
        )


def _plain(path: Path, lines: Iterator[str], kind: str) -> Document:
    taken, size = [], 0
    for line in lines:
        size += len(line)
        _check_value(path, size, "one document")
        taken.append(line)
    text = "".join(taken).removeprefix("\ufeff")
    if not text.strip():
        raise CalibrationError(f"{path} holds only white space; give a file with text.")
    return Document(kind=kind, lang="und", source=str(path), licence="not stated", text=text)


def _json(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, object]]:
    """(where, record) of JSON lines, of one array, or of one object that is a record or holds a list of them."""
    numbered = ((number, text) for number, line in enumerate(lines, 1) if (text := line.removeprefix("\ufeff")).strip())
    first, second = next(numbered, None), next(numbered, None)
    if first is None:
        raise CalibrationError(f"{path} holds no record; give one JSON object a line.")
    head = [first] if second is None else [first, second]
    value = _json_value(first[1], f"{path}, line {first[0]}")
    if second is None:
        yield from _whole(path, value, f"{path}, line {first[0]}")
        return
    if isinstance(value, OddRecord) and isinstance(_json_value(second[1], str(path)), OddRecord | list):
        # Not a damaged first line: one value over many lines, if these make one.
        head += [*_taken(path, numbered)]
        whole = _json_value("".join(text for _, text in head), str(path))
        if not isinstance(whole, OddRecord):
            yield from _whole(path, whole, str(path))
            return
    for number, text in itertools.chain(head, numbered):
        yield f"{path}, line {number}", _json_value(text, f"{path}, line {number}")


def _taken(path: Path, numbered: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    size = 0
    for number, text in numbered:
        size += len(text)
        _check_value(path, size, "one JSON value")
        yield number, text


def _json_value(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return OddRecord(f"{where} is not JSON ({error}); give one object a line, or one array.")


def _whole(path: Path, value: object, where: str) -> Iterator[tuple[str, object]]:
    """The records of a file that is one JSON value."""
    if isinstance(value, Mapping) and not (KNOWN - {"data"}) & set(value):  # {"data": [...]}, as some exports wrap them
        lists = [item for item in value.values() if isinstance(item, list) and not _is_conversation(item)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list) or _is_conversation(value):
        yield where, value
        return
    for number, record in enumerate(value, 1):
        yield f"{path}, record {number}", record


def _is_conversation(items: list[Any]) -> bool:
    """Whether the whole array is one conversation: its items are messages, or what each side said in turn."""
    return bool(items) and all(
        isinstance(item, str) or (isinstance(item, Mapping) and bool({"role", "from"} & set(item))) for item in items
    )


def _table(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, object]]:
    """(where, record) of a CSV or TSV file with a header line. Cells that are empty count as absent."""
    header = next(lines, "").removeprefix("\ufeff")
    columns: list[str] = []
    delimiter = ","
    for candidate in ("\t", ",", ";", "|"):
        found = [name.strip().lower() for name in next(csv.reader([header], delimiter=candidate), [])]
        if KNOWN & set(found):
            columns, delimiter = found, candidate
            break
    if not columns:
        raise CalibrationError(
            f"{path}: its first line, {header.strip()[:200]!r}, names no column that we read; it needs a header line with {FIELDS}."
        )
    if len(columns) > MAX_COLUMNS:
        raise CalibrationError(
            f"{path} has {len(columns):,} columns, no table of text has more than {MAX_COLUMNS:,}; check the file."
        )
    before = csv.field_size_limit(MAX_RECORD_BYTES)  # its default, 128 KiB, is less than many documents
    size = 0

    def counted() -> Iterator[str]:
        """The lines of one row: a quote that does not close takes in all that follow."""
        nonlocal size
        for line in lines:
            size += len(line)
            if size > MAX_RECORD_BYTES:
                raise CalibrationError(
                    f"{path}, row {number} has more than {MAX_RECORD_BYTES // 2**20} MiB: a quote does not close, or one document is "
                    "that large; give one document a row."
                )
            yield line

    try:
        rows = csv.reader(counted(), delimiter=delimiter, strict=True)
        for number in itertools.count(1):
            where, size = f"{path}, row {number}", 0
            try:
                row = next(rows, None)
            except csv.Error as error:  # a quote that does not close, or one in the middle of a cell
                yield where, OddRecord(f"{where}: {error}.")
                continue
            if row is None:
                return
            if len(row) > len(columns):
                yield where, OddRecord(f"{where} has {len(row)} cells, and the header {len(columns)}.")
            elif any(cell.strip() for cell in row):
                yield where, {name: cell or None for name, cell in zip(columns, row, strict=False)}
    finally:
        csv.field_size_limit(before)


def read_folder(folder: Path, skipped: Skipped) -> Iterator[Document]:
    """The documents of every readable file below `folder`, in the order of names; others are logged and left out."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    readable = [path for path in files if kind_of_file(path)]
    if not readable:
        raise CalibrationError(f"{folder} has no file that we read; put {READABLE} into it.")
    if len(readable) < len(files):
        known = set(readable)
        left_out = [str(path.relative_to(folder)) for path in files if path not in known]
        logger.warning("%s: %d files are not text and are left out: %s", folder, len(left_out), ", ".join(left_out[:5]))
    for path in readable:
        yield from read_file(path, skipped)
