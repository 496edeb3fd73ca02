"""A file from the Hub that cannot be written or is not answered: what is said, and that nothing half stays."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from m3quant.checkpoint import fetcher as fetching
from m3quant.checkpoint.fetcher import Fetcher
from m3quant.checkpoint.hub import HubStore
from m3quant.checkpoint.shard_cache import Abandoned
from m3quant.errors import StoppedError

NAME, DATA = "notes.bin", bytes(range(256)) * 40
Download = Callable[..., str]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> HubStore:
    """A repo of one large file; no request leaves the machine."""
    lfs = SimpleNamespace(sha256=hashlib.sha256(DATA).hexdigest())
    info = SimpleNamespace(
        sha="0" * 40, siblings=[SimpleNamespace(rfilename=NAME, size=len(DATA), lfs=lfs, blob_id="1")]
    )
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


def test_a_digest_that_went_wrong_while_the_file_came_refuses_nothing(store: HubStore, tmp_path: Path) -> None:
    told: list[str] = []

    def download(name: str, folder: Path, came: Callable[[int], None], fresh: bool) -> str:
        (folder / name).write_bytes(DATA)
        return hashlib.sha256(b"zeros that lay there for a while").hexdigest()

    fetch = Fetcher(store, tmp_path, lambda count: None, told.append, download=download)
    assert fetch.fetch(NAME).size == len(DATA) and not told
