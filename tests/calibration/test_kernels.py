"""The kernels and the batched search against plain steps, in Triton's interpreter where there is no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CASES = (
    HERE / "kernel_cases.py",
    HERE / "feedback" / "column_kernel_cases.py",
    HERE / "feedback" / "lane_cases.py",
)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, whose interpreter runs on a CPU")
def test_kernels_give_what_plain_steps_give() -> None:
    """In a process of its own: Triton chooses its interpreter when it is first imported."""
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, CASES)],
        env={**os.environ, **interpreted, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
