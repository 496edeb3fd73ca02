"""The digest of a file that grows, against that of the whole file; and when there is none to be had."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from m3quant.checkpoint import growing as growing_module
from m3quant.checkpoint.growing import DESCRIPTORS, GrowingDigest

pytestmark = pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="needs /proc")
Write = tuple[int, bytes]  # told, written


def digest_of(folder: Path, writes: list[Write], final: str = "whole", begins: bytes = b"") -> tuple[str | None, Path]:
    """As a library does it: opens a name of its own, tells, writes, and renames at the end."""
    folder.mkdir(exist_ok=True)
    part, whole = folder / "part.incomplete", folder / final
    part.write_bytes(begins)
    with GrowingDigest(folder) as growing, open(folder / "lock", "w"):
        with open(part, "ab", buffering=0) as file:
            for told, data in writes:
                growing.came(told)
                file.write(data)
        os.replace(part, whole)
        return growing.digest(whole), whole


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pieces(seed: int) -> list[Write]:
    numbers = random.Random(seed)
    data = [numbers.randbytes(numbers.choice((1, 100, 8192, 300_000))) for _ in range(20)]
    return [(len(piece), piece) for piece in data]


@pytest.mark.parametrize("seed", range(5))
def test_it_is_that_of_the_whole_file(tmp_path: Path, seed: int) -> None:
    digest, whole = digest_of(tmp_path, pieces(seed))
    assert digest == sha256(whole)


def test_two_bytes_and_a_file_larger_than_what_is_read_at_once(tmp_path: Path) -> None:
    digest, whole = digest_of(tmp_path / "a", [(1, b"x"), (1, b"y")])
    assert digest == sha256(whole)
    large = [(size, os.urandom(size)) for size in (20 * 2**20 + 1, 1)]
    digest, whole = digest_of(tmp_path / "b", large)
    assert digest == sha256(whole)


@pytest.mark.parametrize(
    ("writes", "begins"),
    [
        ([(3, b"abc"), (-3, b""), (3, b"abc")], b""),  # what came was dropped, says the library
        ([(3, b"abc"), (3, b"def"), (3, b"")], b""),  # more was told than lies there: it may have been written twice
        ([(3, b"abc"), (2, b"defg")], b""),
        ([(3, b"def"), (3, b"ghi")], b"abc"),  # an earlier try had written the beginning
        ([(3, b"abc")], b""),  # it came at once, so that nothing was to be seen while it did
        ([], b"abc"),  # it was copied, and nothing told
        ([(0, b""), (0, b"")], b""),
    ],
)
def test_none_where_the_bytes_may_not_be_those_that_came(tmp_path: Path, writes: list[Write], begins: bytes) -> None:
    assert digest_of(tmp_path, writes, begins=begins)[0] is None


def test_a_file_that_was_written_anew_over_its_beginning_has_none(tmp_path: Path) -> None:
    with GrowingDigest(tmp_path) as growing:
        with open(tmp_path / "part", "wb") as file:
            for data in (b"wrong", b"wrong", b"right"):
                file.seek(0)
                growing.came(5)
                file.write(data)
                file.flush()
        assert growing.digest(tmp_path / "part") is None


def test_another_file_under_the_name_has_none(tmp_path: Path) -> None:
    with GrowingDigest(tmp_path) as growing:
        with open(tmp_path / "part", "wb", buffering=0) as file:
            for data in (b"abc", b"def"):
                growing.came(3)
                file.write(data)
        (tmp_path / "whole").write_bytes(b"abcdeg")
        assert growing.digest(tmp_path / "whole") is None


def test_two_files_at_once_have_none_and_no_descriptor_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir(DESCRIPTORS))
    with open(tmp_path / "other", "wb", buffering=0) as other, GrowingDigest(tmp_path) as growing:
        other.write(b"other")
        with open(tmp_path / "part", "wb", buffering=0) as file:
            for data in (b"abc", b"def"):
                growing.came(3)
                file.write(data)
        assert growing.digest(tmp_path / "part") is None
    with (
        pytest.raises(KeyError),
        GrowingDigest(tmp_path) as growing,
        open(tmp_path / "part", "wb", buffering=0) as file,
    ):
        for data in (b"abc", b"def"):
            growing.came(3)
            file.write(data)
        raise KeyError
    assert len(os.listdir(DESCRIPTORS)) == before


def test_a_file_beside_the_folder_or_one_that_is_read_is_not_taken(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "old").write_bytes(b"old")
    beside = tmp_path / "shards2"
    with GrowingDigest(folder) as growing, open(folder / "old", "rb"), open(beside, "wb", buffering=0) as file:
        for data in (b"abc", b"def"):
            growing.came(3)
            file.write(data)
        assert growing.digest(beside) is None


@pytest.mark.parametrize(
    ("length", "order"),
    [
        (0, (0, 2, 1)),  # the last piece before the one before it: zeros lie between for a while
        (30, (0, 1, 2)),  # room is made first, so that zeros lie behind what has come
    ],
)
def test_pieces_that_are_not_written_at_the_end_give_none(tmp_path: Path, length: int, order: tuple[int, ...]) -> None:
    """Told of and hashed as slowly as may be, so that what lay there for a while is read."""
    data = [os.urandom(10) for _ in range(3)]
    with GrowingDigest(tmp_path) as growing:
        with open(tmp_path / "part", "wb", buffering=0) as file:
            os.ftruncate(file.fileno(), length)
            for piece in order:
                growing.came(10)
                time.sleep(0.02)
                os.pwrite(file.fileno(), data[piece], 10 * piece)
                growing.came(0)
                time.sleep(0.02)
        found = growing.digest(tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == b"".join(data)
    assert found is None


def test_told_of_by_many_threads_at_once_and_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, look = len(os.listdir(DESCRIPTORS)), growing_module._written_below

    def slowly(folder: str) -> int:
        time.sleep(0.05)
        return look(folder)

    monkeypatch.setattr(growing_module, "_written_below", slowly)
    data = os.urandom(30_000_000)
    with GrowingDigest(tmp_path) as growing:
        with open(tmp_path / "part", "wb", buffering=0) as file, ThreadPoolExecutor(8) as pool:
            growing.came(len(data) - 1)
            file.write(data[:-1])
            list(pool.map(growing.came, [0] * 8))
            growing.came(1)
            file.write(data[-1:])
        assert growing.digest(tmp_path / "part") == hashlib.sha256(data).hexdigest()
        with open(tmp_path / "part", "ab", buffering=0) as file:
            growing.came(1)
            file.write(b"x")
        assert growing.digest(tmp_path / "part") is None
    with open(tmp_path / "late", "wb", buffering=0) as file:
        file.write(b"x")
        growing.came(1)
    assert len(os.listdir(DESCRIPTORS)) == before


def test_a_file_that_cannot_be_read_while_it_comes_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(growing_module, "read_at", fails)
    assert digest_of(tmp_path, pieces(1))[0] is None
