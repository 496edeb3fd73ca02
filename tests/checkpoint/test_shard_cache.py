"""The cache that carries a plan of shards out: never above its budget, never waiting for itself, never half a shard."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from m3quant.checkpoint import shard_cache
from m3quant.checkpoint.reader import Stamp, stamp_of
from m3quant.checkpoint.shard_cache import Abandoned, ShardCache
from m3quant.checkpoint.shard_plan import Step, plan_shards
from m3quant.errors import OutputError, StoppedError
from m3quant.running.stopping import InterruptedRun, StopFlag
from tests.support.convert.resharded import bytes_in


class Files:
    """A fetch that takes a moment, writes in two halves, and adds up what lies in the folder."""

    def __init__(self, folder: Path, sizes: dict[str, int], pause: float = 0.0) -> None:
        self.folder, self.sizes, self.pause = folder, sizes, pause
        self.fetched: list[str] = []
        self.most = 0

    def __call__(self, name: str) -> Stamp:
        path = self.folder / name
        if not path.exists():
            self.fetched.append(name)
            with open(path, "wb") as file:
                file.write(bytes(self.sizes[name] // 2))
                file.flush()
                time.sleep(self.pause)
                file.write(bytes(self.sizes[name] - self.sizes[name] // 2))
        self.most = max(self.most, bytes_in(self.folder))
        return stamp_of(path.stat())


def read(cache: ShardCache, shards: Sequence[str]) -> None:
    with cache.reading(shards):
        pass


def cache_of(
    folder: Path, work: Sequence[Step], sizes: dict[str, int], budget: int, fetch: Callable[[str], Stamp], **given: Any
) -> ShardCache:
    plan = plan_shards(work, sizes, budget)
    told = {"stop": StopFlag(), "say": lambda line: None, "keep": False, **given}
    return ShardCache(folder, plan, fetch, **told)


def test_random_work_with_readers_that_run_ahead_ends_within_the_budget(tmp_path: Path) -> None:
    chance = random.Random(5)
    for case in range(25):
        sizes = {f"s{i}": chance.randint(1000, 9000) for i in range(8)}
        work = [Step(n, frozenset(chance.sample(sorted(sizes), chance.randint(1, 3)))) for n in range(10)]
        budget = plan_shards(work, sizes, None).least + chance.choice((0, 0, 5000))
        files = Files(tmp_path / str(case), sizes, 0.0005)
        with cache_of(tmp_path / str(case), work, sizes, budget, files) as cache, ThreadPoolExecutor(4) as pool:

            def look(step: Step, cache: ShardCache = cache, sizes: dict[str, int] = sizes) -> None:
                with cache.reading(step.shards) as stamps:
                    time.sleep(0.0003)  # while what it reads for a step ahead may come to the end of its stay
                    for shard, stamp in stamps.items():
                        assert stamp.size == sizes[shard] == (cache.folder / shard).stat().st_size

            # As in a conversion: the order is that of the steps, and what is done is told in this order too.
            reads = [(step, pool.submit(look, step)) for step in work]
            for step, done in reads:
                done.result(timeout=30)
                cache.finish(step.key)
        assert files.most <= budget
        # Less where a reader that ran ahead has found a shard before the end of an earlier stay.
        assert sum(sizes[name] for name in files.fetched) <= cache.plan.fetch_bytes
        assert not (tmp_path / str(case)).exists()


WORK = [Step(0, frozenset("a")), Step(1, frozenset("b")), Step(2, frozenset("c"))]
SIZES = {"a": 100, "b": 100, "c": 100}


def test_what_an_earlier_run_left_is_used_or_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    for name in ("a", "c", "z"):
        (folder / name).write_bytes(bytes(100))
    (folder / ".cache" / "huggingface" / "b.incomplete").write_bytes(bytes(50))
    files = Files(folder, SIZES)
    with cache_of(folder, WORK, SIZES, 200, files, keep=True) as cache:
        read(cache, "ab")
        assert sorted(p.name for p in folder.iterdir()) == ["a", "b"]
        assert files.fetched == ["b"]


@pytest.mark.parametrize("keep", [True, False])
def test_after_an_error_whole_shards_stay_only_for_who_continues(tmp_path: Path, keep: bool) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(ValueError), cache_of(folder, WORK, SIZES, 100, Files(folder, SIZES), keep=keep) as cache:
        read(cache, "a")
        raise ValueError
    assert folder.exists() == keep
    assert not keep or [p.name for p in folder.iterdir()] == ["a"]


def test_an_error_of_a_fetch_reaches_every_reader(tmp_path: Path) -> None:
    def fetch(name: str) -> Stamp:
        if name == "b":
            raise StoppedError("the Hub does not answer")
        (tmp_path / name).write_bytes(bytes(100))
        return stamp_of((tmp_path / name).stat())

    with cache_of(tmp_path, WORK, SIZES, 100, fetch) as cache, ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(read, cache, "c")
        read(cache, "a")
        cache.finish(0)
        with pytest.raises(StoppedError, match="does not answer"):
            read(cache, "b")
        with pytest.raises(StoppedError, match="does not answer"):
            waiting.result(timeout=30)


def test_a_reader_that_waits_for_room_ends_when_the_work_does(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with ThreadPoolExecutor(1) as pool, cache_of(folder, WORK, SIZES, 100, Files(folder, SIZES)) as cache:
        read(cache, "a")
        waiting = pool.submit(read, cache, "b")
        cache.abandon()
        with pytest.raises(Abandoned):
            waiting.result(timeout=30)


def test_a_signal_ends_the_waiting(tmp_path: Path) -> None:
    stop, gate = StopFlag(), threading.Event()

    def fetch(name: str) -> Stamp:
        gate.wait(30)
        raise Abandoned("left")

    with cache_of(tmp_path / "cache", WORK, SIZES, 300, fetch, stop=stop) as cache:
        stop.number = 15
        assert cache.left  # which a fetch in flight looks at
        with pytest.raises(InterruptedRun, match="SIGTERM"):
            read(cache, "a")
        gate.set()


def test_a_shard_of_no_step_is_a_defect_and_no_deadlock(tmp_path: Path) -> None:
    with cache_of(tmp_path / "cache", WORK[:1], SIZES, 100, Files(tmp_path / "cache", SIZES)) as cache:
        with pytest.raises(RuntimeError, match="c is read in a step"):
            read(cache, "c")
        read(cache, "a")
        cache.finish(0)
        with pytest.raises(RuntimeError, match="a is read in a step"):
            read(cache, "a")


def test_a_network_that_stands_still_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(shard_cache, "POLL_SECONDS", 0.02)
    said: list[str] = []
    heard = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        heard.set()

    def fetch(name: str) -> Stamp:
        assert heard.wait(30)
        return Files(tmp_path / "cache", SIZES)(name)

    with cache_of(tmp_path / "cache", WORK[:1], SIZES, 100, fetch, say=say) as cache:
        read(cache, "a")
    assert said[0].startswith("waiting for a: no data for")


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    with (
        pytest.raises(StoppedError, match="No space left"),
        cache_of(tmp_path / "c", WORK, SIZES, 300, Files(tmp_path, SIZES)),
    ):
        pass


def test_one_folder_is_one_cache(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with cache_of(folder, WORK, SIZES, 300, Files(folder, SIZES)) as cache:
        read(cache, "a")
        with (
            pytest.raises(OutputError, match="in use by another"),
            cache_of(folder, WORK, SIZES, 300, Files(folder, SIZES)),
        ):
            pass
        assert (folder / "a").exists()
