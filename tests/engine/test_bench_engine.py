"""`m3quant bench` with the real vLLM on the CPU, its server behind the guard and its own load generator."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.engine.running import ENV, NEEDS_ENGINE
from tests.support.paths import FIXTURES

pytestmark = NEEDS_ENGINE


def test_a_checkpoint_is_measured(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "m3quant", "bench", str(FIXTURES / "tiny-m2"), "--on=cpu:2GiB", "--concurrency=1,4", "--context=256",
         "--output=8", "--rounds=1", f"--port={port}", f"--log={tmp_path / 'bench.log'}", "--start-timeout=240", "--json"],
        env={**os.environ, **ENV, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["guard"], row["concurrency"], row["completed"], row["output_tokens"]) for row in rows] == [
        (True, 1, 1, 8), (True, 4, 4, 32),
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["ttft_ms"]["50"] <= row["ttft_ms"]["99"] and 0 < row["itl_ms"]["50"] <= row["itl_ms"]["99"]
        assert row["decode_tokens_per_s"] > row["output_tokens_per_s"] > 0  # the second has the prompts' time too
    log = (tmp_path / "bench.log").read_text()
    assert "m3quant guard:" in log and "Shutting down" in log
