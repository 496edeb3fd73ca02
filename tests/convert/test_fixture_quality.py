"""On the trained fixtures, calibration pays: `awq` is closer to the source than `int4`, in KL divergence and in perplexity."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from m3quant.calibration.stream import compare
from m3quant.cli import cli
from m3quant.perplexity import open_dense, text_windows

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
WINDOWS = 32  # of 512 tokens, for calibration and again for judging: enough to tell the two apart, quick enough for CI


@pytest.mark.parametrize("name", ["tiny-m2", "tiny-m3"])
def test_awq_is_closer_to_the_source_than_rounding(name: str, tmp_path: Path) -> None:
    options = {"int4": [], "awq": ["--windows", str(WINDOWS)]}
    for recipe, more in options.items():
        arguments = ["convert", str(FIXTURES / name), str(tmp_path / recipe), "--to", recipe, "--device", "cpu", *more]
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
    tokens = text_windows(FIXTURES / name, FIXTURES / "heldout.txt", 512, WINDOWS)
    source = open_dense(FIXTURES / name)
    found = {recipe: compare(source, open_dense(tmp_path / recipe), tokens, micro_batch=8)[0] for recipe in options}
    kl = {recipe: float(result.kl.double().mean()) for recipe, result in found.items()}
    excess = {recipe: float((r.nll_quant - r.nll_source).double().mean()) for recipe, r in found.items()}
    perplexity = float(torch.exp(found["awq"].nll_source.double().mean()))
    print(f"\n{name}: perplexity {perplexity:.4f}; KL {kl}; extra nats per token {excess}")
    assert kl["awq"] < 0.9 * kl["int4"]
    assert abs(excess["awq"]) < abs(excess["int4"])
