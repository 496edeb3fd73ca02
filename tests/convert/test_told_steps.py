"""What a conversion, a measurement and an evaluation say that they are doing: nothing that is over stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3quant.checkpoint import Checkpoint
from m3quant.convert.measure import MeasureSettings, measure
from m3quant.planning.fit import Fitting
from m3quant.running.progress import Silent
from m3quant.running.stopping import InterruptedRun
from tests.convert.test_measure import CANDIDATES, DATA
from tests.convert.test_shard_sink import Taking
from tests.support.convert.common import make_plan_of, make_source, random_windows, run_plan
from tests.support.evaluate.measuring import Plain, run, sequence
from tests.support.heard import hearing

LOOKING = "looking at the source and at what is finished"
WRITING = "writing the files beside the shards"


def of_layer(number: int, *words: str) -> list[str]:
    return [f"layer {number} ({number + 1} of 2): {step}" for step in words]


STAGES = (
    "reading", "quantizing", "hidden states of the source", "packing and writing", "hidden states of the output",
)  # fmt: skip


def test_of_a_conversion_without_calibration(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "m2", "m2"), "int4")
    counts = [f"{number} of 3 shards are finished" for number in range(4)]
    with hearing() as heard:
        run_plan(plan, tmp_path / "out", sink=Taking())
    first = "reading embeddings, head and the rest"
    assert heard.words == [LOOKING, first, *counts, "waiting for the last uploads", WRITING]


def test_of_a_calibrated_conversion_and_one_that_goes_on(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "m2", "m2"), "awq")
    entering = "hidden states that enter the first layer"
    end = ["perplexity and KL divergence of the held-out windows", "writing the last layers", WRITING]

    class Stopping(Silent):
        def say(self, line: str) -> None:
            if line.startswith("layer 0"):
                raise InterruptedRun(2, "stopped")

    with hearing() as heard:
        run_plan(plan, tmp_path / "out")
    begun = [LOOKING, "reading embeddings, head and the rest", entering]
    assert heard.words == [*begun, *of_layer(0, *STAGES), *of_layer(1, *STAGES), *end]
    with pytest.raises(InterruptedRun):
        run_plan(plan, tmp_path / "again", progress=Stopping(), boundary_every=2)
    with hearing() as heard:
        run_plan(plan, tmp_path / "again", boundary_every=2)
    again = of_layer(0, "reading", "hidden states are computed again")
    assert heard.words == [LOOKING, "checking finished shards", entering, *again, *of_layer(1, *STAGES), *end]


def test_of_a_measurement(tmp_path: Path) -> None:
    fitting = Fitting(Checkpoint.open(make_source(tmp_path / "m3", "m3")), DATA, candidates=CANDIDATES)
    with hearing() as heard:
        measure(fitting, random_windows(fitting.base), "text", MeasureSettings(), Silent())
    assert heard.words[0] == "hidden states that enter the first layer"
    for number in (0, 1):
        own = [words for words in heard.words if words.startswith(f"layer {number} ")]
        assert own[0].endswith(": reading") and own[-1].endswith(": hidden states that leave it") and len(own) > 4
    assert heard.words[-1] == "predictions of the whole models"


def test_of_an_evaluation(tmp_path: Path) -> None:
    source = make_source(tmp_path / "m2", "m2")
    with hearing() as heard:
        run(source, None, [Plain([sequence(40)])])
    layers = [words for number in (0, 1) for one in of_layer(number, "reading") for words in (one, one[:-9])]
    assert heard.words == [
        "looking at the checkpoints and at what is finished",
        "hidden states that enter the first layer",
        *layers,
        "logits of the scored tokens",
        "writing what was measured",
    ]
