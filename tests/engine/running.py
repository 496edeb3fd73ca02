"""How every engine test runs: the marks, the environment, the prompts and the allowed difference."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from m3quant.engine import ENGINE_PYTHON, EngineReport, run_engine

IN_CI = os.environ.get("CI", "").lower() in ("1", "true")
NEEDS_ENGINE = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not os.environ.get(ENGINE_PYTHON) and not IN_CI, reason=f"{ENGINE_PYTHON} is not set (tests/engine/README.md)"
    ),
]

# Absolute differences of log-probs, natural logarithm. The median is rounding alone and leaves no room for a wrong weight. The mean
# does for single tokens whose 4th and 5th expert, or block, score the same to the last bits: either choice is right.
MEDIAN, MEAN = 1e-5, 2e-3
ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two engines at once must not be pinned to one core
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # nothing here runs long enough to repay compiling
}


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 500, (length,), generator=generator).tolist() for length in (880, 45)]


def engine(folder: Path) -> EngineReport:
    return run_engine(folder, make_prompts(), dtype="float32", env=ENV, timeout_s=300, log=folder / "engine.log")
