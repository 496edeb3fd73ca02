"""What a calibrated conversion imports before its first layer, and what it does without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.convert.common import add_tokenizer, make_source

# Each takes a part of a second or several, on a cold disk more: transformers' modelling code brings all of them.
SLOW = {"torch._dynamo", "torch._inductor", "sympy", "scipy", "sklearn", "pandas", "transformers.modeling_utils"}


def test_a_calibrated_conversion_starts_without_transformers_modelling_code(tmp_path: Path) -> None:
    source = add_tokenizer(make_source(tmp_path / "src", "m2"))
    few = ("--windows", "2", "--window-length", "32", "--min-expert-tokens", "4", "--device", "cpu")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "m3quant", "convert", source, tmp_path / "out", "--to", "awq", *few],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert {"m3quant.calibration.layers", "transformers", "torch"} <= imported
    assert not SLOW & imported
