"""vLLM's log-probs of an output against m3quant's, with activations rounded and not:

    python -m tests.support.engine.rounding_reference OUT [--length 500] [--dtype float32]      # needs M3QUANT_ENGINE_PYTHON

Also the difference of m3quant in float32 from m3quant in float64: a last bit changes one FP8 code,
and that changes more of them in every product that follows.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from m3quant.calibration.stream import nll
from m3quant.engines import DEFAULT
from m3quant.engines.probing import Difference, EngineReport, difference, run_probe
from m3quant.evaluate.models import open_model
from m3quant.quant.reading import ConvertedReader
from tests.support.engine.running import ENV
from tests.support.paths import FIXTURES
from tests.support.text_windows import text_windows

TEXT = FIXTURES / "heldout.txt"


@dataclass(frozen=True)
class Comparison:
    """rounded, exact: differences from the engine, by whether m3quant rounds activations; own: float32 from float64, rounded.

    loss: mean of (m3quant's loss - the engine's) over all tokens and its standard error, nats, of rounded and exact.
    """

    report: EngineReport
    rounded: Difference
    exact: Difference
    own: Difference
    loss: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        lines = [f"activations rounded: {self.rounded}", f"activations exact:   {self.exact}"]
        lines += [f"float32 from float64: {self.own}"]
        losses = [f"{name} {mean:+.5f} +/- {error:.5f}" for name, (mean, error) in self.loss.items()]
        return "\n".join([*lines, f"mean loss less the engine's: {', '.join(losses)}"])


def compare(folder: Path, length: int, dtype: str = "float32", prompts: int = 2) -> Comparison:
    """Two windows of the fixtures' held-out text through the engine and through the stream."""
    tokens = text_windows(folder, TEXT, length, prompts)
    env = {**ENV, "M3QUANT_CPU_ENGINE_ACTIVATIONS": "engine"}
    report = run_probe(DEFAULT, folder, tokens.tolist(), dtype=dtype, env=env, timeout_s=550, log=folder / "engine.log")
    model = open_model(folder)
    if isinstance(model.reader, ConvertedReader):
        model.reader.dtype = (
            torch.float32
        )  # an engine multiplies codes and scales: weights in BF16 would change other codes
    rounded, exact, wide = (
        -nll(model.reader, tokens, "cpu", own, micro_batch=1, schemes=schemes).double()
        for own, schemes in ((torch.float32, model.schemes), (torch.float32, None), (torch.float64, model.schemes))
    )
    engine = torch.tensor(report.logprobs, dtype=torch.float64)
    loss = {}
    for name, found in (("rounded", rounded), ("exact", exact)):
        gap = (engine - found).flatten()
        loss[name] = (float(gap.mean()), float(gap.std() / len(gap) ** 0.5))
    return Comparison(
        report,
        report.compare(rounded.tolist()),
        report.compare(exact.tolist()),
        difference(rounded.tolist(), wide.tolist()),
        loss,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--length", type=int, default=500)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    print(compare(asked.output, asked.length, asked.dtype, asked.prompts))
