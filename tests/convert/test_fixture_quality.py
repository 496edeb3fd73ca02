"""On a trained fixture, calibration pays: `awq` is closer to the source than `int4`, in KL divergence and in perplexity.

tests/benchmarks/rounding_ablation.py has both fixtures, with the figures.
"""

from pathlib import Path

from click.testing import CliRunner

from m3quant.calibration.corpus import load_tokenizer
from m3quant.cli import cli
from m3quant.evaluate.divergence import DivergenceParams, divergence
from m3quant.evaluate.evaluation import Settings, evaluate
from m3quant.evaluate.models import open_model
from m3quant.running.progress import Silent
from tests.support.paths import FIXTURES

WINDOWS = 32  # of 512 tokens, for calibration and again for judging: enough to tell the two apart, quick enough for CI


def test_awq_is_closer_to_the_source_than_rounding(tmp_path: Path) -> None:
    name = "tiny-m3"
    options = {"int4": [], "awq": ["--windows", str(WINDOWS)]}
    for recipe, more in options.items():
        arguments = ["convert", str(FIXTURES / name), str(tmp_path / recipe), "--to", recipe, "--device", "cpu", *more]
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
    source = open_model(FIXTURES / name, "source")
    params = DivergenceParams(data=str(FIXTURES / "heldout.txt"), window=512, max_windows=WINDOWS, noise_windows=1)
    task = divergence(load_tokenizer(FIXTURES / name), source.config, params)
    found, weights = {}, Settings("cpu", activations="exact")  # what calibration works on
    for recipe in options:
        record = evaluate(open_model(tmp_path / recipe), source, [task], "test", None, weights, Silent())
        found[recipe] = record.results[0].metrics
    print(f"\n{name}: {[(recipe, m['kl_mean'], m['nll_difference_mean']) for recipe, m in found.items()]}")
    assert found["awq"]["kl_mean"] < 0.9 * found["int4"]["kl_mean"]
    assert abs(found["awq"]["nll_difference_mean"]) < abs(found["int4"]["nll_difference_mean"])
