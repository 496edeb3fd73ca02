"""Downloads in processes of their own, of a store that is a folder."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from m3quant.checkpoint.download_process import DownloadProcesses, downloads, portable
from m3quant.checkpoint.remote import NotTheFile, TransientError
from m3quant.errors import StoppedError
from m3quant.running.retry import retry_after


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
        if name == "odd":
            raise UnicodeDecodeError("utf-8", b"x", 0, 1, "odd")
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "talks":
            print("a library prints")
        if name == "stands":
            (folder / f"{name}.part").write_text(str(os.getpid()))
            os.replace(folder / f"{name}.part", folder / f"{name}.pid")
            time.sleep(60)
        data = (self.source / "data").read_bytes()
        for start in range(0, len(data), 1000):
            came(len(data[start : start + 1000]))
        shutil.copyfile(self.source / "data", folder / name)
        (folder / f"{name}.pid").write_text(f"{os.getpid()} {fresh}")


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    source = tmp_path / "source"
    source.mkdir()
    (source / "data").write_bytes(os.urandom(12_345))
    return FolderStore(source)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_files_come_whole_with_their_bytes_told_and_a_process_is_used_again(store: FolderStore, tmp_path: Path) -> None:
    folder, told = tmp_path / "to", list[int]()
    folder.mkdir()
    with DownloadProcesses(store) as processes:  # type: ignore[arg-type]
        for number, name in enumerate(("a", "talks", "b")):
            processes.download(name, folder, told.append, number == 2)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda name: processes.download(name, folder, told.append, False), ("c", "d", "e")))
    assert all((folder / name).read_bytes() == (store.source / "data").read_bytes() for name in "abcde")
    assert sum(told) == 6 * 12_345 and len(told) == 6 * 13
    pids = [(folder / f"{name}.pid").read_text().split() for name in ("a", "talks", "b", "c")]
    assert pids[0][0] == pids[1][0] == pids[2][0] != str(os.getpid())
    assert [fresh for _, fresh in pids] == ["False", "False", "True", "False"]
    assert not any(alive(int(pid)) for pid, _ in pids)


def test_failures_arrive_as_they_were_raised_and_the_process_goes_on(store: FolderStore, tmp_path: Path) -> None:
    with DownloadProcesses(store) as processes:  # type: ignore[arg-type]

        def failure(name: str) -> Exception:
            with pytest.raises(Exception) as raised:
                processes.download(name, tmp_path, lambda count: None, False)
            return raised.value

        busy = failure("busy")
        assert isinstance(busy, TransientError) and (str(busy), busy.words) == ("busy now", "the Hub answered 429")
        assert retry_after(busy) == 17.0
        assert isinstance(failure("full"), StoppedError)
        assert isinstance(failure("other"), NotTheFile)
        assert isinstance(failure("odd"), UnicodeDecodeError)
        died = failure("dies")
        assert isinstance(died, TransientError) and f"-{int(signal.SIGKILL)}" in str(died)
        processes.download("after", tmp_path, lambda count: None, False)
    assert (tmp_path / "after").exists()
    with pytest.raises(TransientError, match="have ended"):
        processes.download("late", tmp_path, lambda count: None, False)


def test_bytes_that_nobody_wants_any_more_end_the_process(store: FolderStore, tmp_path: Path) -> None:
    def refuse(count: int) -> None:
        raise KeyError("unwanted")

    with DownloadProcesses(store) as processes, pytest.raises(KeyError, match="unwanted"):  # type: ignore[arg-type]
        processes.download("a", tmp_path, refuse, False)


def test_a_small_checkpoint_is_downloaded_in_this_process(store: FolderStore, tmp_path: Path) -> None:
    with downloads(store, 10**9) as download:  # type: ignore[arg-type]
        download("a", tmp_path, lambda count: None, False)
    assert (tmp_path / "a.pid").read_text().split()[0] == str(os.getpid())


def test_an_error_that_no_other_process_could_build_arrives_as_its_words() -> None:
    class Local(Exception):
        pass

    error = portable(Local("here alone"))
    assert "Local: here alone" in str(pickle.loads(pickle.dumps(error)))


def test_dead_processes_leave_no_descriptors(store: FolderStore, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with DownloadProcesses(store) as processes:  # type: ignore[arg-type]
        for name in ("dies", "a", "dies"):
            with suppress(TransientError):
                processes.download(name, tmp_path, lambda count: None, False)
        assert len(os.listdir("/proc/self/fd")) == before
        processes.download("b", tmp_path, lambda count: None, False)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_folder_at_hand_runs_nothing_and_prints_at_the_start_do_no_harm(
    store: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile, site = tmp_path / "hostile", tmp_path / "site"
    hostile.mkdir()
    site.mkdir()
    (hostile / "pickle.py").write_text("open('ran', 'w')\n")
    (site / "sitecustomize.py").write_text("print('a greeting')\n")
    monkeypatch.chdir(hostile)
    monkeypatch.setattr(sys, "path", [str(site), *(os.path.abspath(path) for path in sys.path if path)])
    with DownloadProcesses(store) as processes:  # type: ignore[arg-type]
        processes.download("a", tmp_path, lambda count: None, False)
    assert (tmp_path / "a").exists() and not (hostile / "ran").exists()


def test_a_download_that_stands_still_ends_with_the_process_that_wanted_it(store: FolderStore, tmp_path: Path) -> None:
    program = (
        "import os, sys, threading, time\n"
        "from pathlib import Path\n"
        "from m3quant.checkpoint.download_process import DownloadProcesses\n"
        "from tests.checkpoint.test_download_process import FolderStore\n"
        "folder = Path(sys.argv[1])\n"
        "processes = DownloadProcesses(FolderStore(folder))\n"
        "threading.Thread(target=processes.download, args=('stands', folder, print, False)).start()\n"
        "while not (folder / 'stands.pid').exists():\n"
        "    time.sleep(0.05)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with Path(tmp_path / "err").open("w") as err:
        subprocess.run([sys.executable, "-c", program, str(store.source)], timeout=60, stderr=err, check=False)
    pid = int((store.source / "stands.pid").read_text())
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
