"""A Hub repo without a server: its files come out of a folder, for tests that reach into this process."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from m3quant.checkpoint.hub import HubStore

REPO = "org/model"


def serve(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From here on `folder` is REPO. cache: stands for huggingface_hub's own. Returns the names of shards as they are fetched."""
    fetched: list[str] = []

    def facts(path: Path) -> SimpleNamespace:
        data = path.read_bytes()
        lfs = SimpleNamespace(sha256=hashlib.sha256(data).hexdigest())
        return SimpleNamespace(rfilename=path.relative_to(folder).as_posix(), size=len(data), lfs=lfs, blob_id="")

    siblings = [facts(path) for path in sorted(folder.rglob("*")) if path.is_file()]
    info = SimpleNamespace(sha="0" * 40, siblings=siblings)

    def download(repo: str, name: str, *, local_dir: Path | None = None, **_: Any) -> str:
        if local_dir is not None:
            fetched.append(name)
        target = (local_dir or cache) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target)
        return str(target)

    def read(self: HubStore, name: str, start: int, count: int, size: int) -> bytes:
        with open(folder / name, "rb") as file:
            file.seek(start)
            return file.read(count)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(HubStore, "_range", read)
    return fetched
