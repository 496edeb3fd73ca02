"""A file from the Hub that cannot be written or is not answered: what is said, and that nothing half stays."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from m3quant.checkpoint import download_gate, hub
from m3quant.checkpoint import fetcher as fetching
from m3quant.checkpoint.fetcher import Fetcher
from m3quant.checkpoint.hub import HubStore
from m3quant.checkpoint.remote import Cache, TransientError
from m3quant.checkpoint.shard_cache import Abandoned, ShardCache
from m3quant.checkpoint.shard_plan import Step, plan_shards
from m3quant.checkpoint.streaming import streamed
from m3quant.checkpoint.writer import sha256_file
from m3quant.errors import CheckpointError, StoppedError
from m3quant.running.progress import Silent
from m3quant.running.stopping import StopFlag
from tests.support.convert.resharded import bytes_in

NAME, DATA = "notes.bin", bytes(range(256)) * 40
PATIENCE = 20.0
Download = Callable[..., str]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> HubStore:
    """A repo of large files, all alike; no request leaves the machine."""
    lfs = SimpleNamespace(sha256=hashlib.sha256(DATA).hexdigest())
    names = (NAME, "a", "b", "c")
    siblings = [SimpleNamespace(rfilename=name, size=len(DATA), lfs=lfs, blob_id="1") for name in names]
    info = SimpleNamespace(sha="0" * 40, siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    return HubStore("org/model")


def fetcher(
    store: HubStore, folder: Path, monkeypatch: pytest.MonkeyPatch, download: Download, **given: Any
) -> Fetcher:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(fetching, "PAUSES_SECONDS", (0.0, 0.0))
    return Fetcher(store, folder, **{"advance": lambda count: None, "say": lambda line: None, **given})


def raising(error: Exception) -> Download:
    def download(repo: str, name: str, *, local_dir: Path, **_: object) -> str:
        (local_dir / name).write_bytes(DATA[:100])
        raise error

    return download


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device. Free space"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "quota exceeded. Free space"),
        (RuntimeError("Data processing error: I/O error: No space left on device (os error 28)"), "No space left on device. Free space"),
        (RuntimeError("Data processing error: CAS service error"), "CAS service error"),
        (ConnectionResetError("the line is dead"), "the line is dead"),
    ],
)  # fmt: skip
def test_a_full_disk_and_a_dead_line_stop_a_run_that_continues(
    store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    with pytest.raises(StoppedError) as told:
        fetcher(store, tmp_path, monkeypatch, raising(error)).fetch(NAME)
    assert words in str(told.value) and "org/model" in str(told.value) and told.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_told_as_they_come_and_taken_back_when_they_are_lost(
    store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    tries = 0

    def download(repo: str, name: str, *, local_dir: Path, tqdm_class: Any, **_: object) -> str:
        nonlocal tries
        tries += 1
        with tqdm_class(total=len(DATA), desc="x") as bar:
            bar.update(1000)
            if tries == 1:
                raise ConnectionResetError("once")
            bar.update(len(DATA) - 1000)
        (local_dir / name).write_bytes(DATA)
        return str(local_dir / name)

    stamp = fetcher(store, tmp_path, monkeypatch, download, advance=told.append).fetch(NAME)
    assert stamp.size == len(DATA) == sum(told) and -1000 in told
    assert fetcher(store, tmp_path, monkeypatch, raising(AssertionError())).fetch(NAME) == stamp  # it is here already


@pytest.mark.parametrize("digest", [None, "0" * 64, hashlib.sha256(DATA).hexdigest()])
def test_a_digest_taken_as_the_file_came_is_believed_only_if_it_is_the_right_one(
    store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str | None
) -> None:
    """Xet's client writes parts in any order: a wrong digest says nothing of the file, and a right one spares reading it."""
    read: list[Path] = []
    real = sha256_file

    def counted(path: Path) -> str:
        read.append(path)
        return real(path)

    for module in (hub, fetching):
        monkeypatch.setattr(module, "sha256_file", counted)

    def download(name: str, folder: Path, came: object, fresh: bool) -> str | None:
        (folder / name).write_bytes(DATA)
        return digest

    store.expected = {NAME: hashlib.sha256(DATA).hexdigest()}
    stamp = Fetcher(store, tmp_path, lambda count: None, lambda line: None, download=download).fetch(NAME)
    assert stamp.size == len(DATA)
    assert len(read) == (0 if digest == store.expected[NAME] else 2)


def test_a_fetch_that_nobody_waits_for_ends(store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, name: str, *, local_dir: Path, tqdm_class: Any, **_: object) -> str:
        with tqdm_class(total=1) as bar:
            bar.update(1)
        raise AssertionError("it went on")

    with pytest.raises(Abandoned):
        fetcher(store, tmp_path, monkeypatch, download, left=lambda: True).fetch(NAME)
    monkeypatch.setattr(fetching, "PAUSES_SECONDS", (100.0,))
    late = Fetcher(store, tmp_path, lambda count: None, lambda line: None, left=lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(ConnectionResetError("dead")))
    with pytest.raises(Abandoned):
        late.fetch(NAME)


def test_who_pauses_before_another_try_keeps_no_place(
    store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "DOWNLOADS_AT_ONCE", 1)
    busy, other, asked = threading.Event(), threading.Event(), list[str]()

    def download(name: str, folder: Path, came: Callable[[int], None], fresh: bool) -> None:
        asked.append(name)
        if asked == ["a"]:
            raise TransientError("busy", "the Hub answered 429", 100.0)
        (folder / name).write_bytes(DATA)

    def pause(seconds: float) -> None:
        busy.set()
        assert seconds == 100.0 and other.wait(PATIENCE)

    one = Fetcher(store, tmp_path, lambda count: None, lambda line: None, download=download)
    monkeypatch.setattr(one, "_sleep", pause)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(one.fetch, "a")
        assert busy.wait(PATIENCE)
        one.fetch("b")
        other.set()
        assert first.result(PATIENCE).size == len(DATA)
    assert asked == ["a", "b", "a"]


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_read_first_comes_first_also_at_another_try(
    store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "DOWNLOADS_AT_ONCE", 1)
    asked = list[str]()

    def download(name: str, folder: Path, came: Callable[[int], None], fresh: bool) -> None:
        asked.append(name)
        if len(asked) <= 2:
            until(lambda: len(one._gate._waiting) == 2)
        if len(asked) == 1:
            raise TransientError("busy")
        (folder / name).write_bytes(DATA)

    order = {"c": 0.0, "b": 1.0, "a": 2.0}.__getitem__
    one = Fetcher(store, tmp_path, lambda count: None, lambda line: None, download=download, order=order)
    monkeypatch.setattr(one, "_sleep", lambda seconds: until(lambda: len(asked) == 2))
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(one.fetch, "c")]
        until(lambda: len(asked) == 1)
        running += [pool.submit(one.fetch, name) for name in ("a", "b")]
        for done in running:
            done.result(PATIENCE)
    assert asked == ["c", "b", "c", "a"]


def test_a_file_of_unknown_size_is_refused_before_it_is_asked_for(
    store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.sizes[NAME] = None
    with pytest.raises(CheckpointError, match=f"The Hub states no size for org/model/{NAME}"):
        fetcher(store, tmp_path, monkeypatch, raising(AssertionError("it was asked for"))).fetch(NAME)


def test_an_empty_file_comes(store: HubStore, tmp_path: Path) -> None:
    store.sizes[NAME], store.marks[NAME] = 0, hashlib.sha256().hexdigest()

    def download(name: str, folder: Path, came: Callable[[int], None], fresh: bool) -> None:
        (folder / name).touch()

    stamp = Fetcher(store, tmp_path, lambda count: None, lambda line: None, download=download).fetch(NAME)
    assert stamp.size == 0


def test_bytes_that_are_lost_again_are_no_sign_of_life(
    store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network without an answer is said to be quiet since the last byte, not since the last try."""
    signs: list[int] = []
    monkeypatch.setattr(ShardCache, "came", lambda cache: signs.append(len(told)))
    monkeypatch.setattr(fetching, "PAUSES_SECONDS", (0.0, 0.0))
    told: list[int] = []

    def download(name: str, folder: Path, came: Callable[[int], None], fresh: bool) -> None:
        told.append(1)
        if len(told) < 3:
            raise TransientError("busy")
        came(len(DATA))
        (folder / name).write_bytes(DATA)

    monkeypatch.setattr(store, "download", download)
    checkpoint: Any = SimpleNamespace(remote=store, shard_sizes={"a": len(DATA)})
    steps = [Step(0, frozenset("a"))]
    with streamed(checkpoint, steps, tmp_path / "cache", len(DATA), StopFlag(), Silent()):
        assert store.cache is not None
        with store.cache.reading("a"):
            pass
    assert signs == [3]


def test_a_file_beside_the_shards_is_in_what_is_to_come(
    store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Totals(Silent):
        def beside(self, label: str, total_bytes: int) -> Callable[[int], None]:
            self.total = total_bytes
            return super().beside(label, total_bytes)

    def download(name: str, folder: Path, came: Callable[[int], None], fresh: bool) -> None:
        came(len(contents[name]))
        (folder / name).write_bytes(contents[name])

    contents, progress = {"a": DATA, "draft": DATA * 3}, Totals()
    store.sizes = {name: len(data) for name, data in contents.items()}
    store.marks = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    monkeypatch.setattr(store, "download", download)
    checkpoint: Any = SimpleNamespace(remote=store, shard_sizes={"a": len(DATA)})
    work = [Step(0, frozenset("a"))]
    with streamed(checkpoint, work, tmp_path / "cache", len(DATA), StopFlag(), progress, others=["draft"]):
        assert store.cache is not None
        with store.cache.reading("a"):
            pass
        assert store.cache.fetch_other("draft").read_bytes() == DATA * 3
    assert progress.streams["fetch"] == progress.total == len(DATA) * 4


def test_random_work_over_a_network_that_fails_ends_within_the_budget(
    store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers ahead, two downloads at once at most, many of one size, of which some fail at once or in the middle."""
    chance, lock = random.Random(11), threading.Lock()
    monkeypatch.setattr(fetching, "PAUSES_SECONDS", (0.0,) * 50)
    monkeypatch.setattr(fetching, "DOWNLOADS_AT_ONCE", 2)
    for module, name, value in (
        (download_gate, "SHORT_BYTES", 0),
        (download_gate, "POLL_SECONDS", 0.005),
        (download_gate, "FIRST_WINDOW_SECONDS", 0.001),
        (download_gate, "WINDOW_SECONDS", 0.001),
        (download_gate, "WINDOW_PIECES", 2),
        (download_gate, "SETTLE_SECONDS", 0.0),
    ):
        monkeypatch.setattr(module, name, value)
    most = 0

    def download(name: str, folder: Path, came: Callable[[int], None], fresh: bool) -> None:
        nonlocal most
        data = contents[name]
        with lock:
            how = chance.choice(("whole", "whole", "pieces", "pieces", "fails", "nothing")) if not fresh else "pieces"
            most = max(most, bytes_in(folder))
        if how == "nothing":
            raise TransientError("busy", "the Hub answered 429")
        with open(folder / name, "wb") as file:
            for start in range(0, len(data), 1000 if how != "whole" else len(data)):
                piece = data[start : start + (1000 if how != "whole" else len(data))]
                came(len(piece))
                file.write(piece)
                if how == "fails" and start:
                    raise TransientError("gone")
        with lock:
            most = max(most, bytes_in(folder))

    monkeypatch.setattr(store, "download", download)
    for case in range(15):
        most, folder, progress = 0, tmp_path / str(case), Silent()
        contents = {f"s{i}": chance.randbytes(chance.choice((1000, 4000, 9000))) for i in range(8)}
        sizes = {name: len(data) for name, data in contents.items()}
        store.sizes = dict(sizes)
        store.marks = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        work = [Step(n, frozenset(chance.sample(sorted(sizes), chance.randint(1, 3)))) for n in range(10)]
        budget = plan_shards(work, sizes, None).least + chance.choice((0, 0, 5000))
        checkpoint: Any = SimpleNamespace(remote=store, shard_sizes=sizes)
        with streamed(checkpoint, work, folder, budget, StopFlag(), progress), ThreadPoolExecutor(4) as pool:
            cache = store.cache
            assert cache is not None

            def look(step: Step, cache: Cache = cache, contents: dict[str, bytes] = contents) -> None:
                with cache.reading(step.shards):
                    for shard in step.shards:
                        assert (cache.folder / shard).read_bytes() == contents[shard]

            reads = [(step, pool.submit(look, step)) for step in work]
            for step, done in reads:
                done.result(timeout=30)
                cache.finish(step.key)
        assert 0 < most <= budget
        # As many bytes as were told stayed, whatever was lost: those of the plan, less where a reader was ahead of a stay.
        assert 0 < progress.streams["fetch"] <= plan_shards(work, sizes, budget).fetch_bytes
