"""Downloads in processes of their own, of a store that is a folder; how processes work is tested in tests/running/test_workers.py."""

from __future__ import annotations

import hashlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from m3quant.checkpoint.downloads import downloads
from m3quant.checkpoint.remote import NotTheFile, TransientError
from m3quant.checkpoint.shard_cache import Abandoned
from m3quant.errors import StoppedError
from m3quant.running import workers
from m3quant.running.retry import retry_after
from tests.support.workers import alive


class FolderStore:
    """Knows files of one folder, and some names that go wrong."""

    in_processes = True

    def __init__(self, source: Path) -> None:
        self.source = source

    def download(self, name, folder, came, fresh):  # type: ignore[no-untyped-def]
        if name == "busy":
            raise TransientError("busy now", "the Hub answered 429", 17.0)
        if name == "full":
            raise StoppedError("the disk is full")
        if name == "other":
            raise NotTheFile("it is longer")
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        data = (self.source / "data").read_bytes()
        with open(folder / f"{name}.part", "wb", buffering=0) as file:
            for start in range(0, len(data), 1000):
                came(len(data[start : start + 1000]))
                file.write(data[start : start + 1000])
        os.replace(folder / f"{name}.part", folder / name)
        (folder / f"{name}.pid").write_text(f"{os.getpid()} {fresh}")


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    source = tmp_path / "source"
    source.mkdir()
    (source / "data").write_bytes(os.urandom(12_345))
    return FolderStore(source)


def test_files_come_whole_with_their_bytes_told_and_a_process_is_used_again(store: FolderStore, tmp_path: Path) -> None:
    folder, told = tmp_path / "to", list[int]()
    folder.mkdir()
    with downloads(store, workers.WORTH_BYTES) as download:  # type: ignore[arg-type]
        for number, name in enumerate(("a", "b")):
            digest = download(name, folder, told.append, number == 1)
            assert digest == hashlib.sha256((store.source / "data").read_bytes()).hexdigest()  # taken as it came
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda name: download(name, folder, told.append, False), ("c", "d", "e")))
    assert all((folder / name).read_bytes() == (store.source / "data").read_bytes() for name in "abcde")
    assert sum(told) == 5 * 12_345 and len(told) == 5 * 13
    pids = [(folder / f"{name}.pid").read_text().split() for name in ("a", "b", "c")]
    assert pids[0][0] == pids[1][0] != str(os.getpid())
    assert [fresh for _, fresh in pids] == ["False", "True", "False"]
    assert not any(alive(int(pid)) for pid, _ in pids)


def test_failures_arrive_as_they_were_raised_and_downloads_go_on(store: FolderStore, tmp_path: Path) -> None:
    with downloads(store, workers.WORTH_BYTES) as download:  # type: ignore[arg-type]

        def failure(name: str) -> Exception:
            with pytest.raises(Exception) as raised:
                download(name, tmp_path, lambda count: None, False)
            return raised.value

        busy = failure("busy")
        assert isinstance(busy, TransientError) and (str(busy), busy.words) == ("busy now", "the Hub answered 429")
        assert retry_after(busy) == 17.0
        assert isinstance(failure("full"), StoppedError)
        assert isinstance(failure("other"), NotTheFile)
        died = failure("dies")
        assert isinstance(died, TransientError) and f"-{int(signal.SIGKILL)}" in str(died)
        download("after", tmp_path, lambda count: None, False)
    assert (tmp_path / "after").exists()
    with pytest.raises(Abandoned, match="have ended"):  # which nobody tells as a pause before another try
        download("late", tmp_path, lambda count: None, False)


def test_a_small_checkpoint_is_downloaded_in_this_process(store: FolderStore, tmp_path: Path) -> None:
    with downloads(store, workers.WORTH_BYTES - 1) as download:  # type: ignore[arg-type]
        assert download("a", tmp_path, lambda count: None, False) is None
    assert (tmp_path / "a.pid").read_text().split()[0] == str(os.getpid())
