"""What `m3quant convert` writes of the trained fixtures, loaded by the real vLLM on the CPU.

The numbers to agree with come from reading the output back without m3quant (reference.py), so a mistake that convert and verify
share would show here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from m3quant.cli import cli
from tests.support.engine.reference import reference_logprobs, write_dequantized
from tests.support.engine.running import MEAN, MEDIAN, NEEDS_ENGINE, engine, make_prompts
from tests.support.paths import FIXTURES

pytestmark = NEEDS_ENGINE

ALL_INT4 = [f"--set={role}=int4-g128" for role in ("shared_experts", "dense_mlp", "attention", "indexer")]
CASES = {
    "m2-int4": ["--to=int4"],
    "m2-fp8": ["--to=fp8"],
    "m2-fp8-block": ["--to=fp8-block"],
    "m2-autoawq": ["--to=int4", *ALL_INT4, "--format=autoawq"],
    "m3-int4": ["--to=int4"],
    "m3-int4-attention-kept": ["--to=int4", "--set=attention=keep", "--set=indexer=keep"],
    "m3-all-int4-asym": ["--to=int4", *ALL_INT4, "--set=routed_experts=int4-g32-asym"],
    "m3-fp8": ["--to=fp8"],
    "m3-fp8-block": ["--to=fp8-block", "--format=compressed-tensors"],
    "m3-autoawq": ["--to=int4", *ALL_INT4, "--format=autoawq"],
}


@pytest.mark.parametrize("case", CASES)
def test_an_engine_reads_what_convert_writes(case: str, tmp_path: Path) -> None:
    source, output = FIXTURES / f"tiny-{case[:2]}", tmp_path / case
    result = CliRunner().invoke(cli, ["convert", str(source), str(output), "--device=cpu", *CASES[case]])
    assert result.exit_code == 0, (result.output, result.exception)
    report = engine(output)
    assert report.problems() == []
    logprobs, top1 = reference_logprobs(write_dequantized(output, tmp_path / "reference"), make_prompts())
    found = report.compare(logprobs, top1)
    print(f"{case}: {found}")
    assert found.median < MEDIAN and found.mean < MEAN, found
