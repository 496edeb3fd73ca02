"""Calibration documents: what one is, how a record becomes one, and the files they are read from.

Nothing here imports torch, transformers or pyarrow before it is needed.
"""

import gzip
import hashlib
import json
import logging
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from m3quant.errors import CalibrationError

logger = logging.getLogger(__name__)

JSON_LINES = {".jsonl", ".ndjson", ".json"}
TEXT = {".txt", ".md", ".rst"}
CODE = {".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".go", ".rs", ".java", ".kt", ".swift", ".cs"} | {
    ".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".sh", ".sql", ".lua", ".jl", ".scala", ".html", ".css",
}  # fmt: skip
PARQUET = ".parquet"
READABLE = "JSONL, JSON, Parquet, plain text or source code (.gz too, except Parquet)"
FIELDS = 'a string "text", or a list "messages" or "conversations"'
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


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
    content decide, and its place overall is the share of the group's bytes that lie before it. So the order does not
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


def parse_record(record: object, where: str) -> Document:
    """As `_record`. Raises CalibrationError too for half of a surrogate pair, which JSON can escape and no tokenizer takes."""
    document = _record(record, where)
    try:
        document.content_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise CalibrationError(
            f"{where} holds half of a surrogate pair (\\ud800 to \\udfff): write the character whole."
        ) from None
    return document


def _record(record: object, where: str) -> Document:
    """A document from one JSON or Parquet record; `where` names file and line in errors and as the default source.

    Raises:
        CalibrationError: the record is no object, or has none of the fields we read, or an empty or malformed one.
    """
    if not isinstance(record, Mapping):
        raise CalibrationError(f"{where}: the record is {type(record).__name__}, not an object with {FIELDS}.")
    lang = str(record.get("lang") or "und")
    source = str(record.get("source") or where)
    licence = str(record.get("licence") or record.get("license") or "not stated")
    text = record.get("text")
    if text is not None:
        if not isinstance(text, str) or not text.strip():
            raise CalibrationError(f'{where}: "text" is empty or not a string; give it text or remove the record.')
        return Document(str(record.get("kind") or "text"), lang, source, licence, text=text)
    for field in ("messages", "conversations"):
        if record.get(field) is not None:
            messages = _messages(record[field], f'{where}: "{field}"')
            tools = _tools(record.get("tools"), where)
            kind = str(record.get("kind") or ("tools" if tools else "chat"))
            return Document(kind, lang, source, licence, messages=messages, tools=tools)
    present = ", ".join(map(str, record)) or "nothing"
    raise CalibrationError(f"{where}: the record has the fields {present}, but none that we read: it needs {FIELDS}.")


def _messages(value: object, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise CalibrationError(f"{where} must be a list of messages that is not empty.")
    return tuple(_message(item, f"{where}, message {number}") for number, item in enumerate(value, 1))


def _message(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise CalibrationError(f'{where} is not an object with "role" and "content".')
    message = {key: item for key, item in value.items() if item is not None}
    if isinstance(message.get("from"), str) and "role" not in message:  # the ShareGPT spelling
        speaker = message.pop("from")
        message = {"role": SHAREGPT_ROLES.get(speaker, speaker), "content": message.pop("value", ""), **message}
    if not isinstance(message.get("role"), str):
        raise CalibrationError(f'{where} has no "role" (or "from").')
    content = message.get("content", "")
    if not isinstance(content, str) and not (
        isinstance(content, list) and all(isinstance(p, Mapping) for p in content)
    ):
        raise CalibrationError(f'{where}: "content" must be a string or a list of parts.')
    if "content" not in message and not message.get("tool_calls"):
        raise CalibrationError(f'{where} has neither "content" nor "tool_calls".')
    message.setdefault("content", "")  # templates differ in whether they survive a message without it
    if message.get("tool_calls"):
        if not isinstance(message["tool_calls"], list):
            raise CalibrationError(f'{where}: "tool_calls" must be a list.')
        message["tool_calls"] = [_tool_call(call, where) for call in message["tool_calls"]]
    return message


def _tool_call(value: object, where: str) -> dict[str, Any]:
    call = value if isinstance(value, Mapping) else {}
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise CalibrationError(f'{where}: a tool call needs "function" with "name" and "arguments".')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # the wire form of the OpenAI API; chat templates want the object
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{where}: the arguments of {function['name']} are not JSON ({error}).") from error
    outer = {key: item for key, item in call.items() if key in ("id", "type") and item is not None}
    return {"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments}}


def _tools(value: object, where: str) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise CalibrationError(f'{where}: "tools" is a string, but not JSON ({error}).') from error
    if value is None:
        return ()
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise CalibrationError(f'{where}: "tools" must be a list of function schemas.')
    return tuple(dict(tool) for tool in value)


def kind_of_file(path: Path) -> str | None:
    """How `read_file` reads it, by its name: "json", "parquet", "text", "code", or None if it does not."""
    suffix = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if suffix in JSON_LINES:
        return "json"
    if suffix == PARQUET:
        return "parquet" if path.suffix.lower() == PARQUET else None
    return "text" if suffix in TEXT else "code" if suffix in CODE else None


def read_file(path: Path) -> Iterator[Document]:
    """The documents of one file, in its order.

    Raises:
        CalibrationError: the name, encoding, compression or content is not one we read; says which line.
    """
    kind = kind_of_file(path)
    if kind is None:
        raise CalibrationError(f"{path}: this kind of file is not read; give {READABLE}.")
    try:
        if path.stat().st_size == 0:
            raise CalibrationError(f"{path} is empty; give a file with text.")
        if kind == "parquet":
            yield from _parquet(path)
            return
        with _open(path) as stream:
            yield from _json(path, stream) if kind == "json" else _plain(path, stream, kind)
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise CalibrationError(f"{path} cannot be read: {error}; check the file, or fetch it again.") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{where}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; convert the file, for "
            f"instance with iconv -f LATIN1 -t UTF-8."
        ) from error


def _plain(path: Path, stream: BinaryIO, kind: str) -> Iterator[Document]:
    lines = [_decode(line, f"{path}, line {number}") for number, line in enumerate(stream, 1)]
    text = "".join(lines).removeprefix("\ufeff")
    if not text.strip():
        raise CalibrationError(f"{path} holds only white space; give a file with text.")
    yield Document(kind=kind, lang="und", source=str(path), licence="not stated", text=text)


def _json(path: Path, stream: BinaryIO) -> Iterator[Document]:
    first = next((line for line in stream if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    stream.seek(0)
    if first.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        for number, record in enumerate(_json_value(stream.read(), str(path)), 1):
            yield parse_record(record, f"{path}, record {number}")
        return
    found = False
    for number, line in enumerate(stream, 1):
        where = f"{path}, line {number}"
        if line.strip(b"\xef\xbb\xbf \t\r\n"):
            yield parse_record(_json_value(line, where), where)
            found = True
    if not found:
        raise CalibrationError(f"{path} holds no record; give one JSON object a line.")


def _json_value(data: bytes, where: str) -> Any:
    try:
        return json.loads(_decode(data, where).removeprefix("\ufeff"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CalibrationError(f"{where} is not JSON ({error}); give one object a line, or one array.") from error


def _parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CalibrationError(
            f"{path}: reading Parquet needs pyarrow; install it with pip install 'm3quant[data]'."
        ) from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = table.schema_arrow.names
        if not {"text", "messages", "conversations"} & set(columns):
            raise CalibrationError(f"{path} has the columns {', '.join(columns)}; it needs {FIELDS}.")
        number = 0
        for batch in table.iter_batches(batch_size=256):
            for record in batch.to_pylist():
                number += 1
                yield parse_record(record, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{path} is not a readable Parquet file: {error}; fetch or write it again.") from error
    if not number:
        raise CalibrationError(f"{path} has no rows; give a file with text.")


def read_folder(folder: Path) -> Iterator[Document]:
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
        left_out = [str(path.relative_to(folder)) for path in files if path not in set(readable)]
        logger.warning("%s: %d files are not text and are left out: %s", folder, len(left_out), ", ".join(left_out[:5]))
    for path in readable:
        yield from read_file(path)
