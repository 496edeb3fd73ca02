"""A finished output with a known base, for the publish tests: a fixture converted data-free, a licence, the Hub's download records."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from m3quant.checkpoint.origin import METADATA_FOLDER
from m3quant.runtime.serving_table import MeasuredSpeed
from tests.support.convert.common import run_convert
from tests.support.paths import FIXTURES

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Texts of our own with the title and the sentences by which each licence is known; not the licences themselves.
TEXTS = {
    "MiniMaxAI/MiniMax-M2": (
        "MIT License\n\nCopyright 2025 MiniMax AI.\n\nA stand-in for the licence.\n\nOur only modification is that products with more\n"
        "than 100 million monthly active users shall prominently\ndisplay “MiniMax M2” on the user interface.\n"
    ),
    "MiniMaxAI/MiniMax-M2.1": (
        "MIT License\nCopyright 2025 MiniMax AI.\nOur only modification is that products with more than 100 million monthly\n"
        "active users shall prominently display “MiniMax M2.1” on the user interface.\n"
    ),
    "MiniMaxAI/MiniMax-M2.5": "MINIMAX MODEL LICENSE\nMiniMax-M2.5 Version\nA stand-in for the licence.\n",
    "MiniMaxAI/MiniMax-M2.7": (
        "NON-COMMERCIAL LICENSE\nCopyright (c) 2026 MiniMax\nA stand-in. Commercial users display “Built with MiniMax M2.7”\n"
        "and need a prior written\nauthorization.\n"
    ),
    "MiniMaxAI/MiniMax-M3": (
        "MINIMAX COMMUNITY LICENSE\nCopyright (c) 2026 MiniMax\nA stand-in. Commercial users display “Built with MiniMax M3”.\n"
    ),
}
CARDS = {
    "MiniMaxAI/MiniMax-M3": "---\nlicense: other\nlicense_name: minimax-community\nlicense_link: LICENSE\n---\n# MiniMax-M3\n",
    "MiniMaxAI/MiniMax-M2": "---\nlicense: other\nlicense_name: modified-mit\n---\n# MiniMax-M2\n",
}


def source_like(
    folder: Path, family: str = "m3", base: str | None = "MiniMaxAI/MiniMax-M3", *, downloaded: bool = True
) -> Path:
    """A copy of the trained fixture with the licence and card of `base`, and the records that hf download would leave."""
    shutil.copytree(FIXTURES / f"tiny-{family}", folder)
    if base in TEXTS:
        (folder / "LICENSE").write_text(TEXTS[base], encoding="utf-8")
    if base in CARDS:
        (folder / "README.md").write_text(CARDS[base], encoding="utf-8")
    if downloaded:
        record_download(folder)
    return folder


def record_download(folder: Path, commit: str = COMMIT) -> None:
    """Write .cache/huggingface/download/*.metadata as huggingface_hub does: commit, etag, time."""
    for path in [p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts]:
        data = path.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        if path.suffix != ".safetensors":
            etag = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        record = folder / METADATA_FOLDER / f"{path.relative_to(folder)}.metadata"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{commit}\n{etag}\n1700000000.5\n", encoding="utf-8")


def converted(source: Path, out: Path, to: str = "int4") -> Path:
    run_convert(source, out, to)
    return out


def manifest_of(out: Path) -> dict[str, object]:
    manifest: dict[str, object] = json.loads((out / "m3quant.json").read_text(encoding="utf-8"))
    return manifest


@dataclass(frozen=True)
class Row:
    """A row of the serving table."""

    node: str
    fits: bool
    kv_dtype: str = "fp8"
    pool_tokens: int = 0
    longest_context: int = 0
    command: str = ""
    why_not: str = ""
    speeds: tuple[MeasuredSpeed, ...] = ()


def serving(out: Path) -> list[Row]:
    command = f"vllm serve {out} --max-model-len 8192 --tool-call-parser minimax_m3"
    return [
        Row("1xH100", False, why_not="weights of 230.4 GB exceed 80 GB"),
        Row("2xH200", True, "bf16", 400_000, 400_000, command),
        Row("2xH200", True, "fp8", 800_000, 800_000, f"{command} --kv-cache-dtype fp8"),
    ]
