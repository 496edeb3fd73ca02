"""Makers of hostile files and folders, small on the disk and large for whoever reads them whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(checkpoint: Path, cache: Path, shared: bool = False) -> Path:
    """The files of `checkpoint` as the Hub's cache keeps them: snapshots/COMMIT/NAME -> blobs/ETAG. Returns the snapshot.

    shared: blobs/ETAG are links into the store of the whole cache, as huggingface_hub 2.4 makes them.
    """
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "blobs").mkdir(parents=True)
    for file in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        data = file.read_bytes()
        blob = repo / "blobs" / hashlib.sha256(data).hexdigest()
        if shared:
            store = cache / "blobs" / blob.name[:2] / blob.name
            store.parent.mkdir(parents=True, exist_ok=True)
            store.write_bytes(data)
            blob.unlink(missing_ok=True)
            blob.symlink_to(os.path.relpath(store, blob.parent))
        else:
            blob.write_bytes(data)
        link = snapshot / file.relative_to(checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def sparse(path: Path, size: int, start: bytes = b"") -> Path:
    """A file of `size` bytes that takes none on the disk but for its start."""
    path.write_bytes(start)
    os.truncate(path, size)
    return path


def alias_bomb(levels: int = 9, width: int = 10, leaf: str = "x") -> str:
    """YAML whose aliases stand for width^levels values, under the key `license`."""
    lines = [f"a0: &a0 [{', '.join([leaf] * width)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"license: *a{levels - 1}", ""])


YAML: dict[str, Callable[[], str]] = {
    "aliases": alias_bomb,
    "aliases of a long text": lambda: f"a: &a {'y' * 50_000}\nlicense: [{', '.join(['*a'] * 1000)}]\n",
    "merged mappings": lambda: "".join(
        [
            "a0: &a0 {k: 1}\n",
            *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 12)}]}}\n" for n in range(1, 9)),
        ]
    ),
    "an alias in its own anchor": lambda: "license: &a [*a]\n",
    "depth, flow": lambda: "license: " + "[" * 5_000,
    "depth, block": lambda: "- " * 5_000,
    "many values": lambda: "license: [" + "1," * 20_100 + "]\n",
    "a number in base 60": lambda: "license: " + "1:" * 20_000 + "1\n",
    "a number of many digits": lambda: "license: " + "9" * 5000 + "\n",
    "size": lambda: "license: " + "x" * 1_200_000 + "\n",
}
