"""Every kind of secret and place, in every form in which it can stand in a file; text that only looks like one; hostile files."""

from __future__ import annotations

import base64
import gzip
import io
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest

from m3quant.errors import OptionError
from m3quant.publish.files import PublishFile
from m3quant.publish.scan import OF_A_MACHINE, Finding, decoding, machine_strings, scan
from m3quant.publish.scan.allow import read_allowed, shipped
from m3quant.publish.scan.rules import LEFT_OUT, library
from tests.support.publish import secret_samples as samples

FEW_FORMS = ("plain", "json", "escaped, one character", "utf-16-le")
IN_EVERY_FORM = ("hugging face", "stripe", "ssh key", "password, env", "netrc", "azure storage")
PLACES_IN_EVERY_FORM = ("home", "windows", "windows, share", "internal host", "private ipv4")


def look(folder: Path, data: bytes, name: str = "file.txt", own: tuple[str, ...] = ()) -> list[Finding]:
    path = folder / Path(name).name
    path.write_bytes(data)
    return scan([PublishFile(name, path, len(data), "")], own)


@pytest.mark.parametrize("name", samples.SECRETS)
def test_every_kind_of_secret_is_found_and_not_repeated(name: str, tmp_path: Path) -> None:
    secret = samples.SECRETS[name]
    for form in samples.FORMS if name in IN_EVERY_FORM else FEW_FORMS:
        found = look(tmp_path, samples.FORMS[form](secret))
        assert [f for f in found if f.kind not in OF_A_MACHINE and f.kind != "not looked into"], form
        assert all(secret not in str(f) for f in found)


@pytest.mark.parametrize("name", samples.PLACES)
def test_every_kind_of_place_is_found(name: str, tmp_path: Path) -> None:
    for form in samples.FORMS if name in PLACES_IN_EVERY_FORM else FEW_FORMS:
        found = look(tmp_path, samples.FORMS[form](samples.PLACES[name]))
        assert [f for f in found if f.kind in OF_A_MACHINE], form


@pytest.mark.parametrize("text", samples.HARMLESS)
def test_text_that_only_looks_like_one_passes(text: str, tmp_path: Path) -> None:
    for form in ("plain", "json", "utf-16-le", "base64", "zip"):
        assert look(tmp_path, samples.FORMS[form](text)) == [], form


@pytest.mark.parametrize("place", [0, 2**18 - 20, 2**18 + 4096])
def test_a_secret_at_the_seam_of_two_pieces_is_found_once(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "PIECE_BYTES", 2**18)
    text = b"x\n" * (place // 2) + samples.SECRETS["hugging face"].encode() + b"\n" + b"y\n" * 100
    found = look(tmp_path, text)
    assert [(f.kind, f.line) for f in found] == [("Hugging Face token", place // 2 + 1)]


def test_a_zlib_stream_is_read_in_pieces_and_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = samples.SECRETS["hugging face"].encode()
    data = zlib.compress(b"a line\n" * 9_000_000 + secret)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_pieces", lambda stream, *_: iter([decoding.View(str(len(stream.read())), "", 1)]))
        tracemalloc.start()
        sizes = [view.text for view in decoding.views(io.BytesIO(data), "", decoding.Budget())]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sizes == [str(7 * 9_000_000 + len(secret))] and peak < 2.5 * 63_000_000  # the reader here reads all of it
    monkeypatch.setattr(decoding, "DECODED_BYTES", 10**6)
    budget = decoding.Budget(10**6)
    with pytest.raises(decoding.Unread, match="more than 1,000,000 bytes"):
        list(decoding.views(io.BytesIO(data), "", budget))
    assert [f.kind for f in look(tmp_path, zlib.compress(b"x " * 100)[:-9], "notes.bin")] == ["not looked into"]
    assert [f.kind for f in look(tmp_path, zlib.compress(b"x\n" * 50_000 + secret), "notes.bin")] == [
        "Hugging Face token"
    ]


def test_the_name_of_a_file_in_an_archive_counts(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("/home/someone/m3/notes.txt", "x")
    assert [f.kind for f in look(tmp_path, out.getvalue(), "a.zip")] == ["machine path"]


def _bomb() -> bytes:
    return gzip.compress(gzip.compress(b"\0" * (64 * 2**20), 9), 9)


def _deep() -> bytes:
    data = b"a line of text"
    for _ in range(decoding.DEPTH + 2):
        data = gzip.compress(data)
    return data


UNREAD = {
    "more than it may hold": (_bomb, "more than .* bytes behind"),
    "too deep": (_deep, "deep"),
    "another format": (lambda: b"7z\xbc\xaf\x27\x1c" + b"\0" * 40, "7z archive, which is not opened"),
    "zstandard": (lambda: b"\x28\xb5\x2f\xfd" + b"\0" * 40, "zstandard archive, which is not opened"),
    "cut short": (lambda: gzip.compress(b"text" * 1000)[:-12], "gzip archive cannot be opened"),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_what_is_not_looked_into_is_a_finding(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, words = UNREAD[kind]
    monkeypatch.setattr(decoding, "DECODED_BYTES", 2**20)
    monkeypatch.setattr(decoding.Budget, "__init__", lambda self: self.__dict__.update(left=2**20, members=10))
    found = look(tmp_path, make())
    assert [f.kind for f in found] == ["not looked into"]
    import re

    assert re.search(words, str(found[0])), str(found[0])


def test_many_findings_end_with_a_count(tmp_path: Path) -> None:
    text = "\n".join(f"/home/someone{n}/m3" for n in range(200))
    found = look(tmp_path, text.encode())
    assert len(found) == 51 and found[-1].shown == "more than 50 findings"


@pytest.mark.parametrize("make", [
    lambda: b"\\" * 300_000, lambda: b"%" * 300_000, lambda: b"&amp;" * 60_000, lambda: b"a@" * 150_000,
    lambda: b"eyJ" * 100_000, lambda: b"1.1.1." * 50_000, lambda: b"a:b:" * 75_000, lambda: b"/home" * 60_000,
    lambda: b"sk-" * 100_000, lambda: b"A" * 300_000, lambda: b"a-1." * 75_000 + b".local", lambda: b"ssh " + b"a " * 150_000,
    lambda: base64.b64encode(base64.b64encode(b"text " * 30_000)), lambda: b"-----BEGIN " * 27_000 + b" PRIVATE KEY",
    lambda: b"password=" * 33_000, lambda: b"://" + b"a" * 300_000, lambda: b"~a/" * 100_000,
    lambda: b"password = " + b"qwertyuiopasdfghjklzxcvbnm" * 4 + b"1!", lambda: (b"password" + b" " * 100) * 2800,
    lambda: b"-----BEGIN " + b"PRIVATE KEY-----\n" + b"A: b " * 100 + b"\n!", lambda: b"password" + b" " * 300_000 + b"x",
    lambda: b"---- BEGIN SSH2 ENCRYPTED " + b"PRIVATE KEY ----\n" + b"A: b c: d " * 60 + b"\n!",
])  # fmt: skip
def test_no_text_takes_more_than_linear_time(make: object, tmp_path: Path) -> None:
    """A few seconds each; a quadratic rule would take minutes and meet the test's own limit."""
    look(tmp_path, make())  # type: ignore[operator]


def test_secrets_of_the_environment_and_the_hosts_name_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_SERVICE_API_KEY", "plainwordsthatnorulewouldfind")
    monkeypatch.setattr("socket.gethostname", lambda: "worker-7f")
    own = machine_strings(tmp_path)
    assert {"plainwordsthatnorulewouldfind", "worker-7f", str(tmp_path.resolve())} <= set(own)
    data = samples.FORMS["base64"]("a note with plainwordsthatnorulewouldfind in it")
    assert [f.kind for f in look(tmp_path, data, own=tuple(own))] == ["text of this machine"]


def test_the_allow_list_takes_what_it_names_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "allow.yaml"
    path.write_text(
        "- text: /data/models/.*\n  file: docs/*\n  kind: machine path\n  reason: an example in our own handbook\n",
        encoding="utf-8",
    )
    allowed = shipped() + read_allowed(path)
    text = b"see /data/models/m3 and /data/other/m3"
    for name, left in (("docs/a.md", ["/data/other/m3"]), ("a.md", ["/data/models/m3", "/data/other/m3"])):
        file = tmp_path / "a.md"
        file.write_bytes(text)
        assert [f.shown for f in scan([PublishFile(name, file, len(text), "")], (), allowed)] == left


@pytest.mark.parametrize(
    ("text", "words"),
    [("- text: x\n", "0.reason"), ("- text: '['\n  reason: because of this\n", "regular expression"), ("a: b\n", "the list"),
     ("- text: x\n  reason: no\n", "0.reason"), ("- text: x\n  reason: because of this\n  fil: y\n", "0.fil")],
)  # fmt: skip
def test_an_allow_list_that_is_wrong_is_refused_with_the_key(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "allow.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(OptionError, match=words):
        read_allowed(path)


def test_a_regex_of_an_allow_list_that_would_run_for_years_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m3quant.checkpoint.patterns.SECONDS", 0.2)
    path = tmp_path / "allow.yaml"
    path.write_text("- text: '(.|[a-z/])*[!?]$'\n  reason: because of this\n", encoding="utf-8")
    file = tmp_path / "a.md"
    file.write_bytes(b"see /data/models/" + b"abcdefgh" * 6)
    with pytest.raises(
        OptionError, match=r"^allow list: the regular expression .* takes more than 0\.2 s on what was found"
    ):
        scan([PublishFile("a.md", file, 100, "")], (), read_allowed(path))


def test_every_shipped_entry_gives_a_reason_and_the_library_is_there() -> None:
    assert all(len(e.reason) > 10 for e in shipped().entries)
    kinds = {kind for kind, _ in library()}
    assert len(kinds) >= 18 and not kinds & LEFT_OUT.keys()
