"""How every engine test runs: the marks, the environment, the prompts and the allowed difference."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from m3quant.engines import DEFAULT
from m3quant.engines.installed import ENGINE_PYTHON
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
    return run_probe(
        DEFAULT, folder, make_prompts(), dtype="float32", env=ENV, timeout_s=300, log=folder / "engine.log"
    )
