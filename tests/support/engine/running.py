"""How every engine test runs: the marks, the environment, the prompts, the process and the allowed difference."""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

from m3quant.engines import DEFAULT, probing
from m3quant.engines.base import Engine
from m3quant.engines.installed import ENGINE_PYTHON, SAFE_PATH
from m3quant.engines.probing import EngineReport, run_probe

IN_CI = os.environ.get("CI", "").lower() in ("1", "true")
NEEDS_ENGINE = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not os.environ.get(ENGINE_PYTHON) and not IN_CI, reason=f"{ENGINE_PYTHON} is not set (tests/engine/README.md)"
    ),
]

# Absolute differences of log-probs, natural logarithm. Rounding alone gives 2e-6; a token whose 4th and 5th expert score the same
# to 2e-7 (there is one in these prompts) gets another, equally right expert, and later tokens see that at 2e-5 in the median. A
# wrong scale or an unloaded weight moves every token, by 1e-2 and more.
MEDIAN, MEAN = 1e-4, 2e-3
KV_BYTES = 2**27  # vLLM fills its cache with zeros, and a GiB of new pages takes a second or more
ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two engines at once must not be pinned to one core
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # nothing here runs long enough to repay compiling
    "M3QUANT_CPU_ENGINE_ACTIVATIONS": "exact",  # for close agreement; test_engine_activations.py rounds
}


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 500, (length,), generator=generator).tolist() for length in (880, 45)]


def engine(folder: Path) -> EngineReport:
    """What `run_probe` reports of `folder`. The probe runs in a fork of preloaded.py; test_engine_activations.py starts it as m3quant does."""
    with mock.patch.object(probing, "_run", run_preloaded):
        return run_probe(
            DEFAULT, folder, make_prompts(), dtype="float32", env=ENV, timeout_s=300, log=folder / "engine.log",
            kv_cache_memory_bytes=KV_BYTES,
        )  # fmt: skip


def run_preloaded(engine: Engine, command: list[str], log: Path, timeout_s: float) -> int:
    """As `probing._run`: exit code of `command`, which is the engine's Python, a script and its arguments; its output in `log`."""
    process = preloaded(command[0])
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps([str(log), *command[1:]]) + "\n")
    process.stdin.flush()
    if not select.select([process.stdout], [], [], timeout_s)[0]:
        process.kill()
        preloaded.cache_clear()
        pytest.fail(f"the engine did not finish within {timeout_s:.0f} s:\n{log.read_text(errors='replace')[-3000:]}")
    answer = process.stdout.readline()
    if not answer:
        preloaded.cache_clear()
        pytest.fail(f"preloaded.py ended with exit code {process.wait()}")
    return int(answer)


@functools.cache
def preloaded(python: str) -> subprocess.Popen[str]:
    """The process of preloaded.py; it ends when this one does, which closes its standard input."""
    return subprocess.Popen(
        [python, str(Path(__file__).with_name("preloaded.py"))], env={**os.environ, **ENV, **SAFE_PATH},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
