"""Acceptance of the trained draft before tiny-m2 and outputs made of it, by `m3quant bench` with vLLM on the CPU.

    M3QUANT_ENGINE_PYTHON=.venv-engine/bin/python python -m tests.benchmarks.draft_acceptance OUTPUT... --out FILE

OUTPUT: folders that `m3quant convert` made of tests/fixtures/tiny-m2. The likeliest tokens after pieces of held-out text. An output's
figure is held against the source's, as a user does it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.draft_prompts import write_prompts
from tests.support.engine.guarded_server import free_port
from tests.support.engine.running import ENV
from tests.support.paths import FIXTURES

SOURCE, DRAFT = FIXTURES / "tiny-m2", FIXTURES / "tiny-m2-eagle3"
AT_ONCE, ROUNDS, OUTPUT = 4, 8, 48
KEPT = ("acceptance_length", "acceptance_by_guess", "acceptance_share", "requests", "output_tokens")


def m3quant(*words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "m3quant", *map(str, words)], env={**os.environ, **ENV, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def measure(checkpoint: Path, folder: Path, *options: str) -> dict[str, Any]:
    texts = write_prompts(folder / "texts.jsonl", AT_ONCE * ROUNDS)
    found: dict[str, Any] = json.loads(
        m3quant("bench", checkpoint, "--on=cpu:1GiB", f"--concurrency={AT_ONCE}", f"--rounds={ROUNDS}", "--context=1100", f"--output={OUTPUT}",
                f"--texts={texts}", f"--draft={DRAFT}", "--temperature=0", f"--port={free_port()}", f"--log={folder / 'bench.log'}", "--json",
                *options)
    )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("outputs", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = measure(SOURCE, folder)
        (folder / "source.json").write_text(json.dumps(source))
        rows = {"bf16": source["rows"][0]}
        for output in args.outputs:
            compared = measure(output, folder, f"--acceptance-of={folder / 'source.json'}", "--least-acceptance=0.5")
            rows[output.name] = compared["rows"][0]
    document = {
        "target": SOURCE.name,
        "draft": DRAFT.name,
        "engine": source["engine"],
        "temperature": 0,
        "guesses": source["measured_with"]["draft"]["tokens"],
        "rows": {recipe: {key: row[key] for key in KEPT} for recipe, row in rows.items()},
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
