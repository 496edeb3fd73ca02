"""The expert ledger: what is counted, who is topped up with what, and when it refuses."""

import json

import pytest
import torch

from m3quant.calibration.experts import ExpertLedger, assign_tokens
from m3quant.calibration.ops import Routing, route, router_scores
from m3quant.errors import CalibrationError

TOKENS, EXPERTS, TOP_K, SCALING = 200, 8, 2, 2.0


def routed(bias: torch.Tensor | None = None, seed: int = 0) -> tuple[Routing, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(TOKENS, 16, generator=generator)
    gate = torch.randn(EXPERTS, 16, generator=generator)
    return route(h, gate, bias, TOP_K, SCALING), router_scores(h, gate)


def starving(*experts: int) -> tuple[Routing, torch.Tensor]:
    """A router whose correction bias keeps these experts from ever being chosen."""
    bias = torch.zeros(EXPERTS)
    bias[list(experts)] = -10.0
    return routed(bias)


def test_natural_counts_and_gate_mass_are_the_routers() -> None:
    routing, scores = routed()
    assigned, ledger = assign_tokens(routing, scores, SCALING, layer=5, floor=0)
    for expert in range(EXPERTS):
        mine = routing.experts == expert
        assert ledger.natural[expert] == int(mine.sum())
        assert ledger.gate_mass[expert] == pytest.approx(float(routing.weights[mine].double().sum()), rel=1e-6)
        assert torch.equal(assigned.tokens[expert], mine.any(1).nonzero().flatten())
        assert torch.equal(assigned.weights[expert], routing.weights[mine])
    assert sum(ledger.natural) == TOKENS * TOP_K
    assert sum(ledger.gate_mass) == pytest.approx(TOKENS * SCALING, rel=1e-5)
    assert ledger.topped_up == [0] * EXPERTS


def test_a_starved_expert_gets_its_best_scoring_tokens_once_each() -> None:
    routing, scores = starving(3)
    assigned, ledger = assign_tokens(routing, scores, SCALING, layer=0, floor=20)
    assert ledger.natural[3] == 0
    assert ledger.starved == [3] and ledger.topped_up[3] == 20 and ledger.below_floor == []
    assert torch.equal(assigned.tokens[3], scores[:, 3].sort(descending=True, stable=True).indices[:20])
    others = routing.experts[assigned.tokens[3]]
    score = scores[assigned.tokens[3], 3]
    rivals = scores[assigned.tokens[3]].gather(1, others).sum(1)
    assert torch.allclose(assigned.weights[3], score / (score + rivals) * SCALING)


def test_a_token_that_was_routed_is_not_added_again() -> None:
    routing, scores = routed()
    _, natural = assign_tokens(routing, scores, SCALING, layer=0, floor=0)
    floor = max(natural.natural) + 5
    assigned, ledger = assign_tokens(routing, scores, SCALING, layer=0, floor=floor)
    for expert in range(EXPERTS):
        tokens = assigned.tokens[expert].tolist()
        assert len(tokens) == len(set(tokens)) == max(floor, ledger.natural[expert])
        assert assigned.natural[expert] == ledger.natural[expert] == natural.natural[expert]
        assert tokens[: assigned.natural[expert]] == (routing.experts == expert).any(1).nonzero().flatten().tolist()


def test_a_floor_above_the_corpus_takes_all_tokens_and_says_so() -> None:
    routing, scores = starving(1, 6)
    assigned, ledger = assign_tokens(routing, scores, SCALING, layer=0, floor=TOKENS + 1)
    assert all(sorted(tokens.tolist()) == list(range(TOKENS)) for tokens in assigned.tokens)
    assert ledger.below_floor == list(range(EXPERTS))
    assert ledger.summary()["below_floor"] == EXPERTS


def test_strict_coverage_names_layer_experts_counts_and_remedy() -> None:
    routing, scores = starving(1, 6)
    with pytest.raises(CalibrationError) as refusal:
        assign_tokens(routing, scores, SCALING, layer=17, floor=4, strict=True)
    text = str(refusal.value)
    assert "layer 17" in text and "2 of 8 experts" in text and "1 (0), 6 (0)" in text
    assert "--min-expert-tokens" in text and "--strict-coverage" in text


def test_strict_coverage_is_silent_when_everyone_is_fed() -> None:
    routing, scores = routed()
    _, ledger = assign_tokens(routing, scores, SCALING, layer=0, floor=1, strict=True)
    assert min(ledger.natural) >= 1


def test_the_ledger_survives_json_and_sums_up() -> None:
    routing, scores = starving(0)
    _, ledger = assign_tokens(routing, scores, SCALING, layer=2, floor=10)
    again = ExpertLedger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again == ledger
    summary = ledger.summary()
    counts = sorted(ledger.natural)
    assert (summary["min"], summary["median"], summary["max"]) == (0, counts[4], counts[-1])
    assert summary["topped_up"] == 1 and summary["zero_natural"] == 1 and summary["tokens_added"] == 10


def test_a_lost_batch_is_noticed() -> None:
    ledger = ExpertLedger(0, tokens=10, top_k=2, floor=0, natural=[10, 9], gate_mass=[1.0, 1.0], topped_up=[0, 0])
    with pytest.raises(AssertionError, match="19 routed pairs counted, 10 tokens x 2 fed"):
        ledger.check()


def test_the_correction_bias_does_not_change_which_tokens_are_best() -> None:
    routing, scores = starving(3)
    biased = scores + torch.linspace(-1, 1, EXPERTS)
    assert torch.equal(biased[:, 3].argsort(stable=True), scores[:, 3].argsort(stable=True))
    first, _ = assign_tokens(routing, scores, SCALING, layer=0, floor=12)
    second, _ = assign_tokens(routing, scores, SCALING, layer=0, floor=12)
    assert torch.equal(first.tokens[3], second.tokens[3])
