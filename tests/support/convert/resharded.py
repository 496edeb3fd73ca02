"""A checkpoint's tensors spread over other shards, so that layers share them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m3quant.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, ShardWriter


def reshard(source: Path, folder: Path, count: int) -> Path:
    """`source` in `count` shards of about the same size, tensors in the order of their names."""
    folder.mkdir(parents=True)
    checkpoint = Checkpoint.open(source)
    for name in (CONFIG_NAME, *checkpoint.other_files):
        shutil.copyfile(source / name, folder / name)
    parts: list[list[str]] = [[] for _ in range(count)]
    done = 0
    for name in sorted(checkpoint.tensors):
        parts[done * count // checkpoint.nbytes].append(name)
        done += checkpoint.tensors[name].nbytes
    assert all(parts), "a tensor is larger than a shard"
    weight_map = {}
    for number, names in enumerate(parts, 1):
        shard = f"model-{number:05d}-of-{count:05d}.safetensors"
        infos = [checkpoint.tensors[name] for name in names]
        with ShardWriter(folder, shard, [(info.name, info.dtype, info.shape) for info in infos]) as writer:
            for name in names:
                writer.write(name, checkpoint.read_bytes(name))
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": checkpoint.nbytes}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    return folder


def as_repo(folder: Path) -> dict[str, bytes]:
    """The files of a folder as `Hub.add` takes them."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder from which files come and go. One that is moved during the walk is met twice and counts once."""
    sizes = {}
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(os.path.join(path, name))
                sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """What lies in `folder` while the block runs, looked at all the time: the most that was seen, as the list's one value."""
    most, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.001):
            most[0] = max(most[0], bytes_in(folder))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()
