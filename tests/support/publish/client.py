"""Processes that talk to the test Hub through the real huggingface_hub.

huggingface_hub reads HF_ENDPOINT and HF_HOME when it is imported, and importing takes half a second: one parent process
imports everything once and forks a child for every run, which a test may kill. Every child's sleeps are recorded and cut
short, so that pauses can be checked without waiting. Set M3QUANT_TEST_HUB to a folder with another huggingface_hub
(`pip install --target`) to run the same tests with it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKEN = "hf_SecretOfTheTests0123456789"
READ_TOKEN = "hf_ReadOnlyTokenOfTheTests"
OTHER_HUB = os.environ.get("M3QUANT_TEST_HUB")


@dataclass
class Done:
    """What a run left: exit code (negative: a signal), both streams, seconds of every pause it wanted."""

    code: int
    out: str
    err: str
    pauses: list[float]

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


class Client:
    """The parent process. `run` gives one child a job: what driver.py understands. copies: its huggingface_hub is one that can."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self.process, self.folder = process, folder
        self.seen: list[str] = []
        assert process.stdout is not None
        self.copies: bool = json.loads(process.stdout.readline())["copies"]

    def run(self, job: dict[str, Any], token: str | None = TOKEN, started: Callable[[int], None] | None = None) -> Done:
        assert self.process.stdin is not None and self.process.stdout is not None
        out, err, pauses = (self.folder / name for name in ("out", "err", "pauses"))
        environment = {} if token is None else {"HF_TOKEN": token}
        job = {"environment": environment, "out": str(out), "err": str(err), "pauses": str(pauses)} | job
        pauses.write_text("")
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pid = json.loads(self.process.stdout.readline())["pid"]
        if started:
            started(pid)
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        code = json.loads(self.process.stdout.readline())["code"]
        slept = [float(line) for line in pauses.read_text().split()]
        done = Done(code, out.read_text(), err.read_text(), slept)
        self.seen += [done.out, done.err]
        assert "Traceback" not in done.err, done.err
        return done


@contextmanager
def running_client(url: str, folder: Path, *modules: str) -> Iterator[Client]:
    """modules: what the parent imports besides the upload, so that no child has to."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    settings = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",  # the test server speaks plain LFS
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        **({"PYTHONPATH": OTHER_HUB} if OTHER_HUB else {}),
    }
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("driver.py")), *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**kept, **settings},
    )
    try:
        yield Client(process, folder)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)
