"""`evaluate_endpoint` against the real vLLM serving tiny-m2: its figures are the streamed ones to float32 rounding."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from m3quant.calibration.corpus import load_tokenizer
from m3quant.calibration.stream import nll
from m3quant.engines import DEFAULT
from m3quant.evaluate import needle, position
from m3quant.evaluate.endpoint import GENERATED, evaluate_endpoint
from m3quant.evaluate.haystack import Reach
from m3quant.evaluate.models import open_model
from m3quant.evaluate.task import Predictions
from tests.support.engine.running import ENV, KV_BYTES, NEEDS_ENGINE
from tests.support.paths import FIXTURES

pytestmark = NEEDS_ENGINE
FIXTURE = FIXTURES / "tiny-m2"
START_S = 240


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    command = [DEFAULT.find_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(FIXTURE), "--host", "127.0.0.1"]  # fmt: skip
    command += ["--served-model-name", "tiny-m2", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "2048", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(KV_BYTES)]
    env = {**os.environ, **ENV, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=log.parent, start_new_session=True
        )
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(address + "/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_served_figures_are_the_streamed_ones(url: str) -> None:
    tokenizer, config = load_tokenizer(FIXTURE), json.loads((FIXTURE / "config.json").read_text())
    text = (FIXTURE.parent / "heldout.txt").read_text()
    windows = position.make(tokenizer, config, {"text": text, "length": 600, "windows": 4})
    needles = needle.make(tokenizer, config, {"text": text, "lengths": [512], "depths": [0.2, 0.8], "samples": 3})
    record = evaluate_endpoint(url, "tiny-m2", [windows, needles], tokenizer, Reach.of(config))
    assert "prompt log-probs: prompt_logprobs" in record.notes[0]

    ids = torch.from_numpy(np.stack([s.ids for s in windows.sequences()]))
    losses = nll(open_model(FIXTURE).reader, ids).numpy()
    (streamed,) = windows.results([Predictions(row, np.zeros(len(row), dtype=np.int64)) for row in losses], None)
    served, found = record.results
    for name, value in streamed.metrics.items():
        print(name, value, served.metrics[name], served.metrics[name] / value - 1)
        assert abs(served.metrics[name] / value - 1) < 1e-4
    assert found.convention == GENERATED and found.metrics["accuracy"] == 1
