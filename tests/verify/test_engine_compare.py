"""verify's own side of the comparison with an engine: activations rounded as the schemes say."""

from pathlib import Path
from typing import Any

import pytest
import torch

from m3quant.calibration.stream import nll
from m3quant.engines import DEFAULT
from m3quant.engines.probing import EngineReport
from m3quant.evaluate.models import open_model
from m3quant.verify import engine
from tests.support.convert.common import make_plan_of, make_source, run_plan


def report(logprobs: list[list[float]]) -> EngineReport:
    return EngineReport(
        engine="an engine", version="0", torch="0", python="3", platform="cpu", device="none", parameters=1, tensors=1, missing=[], partial={},
        unexpected=[], never_read=[], skipped={}, engine_check=None, notes=[], kernels=[], seconds={},
        logprobs=logprobs, top1=[[0] * len(row) for row in logprobs],
    )  # fmt: skip


@pytest.mark.parametrize(("to", "said"), [("fp8", "E4M3 per token"), ("int4", "not rounded")])
def test_an_engine_that_rounds_activations_agrees(
    to: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = (
        [f"{role}=int8-g128" for role in ("shared_experts", "dense_mlp", "attention", "indexer")]
        if to == "int4"
        else []
    )
    plan = make_plan_of(make_source(tmp_path / "source", "m2"), to, settings=around)
    run_plan(plan, tmp_path / "out")
    monkeypatch.setattr(engine, "SHORT_PROMPT", 80)
    model = open_model(tmp_path / "out")

    def answers(rounded: bool) -> Any:
        def run_probe(engine: Any, folder: Path, prompts: list[list[int]], **_: Any) -> EngineReport:
            schemes = model.schemes if rounded else None
            return report((-nll(model.reader, torch.tensor(prompts), micro_batch=1, schemes=schemes)).tolist())

        return run_probe

    means = []
    for rounded in (True, False):
        monkeypatch.setattr(engine, "run_probe", answers(rounded))
        check, facts = engine.engine_check(DEFAULT, tmp_path / "out", plan, None, lambda text: None)
        assert check.problems == [] and f"in float32, activations {said}: mean" in check.looked_at
        means.append(facts["logprob_difference"]["mean"])
    assert means[0] == 0 and (means[1] > 0.001) == (to == "fp8")
