"""What `m3quant convert` writes of dense decoders and of Qwen3-MoE, loaded by the real vLLM on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from m3quant.cli import cli
from tests.support.calibration.tiny_family import make_tiny
from tests.support.engine.reference import reference_logprobs, write_dequantized
from tests.support.engine.running import MEAN, MEDIAN, NEEDS_ENGINE, engine, make_prompts

pytestmark = NEEDS_ENGINE

CALIBRATED = ("--windows=6", "--window-length=96", "--min-expert-tokens=4")
CASES: dict[str, tuple[str, ...]] = {
    "llama3:int4": ("--to=int4",),
    "qwen2:awq": ("--to=awq-all-int4", *CALIBRATED),
    "qwen3:fp8-block": ("--to=fp8-block",),
    "qwen3_moe:awq": ("--to=awq", *CALIBRATED),
    "qwen3_moe:autoawq": ("--to=int4", "--set=attention=int4-g128", "--set=dense_mlp=int4-g128", "--format=autoawq"),
    "qwen3_moe-sums:int4": ("--to=int4",),
}


@pytest.mark.parametrize("case", CASES)
def test_an_engine_reads_other_families(case: str, tmp_path: Path) -> None:
    source = make_tiny(tmp_path / "source", case.partition(":")[0], seed=9)
    output = tmp_path / "out"
    result = CliRunner().invoke(cli, ["convert", str(source), str(output), "--device=cpu", *CASES[case]])
    assert result.exit_code == 0, (result.output, result.exception)
    report = engine(output)
    assert report.problems() == []
    logprobs, top1 = reference_logprobs(write_dequantized(output, tmp_path / "reference"), make_prompts())
    found = report.compare(logprobs, top1)
    print(f"{case}: {found}")
    assert found.median < MEDIAN and found.mean < MEAN, found
