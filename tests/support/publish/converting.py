"""Conversions that are published while they run: a small source, its base on the test Hub, and the command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.convert.common import add_tokenizer, make_source
from tests.support.publish.hub_state import Hub
from tests.support.publish.outputs import CARDS, COMMIT, TEXTS, record_download

BASE = "MiniMaxAI/MiniMax-M2"
REPO = "org/tiny-m2"
STAGING = "m3quant-staging"
# What the parent of the client imports, so that no child has to.
IMPORTED = (
    "torch", "m3quant.cli.convert", "m3quant.convert.start", "m3quant.convert.calibrated", "m3quant.publish.streaming.settle",
    "m3quant.publish.streaming.rehearsal", "m3quant.publish.streaming.shard_uploads", "m3quant.verify.verification",
    "m3quant.runtime.serving_table", "m3quant.calibration.mixture",
)  # fmt: skip


def small_source(folder: Path, layers: int = 5, **overrides: Any) -> Path:
    """A tiny random M2 of several layers as if it had been downloaded from BASE."""
    add_tokenizer(make_source(folder, "m2", num_hidden_layers=layers, **overrides))
    (folder / "LICENSE").write_text(TEXTS[BASE], encoding="utf-8")
    (folder / "README.md").write_text(CARDS[BASE], encoding="utf-8")
    record_download(folder)
    return folder


@contextmanager
def hub_with(hub: Hub, source: Path) -> Iterator[None]:
    """The base on the Hub, at the commit that the source records; large files from 100 kB on, in parts of 200 kB."""
    before = hub.lfs_from, hub.part_bytes
    hub.lfs_from, hub.part_bytes = 100_000, 200_000
    paths = [p for p in source.rglob("*") if p.is_file() and ".cache" not in p.parts]
    hub.add(BASE, {str(p.relative_to(source)): p.read_bytes() for p in paths}, large=True, oid=COMMIT)
    try:
        yield
    finally:
        hub.lfs_from, hub.part_bytes = before


def command(
    source: Path | str, out: Path, *options: str, to: str | None = "int4", repo: str = REPO, base: str | None = BASE
) -> dict[str, Any]:
    """The job of one `convert --publish`. to: None where `options` give a recipe."""
    words = ["convert", str(source), str(out), *(["--to", to] if to else []), "--device", "cpu", "--publish", repo]
    return {"cli": [*words, *(["--base-repo", base] if base else []), *options]}


def shards(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.safetensors"))
