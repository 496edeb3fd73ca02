"""Every text that a file holds: as it is, behind escapes, in base64 or hex, in archives and in tensor metadata.

Files are read in pieces that overlap, so that memory does not grow with them; what is decoded counts against one budget, and
what the budget or the formats leave unread is reported (`Unread`), never ignored.
"""

from __future__ import annotations

import base64
import binascii
import bz2
import codecs
import gzip
import html
import io
import lzma
import re
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

PIECE_BYTES = 4 * 2**20
OVERLAP_BYTES = 16 * 2**10  # longer than any secret but a private key, which is found by its beginning
DECODED_BYTES = 2**30  # of one file: archives and what is inside them
DEPTH = 5
MEMBERS = 100_000
ROUNDS = 4  # of escapes inside escapes
_MAGIC = (
    (b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"),
    (b"\x28\xb5\x2f\xfd", "zstandard"), (b"7z\xbc\xaf\x27\x1c", "7z"), (b"Rar!\x1a\x07", "rar"), (b"\x04\x22\x4d\x18", "lz4"),
)  # fmt: skip
_TAR_MAGIC, _TAR_OFFSET = b"ustar", 257
_ZLIB = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
_CODES = re.compile(
    r"\\{1,8}u(?:\{([0-9a-fA-F]{1,6})\}|([0-9a-fA-F]{4}))|\\{1,8}U([0-9a-fA-F]{8})|\\{1,8}x([0-9a-fA-F]{2})|%([0-9a-fA-F]{2})|\\([0-3][0-7]{2})"
)
_LETTER = re.compile(r"\\{1,8}([nrt/\"'])")
_LETTERS = {"n": "\n", "r": "\n", "t": "\t"}
_INVISIBLE = re.compile("[\u00ad\u034f\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
_JOINED = re.compile(r"=\r?\n")  # a soft line break of quoted-printable
_BASE64 = re.compile(rb"(?:[A-Za-z0-9+/_-]{20,}(?:\\n|\r?\n[ \t]*)?)+[A-Za-z0-9+/_-]*={0,2}")
_HEX = re.compile(rb"(?:\\x)?(?:[0-9a-fA-F]{2}){12,}")
_STRINGS = re.compile(rb"[\x20-\x7e\t\r\n]{6,}")


class Unread(Exception):
    """Something in the file that is not looked into, and why."""


@dataclass
class Budget:
    """What may still be decoded of one file."""

    left: int = DECODED_BYTES
    members: int = MEMBERS

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise Unread(f"it holds more than {DECODED_BYTES:,} bytes behind archives and encodings")

    def member(self) -> None:
        self.members -= 1
        if self.members < 0:
            raise Unread(f"it holds more than {MEMBERS:,} files")


@dataclass(frozen=True)
class View:
    """A text of the file. where: how it was reached ("" for the file itself); line: of its first character, in that place."""

    text: str
    where: str
    line: int


def views(stream: IO[bytes], where: str, budget: Budget, depth: int = 0) -> Iterator[View]:
    """All texts of a stream of bytes that can seek. Raises Unread."""
    head = stream.read(512)
    stream.seek(0)
    kind = _archive(head)
    if kind is not None:
        if depth >= DEPTH:
            raise Unread(f"{where or 'it'} is an archive more than {DEPTH} deep")
        yield from _members(stream, kind, where, budget, depth)
    if kind is None or kind in ("zip", "tar"):  # comments, and members that are stored as they are
        yield from _pieces(stream, head, where, budget, depth)


def _archive(head: bytes) -> str | None:
    if head[_TAR_OFFSET : _TAR_OFFSET + len(_TAR_MAGIC)] == _TAR_MAGIC:
        return "tar"
    found = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
    if found is None and head.startswith(_ZLIB):
        try:
            zlib.decompressobj().decompress(head, 64)
        except zlib.error:
            return None
        return "zlib"
    return found


def _pieces(stream: IO[bytes], head: bytes, where: str, budget: Budget, depth: int) -> Iterator[View]:
    stream.seek(0)
    line, before = 1, b""
    encoding = _encoding(head)
    while data := stream.read(PIECE_BYTES):
        piece = before + data
        for text, how in texts(piece, encoding):
            yield View(text, _joined(where, how), line)
        for decoded, how in _encoded(piece, budget):
            inner = io.BytesIO(decoded)
            if depth >= DEPTH:
                raise Unread(f"{where or 'it'} is encoded more than {DEPTH} times")
            yield from views(inner, _joined(where, how), budget, depth + 1)
        before = piece[-OVERLAP_BYTES:]
        line += piece.count(b"\n") - before.count(b"\n")


def _encoding(head: bytes) -> str:
    for mark, name in ((codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):  # fmt: skip
        if head.startswith(mark):
            return name
    return "utf-8"


def texts(piece: bytes, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """(text, how it was read) of some bytes: as they are, without the zeros of a wider encoding, and without escapes."""
    text = piece.decode(encoding, errors="replace")
    yield text, ""
    if encoding == "utf-8" and b"\0" in piece:
        # UTF-16 and UTF-32 without a mark, anywhere, in either byte order: each is ASCII with zeros between.
        narrow = b"\n".join(
            _STRINGS.findall(re.sub(rb"(?<=[\x09\x0a\x0d\x20-\x7e])\0{1,3}(?=[\x09\x0a\x0d\x20-\x7e])", b"", piece))
        )
        if narrow:
            text = narrow.decode("ascii")
            yield text, "UTF-16"
    told = {text}
    for letters in (False, True):
        plain = unescaped(text, letters)
        if plain not in told:
            told.add(plain)
            yield plain, "escapes"


def unescaped(text: str, letters: bool) -> str:
    r"""Without JSON's, URLs', HTML's and quoted-printable's escapes (also escaped again), invisible and wide characters.

    letters: also \n, \t, \/ and the like, which in a path of Windows are no escapes.
    """
    for _ in range(ROUNDS):
        before = text
        if "\\" in text or "%" in text:
            text = _CODES.sub(_character, text)
        if letters and "\\" in text:
            text = _LETTER.sub(lambda m: _LETTERS.get(m[1], m[1]), text)
        if "&" in text:
            text = html.unescape(text)
        if "=\n" in text or "=\r\n" in text:
            text = re.sub(r"=([0-9A-F]{2})", lambda m: chr(int(m[1], 16)), _JOINED.sub("", text))
        if text == before:
            break
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text))
    return text


def _character(match: re.Match[str]) -> str:
    digits = next(group for group in match.groups() if group)
    code = int(digits, 8 if match[6] else 16)
    return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else match[0]


def _encoded(piece: bytes, budget: Budget) -> Iterator[tuple[bytes, str]]:
    """What some bytes hold in base64 or hex, if it is text or an archive."""
    for match in _BASE64.finditer(piece):
        run = re.sub(rb"\\n|\s", b"", match[0]).replace(b"-", b"+").replace(b"_", b"/").rstrip(b"=")
        if decoded := _sensible(_base64(run)):
            budget.take(len(decoded))
            yield decoded, "base64"
    for match in _HEX.finditer(piece):
        run = match[0].removeprefix(b"\\x")
        if decoded := _sensible(binascii.unhexlify(run[: len(run) // 2 * 2])):
            budget.take(len(decoded))
            yield decoded, "hex"


def _base64(run: bytes) -> bytes:
    run = run[: len(run) - 1] if len(run) % 4 == 1 else run
    try:
        return base64.b64decode(run + b"=" * (-len(run) % 4))
    except binascii.Error:
        return b""


def _sensible(decoded: bytes) -> bytes | None:
    """The bytes where they are text in one of the encodings, or an archive; random bytes are neither."""
    head = decoded[:512]
    if _archive(head) is not None:
        return decoded
    narrow = head.replace(b"\0", b"")
    printable = sum(32 <= byte < 127 or byte in (9, 10, 13) for byte in narrow)
    return decoded if len(narrow) >= 12 and printable >= 0.9 * len(narrow) else None


def _members(stream: IO[bytes], kind: str, where: str, budget: Budget, depth: int) -> Iterator[View]:
    try:
        if kind == "zip":
            yield from _zip(stream, where, budget, depth)
        elif kind == "tar":
            yield from _tar(stream, where, budget, depth)
        elif kind in ("gzip", "bzip2", "xz", "zlib"):
            yield from views(_spooled(_OPEN[kind](stream), budget), _joined(where, kind), budget, depth + 1)
        else:
            raise Unread(f"{where or 'it'} is a {kind} archive, which is not opened")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, struct.error, NotImplementedError, ValueError) as error:  # fmt: skip
        # Two bytes of base64 content can look like an archive by chance; a file or a member that begins so is one.
        if not where.endswith(("base64", "hex")):
            raise Unread(f"{where or 'its'} {kind} archive cannot be opened ({error})") from None


_OPEN: dict[str, Callable[[IO[bytes]], Any]] = {
    "gzip": lambda stream: gzip.GzipFile(fileobj=stream, mode="rb"),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zlib": lambda stream: _Inflated(stream),
}


class _Inflated:
    """What a zlib stream holds, in pieces: neither the file nor what it expands to is in memory at once."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._inflate = zlib.decompressobj()

    def read(self, size: int) -> bytes:
        while not self._inflate.eof:
            data = self._inflate.unconsumed_tail or self._stream.read(PIECE_BYTES)
            if not data:
                raise EOFError("it ends before its end")
            if found := self._inflate.decompress(data, size):
                return found
        return b""


def _spooled(stream: IO[bytes], budget: Budget) -> IO[bytes]:
    """The bytes of a stream that may not seek, on the disk where they are many."""
    import tempfile

    out = tempfile.SpooledTemporaryFile(PIECE_BYTES)  # noqa: SIM115 - the caller reads it, and its end closes it
    while data := stream.read(2**20):
        budget.take(len(data))
        out.write(data)
    out.seek(0)
    return out


def _zip(stream: IO[bytes], where: str, budget: Budget, depth: int) -> Iterator[View]:
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            budget.member()
            name = _joined(where, f"zip {info.filename[:100]!r}")
            yield View(info.filename, name, 1)
            if info.flag_bits & 1:
                raise Unread(f"{name} is encrypted")
            if not info.is_dir():
                with archive.open(info) as member:
                    yield from views(_spooled(member, budget), name, budget, depth + 1)


def _tar(stream: IO[bytes], where: str, budget: Budget, depth: int) -> Iterator[View]:
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for info in archive:
            budget.member()
            name = _joined(where, f"tar {info.name[:100]!r}")
            yield View(f"{info.name}\n{info.linkname}\n{info.uname if info.uname != 'root' else ''}", name, 1)
            member = archive.extractfile(info) if info.isreg() else None
            if member is not None:
                yield from views(_spooled(member, budget), name, budget, depth + 1)


def _joined(where: str, how: str) -> str:
    return ", ".join(part for part in (where, how) if part)
