"""Starts the real vLLM, on the CPU, with a small KV cache, with or without the guard, as a user would: `vllm serve --middleware`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import m3quant
from m3quant.engines.installed import ENGINE_PYTHON
from tests.support.paths import FIXTURES

FIXTURE = FIXTURES / "tiny-m2"
BLOCK = 32
ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def importable(folder: Path) -> Path:
    """A folder to put on PYTHONPATH of an environment without m3quant, which holds m3quant and nothing else."""
    folder.mkdir(parents=True)
    (folder / "m3quant").symlink_to(Path(m3quant.__file__).parent)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A vLLM server of `blocks` x BLOCK tokens of KV cache (one of them vLLM's null block)."""

    def __init__(
        self,
        work: Path,
        *,
        guard: bool,
        blocks: int = 65,
        max_model_len: int = 1024,
        checkpoint: Path = FIXTURE,
        env: dict[str, str] | None = None,
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.port = free_port()
        self.log = work / f"server-{self.port}.log"
        command = [os.environ[ENGINE_PYTHON], "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint)]
        command += [
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--served-model-name",
            "tiny",
            "--dtype",
            "float32",
        ]
        command += ["--enforce-eager", "--block-size", str(BLOCK), "--num-gpu-blocks-override", str(blocks)]
        command += ["--max-model-len", str(max_model_len), "--max-num-seqs", "16", *arguments]
        environment = {**os.environ, **ENV, **(env or {})}
        if guard:
            command += ["--middleware", "m3quant.runtime.guard.Guard"]
            path = importable(work / f"path-{self.port}")
            environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_ready(self, timeout_s: float = 240) -> Server:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(OSError):
                if self.get("/health")[0] == 200:
                    return self
            time.sleep(0.5)
        raise RuntimeError(f"the server was not ready in {timeout_s} s:\n{self.tail()}")

    def get(self, path: str, timeout_s: float = 10) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout_s) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        """Each metric's sum over its labels."""
        found: dict[str, float] = {}
        for line in self.get("/metrics")[1].splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, timeout_s: float = 30) -> int:
        """SIGTERM, then the whole process group is killed: a hung engine must not outlive its test."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait(10)


@contextlib.contextmanager
def serving(work: Path, **options: object) -> Iterator[Server]:
    server = Server(work, **options)  # type: ignore[arg-type]
    try:
        yield server.wait_ready()
    finally:
        server.stop()
