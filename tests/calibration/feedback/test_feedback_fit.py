"""Held-out rows: their error equals the one computed from the rows, and a weight without a gain is rounded to nearest."""

from dataclasses import replace

import pytest
import torch

from m3quant.calibration.feedback import fit as fitting
from m3quant.calibration.feedback.evidence import NORMED, estimate
from m3quant.calibration.feedback.fit import NOT_JUDGED, WORSE, block_log, fit
from m3quant.calibration.feedback.heldout import Readers, aimed, heldout_errors, joined_by_scheme
from m3quant.calibration.feedback.moments import Moments
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.feedback.solve import Solver
from m3quant.schemes import Scheme
from tests.support.calibration.feedback_cases import SCHEMES, moments_of, normal, rows, stacked

WIDTH, COUNT = 64, 400
SCHEME = SCHEMES["int4-g64"]
SETTINGS = FeedbackSettings(rounds=1)


def case(x: torch.Tensor, seed: int = 0, inputs: bool = True) -> tuple[Moments, torch.Tensor, torch.Tensor]:
    """(moments, rows of the second half, what they fall short of)."""
    half = torch.arange(len(x)) >= len(x) // 2
    error = 0.1 * normal(len(x), WIDTH if inputs else 40, seed=seed + 50)
    return moments_of(x, error, torch.ones(len(x)), half), x[half], error[half]


@pytest.mark.parametrize("inputs", [True, False])
def test_heldout_errors_are_those_of_the_rows(inputs: bool) -> None:
    own, x, short = case(rows(1, COUNT, WIDTH)[0], inputs=inputs)
    weight = normal(1, 40, WIDTH, seed=2)
    readers = Readers.of([weight], SCHEME, inputs)
    nearest, found = heldout_errors(own, readers, NORMED, None, SETTINGS)

    picked = torch.arange(32) * 40 // 32
    part = weight[:, picked]
    known = estimate(own, NORMED, None, 0)
    sampled, chosen = readers.sampled()
    assert torch.equal(chosen, picked)
    quick = replace(SETTINGS, rounds=0)
    plain = Solver(part, known.second, SCHEME, quick)
    solved = Solver(aimed(sampled, known, chosen), known.second, SCHEME, quick).solve()
    output = x.double() @ part[0].double().T
    wanted = output + (short.double() @ part[0].double().T if inputs else short[:, picked].double())
    energy = output.square().sum()
    constant = (wanted - output).square().sum() / energy
    for error, values in ((nearest, plain.stored(plain.nearest())), (found, solved.stored)):
        direct = (wanted - x.double() @ values.dequantized()[0].double().T).square().sum() / energy - constant
        assert float(error) == pytest.approx(float(direct), rel=1e-3, abs=1e-6)


def test_feedback_that_helps_on_heldout_rows_is_kept() -> None:
    parts = stacked([case(x, seed)[0] for seed, x in enumerate(rows(2, COUNT, WIDTH))])
    readers = Readers.of([normal(2, 40, WIDTH), normal(2, 24, WIDTH, seed=1)], SCHEME, True)
    first, second = fit(parts, readers, NORMED, None, SETTINGS)
    assert tuple(first.stored.codes.shape) == (2, 40, WIDTH) and tuple(second.stored.codes.shape) == (2, 24, WIDTH)
    for verdict in (*first.verdicts, *second.verdicts):
        assert verdict.notes == [] and verdict.heldout[1] < verdict.heldout[0] and verdict.error[1] < verdict.error[0]


def test_an_expert_that_does_not_gain_is_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = stacked([case(x, seed)[0] for seed, x in enumerate(rows(3, COUNT, WIDTH))])
    readers = Readers.of([normal(3, 40, WIDTH), normal(3, 24, WIDTH, seed=1)], SCHEME, True)
    good = fit(parts, readers, NORMED, None, SETTINGS)
    verdict = torch.tensor([[0.0, 0.0], [2.0, 0.0], [torch.nan, 0.0]])
    monkeypatch.setattr(fitting, "heldout_errors", lambda *_: (torch.ones(3, 2), verdict))
    first, second = fit(parts, readers, NORMED, None, SETTINGS)
    assert [v.notes for v in first.verdicts] == [[], [WORSE], [NOT_JUDGED]]
    assert torch.equal(second.stored.codes, good[1].stored.codes)
    plain = Solver(readers.weight, estimate(parts, NORMED).second, SCHEME, SETTINGS)
    nearest = plain.stored(plain.nearest())
    assert torch.equal(first.stored.codes[0], good[0].stored.codes[0])
    assert torch.equal(first.stored.codes[1:], nearest.codes[1:, :40])
    assert torch.equal(first.stored.scale[1:], nearest.scale[1:, :40])
    assert first.verdicts[2].to_json()["heldout"] == [1.0, None]


def test_a_half_that_contradicts_the_other_is_not_believed() -> None:
    """What the first half says is missing, the second says is too much: plain rounding stays."""
    x = rows(1, COUNT, WIDTH)[0]
    half = torch.arange(COUNT) >= COUNT // 2
    error = torch.where(half[:, None], -0.5, 0.5) * x
    (found,) = fit(
        moments_of(x, error, torch.ones(COUNT), half),
        Readers.of([normal(1, 40, WIDTH)], SCHEME, True),
        NORMED,
        None,
        SETTINGS,
    )
    assert found.verdicts[0].notes == [WORSE]


@pytest.mark.parametrize("name", ["fp8-block", "int2-g64-asym", "int8-channel"])
def test_rejected_weights_of_any_scheme_are_cut_at_their_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = case(rows(1, COUNT, WIDTH)[0])[0]
    readers = Readers.of([normal(1, 128, WIDTH), normal(1, 72, WIDTH, seed=1)], SCHEMES[name], True)
    monkeypatch.setattr(fitting, "heldout_errors", lambda *_: (torch.ones(1, 2), torch.tensor([[0.0, 2.0]])))
    kept, rejected = fit(own, readers, NORMED, None, SETTINGS)
    plain = Solver(readers.weight, estimate(own, NORMED).second, SCHEMES[name], SETTINGS)
    nearest = plain.stored(plain.nearest()).dequantized()
    assert torch.equal(rejected.stored.dequantized(), nearest[:, 128:])
    assert not torch.equal(kept.stored.dequantized(), nearest[:, :128])


def test_weights_of_one_scheme_are_solved_together() -> None:
    block = Scheme("fp8", 8, block=True)
    assert joined_by_scheme({"q": (SCHEME, 5), "k": (block, 128), "v": (SCHEME, 7), "i": (block, 100), "o": (block, 256)}) == [
        ("q", "v"), ("k", "o"), ("i",),
    ]  # fmt: skip


def test_a_block_without_quantized_weights_says_so() -> None:
    assert block_log("attention", {}) == {"block": "attention", "groups": [], "chosen": "unquantized"}
