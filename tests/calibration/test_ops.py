"""The reference maths against direct float64 formulas."""

import pytest
import torch

from m3quant.calibration import ops
from m3quant.calibration.ops import Activation, Routing

SILU = Activation("silu")
OAI = Activation("swigluoai", alpha=1.702, limit=1.5, beta=1.0)


def randn(*shape: int, seed: int, std: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def gate_reference(gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
    """Element by element, in Python floats."""
    out = []
    for g, u in zip(gate.flatten().tolist(), up.flatten().tolist(), strict=True):
        if act.kind == "swigluoai":
            g, u = min(g, act.limit), max(-act.limit, min(act.limit, u)) + act.beta
            slope = act.alpha
        else:
            slope = 1.0
        out.append(g / (1 + torch.exp(torch.tensor(-slope * g, dtype=torch.float64)).item()) * u)
    return torch.tensor(out, dtype=torch.float64).view(gate.shape)


def experts_reference(
    h: torch.Tensor, routing: Routing, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor, act: Activation
) -> torch.Tensor:
    """Token by token, slot by slot, in float64."""
    out = torch.zeros(h.shape, dtype=torch.float64)
    for token in range(h.shape[0]):
        x = h[token].double()
        for expert, weight in zip(routing.experts[token].tolist(), routing.weights[token].tolist(), strict=True):
            inner = gate_reference(w1[expert].double() @ x, w3[expert].double() @ x, act)
            out[token] += weight * (w2[expert].double() @ inner)
    return out


def random_experts(experts: int, inner: int, hidden: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        randn(experts, inner, hidden, seed=seed, std=hidden**-0.5),
        randn(experts, inner, hidden, seed=seed + 1, std=hidden**-0.5),
        randn(experts, hidden, inner, seed=seed + 2, std=inner**-0.5),
    )


def random_routing(tokens: int, experts: int, k: int, seed: int) -> Routing:
    scores = randn(tokens, experts, seed=seed)
    return Routing(scores.topk(k, dim=-1).indices, randn(tokens, k, seed=seed + 1).sigmoid())


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("act", [SILU, OAI], ids=lambda act: act.kind)
@pytest.mark.parametrize("tokens", [1, 37])
def test_experts_forward_equals_the_per_token_sum(act: Activation, tokens: int) -> None:
    h, weights = randn(tokens, 24, seed=1), random_experts(9, 16, 24, seed=2)
    routing = random_routing(tokens, 9, 3, seed=7)
    assert relative(ops.experts_forward(h, routing, *weights, act), experts_reference(h, routing, *weights, act)) < 1e-6


def test_experts_may_be_lists_of_matrices_in_bf16() -> None:
    h, stacks = randn(20, 24, seed=1), [w.bfloat16() for w in random_experts(5, 16, 24, seed=2)]
    routing = random_routing(20, 5, 2, seed=7)
    expected = ops.experts_forward(h, routing, *(w.float() for w in stacks), SILU)
    assert torch.equal(ops.experts_forward(h, routing, *(list(w) for w in stacks), SILU), expected)


def test_an_expert_without_tokens_is_not_read() -> None:
    h, (w1, w3, w2) = randn(6, 24, seed=1), random_experts(4, 16, 24, seed=2)
    routing = Routing(torch.tensor([[0, 3]]).expand(6, 2), torch.full((6, 2), 0.5))
    expected = ops.experts_forward(h, routing, w1, w3, w2, SILU)
    w1[1:3] = float("nan")
    assert torch.equal(ops.experts_forward(h, routing, w1, w3, w2, SILU), expected)


def test_the_k_results_of_a_token_sum_in_float32() -> None:
    h, weights = randn(16, 32, seed=1).bfloat16(), [w.bfloat16() for w in random_experts(8, 16, 32, seed=2)]
    routing = random_routing(16, 8, 8, seed=7)
    found = ops.experts_forward(h, routing, *weights, SILU)
    assert found.dtype == torch.bfloat16
    assert relative(found, experts_reference(h, routing, *weights, SILU)) < 4e-3


@pytest.mark.parametrize("limit", [1 << 17, 20, 1])
def test_padded_products_equal_the_loop(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(ops, "_PADDED_ROWS", limit)
    sizes = [0, 5, 1, 0, 0, 9, 2, 0]
    x, weight = randn(sum(sizes), 12, seed=1), randn(len(sizes), 7, 12, seed=2)
    expected = torch.cat([part @ weight[i].T for i, part in enumerate(x.split(sizes))])
    assert relative(ops._padded_bmm(x, weight, sizes), expected) < 1e-6
    assert relative(ops.grouped_linear(x, weight, torch.tensor(sizes)), expected) < 1e-6


def test_sort_by_expert_keeps_token_order_within_an_expert() -> None:
    routing = random_routing(50, 6, 2, seed=3)
    pairs, tokens, counts = ops.sort_by_expert(routing, 6)
    flat = routing.experts.flatten()
    assert torch.equal(flat[pairs], flat.sort().values)
    assert counts.tolist() == [int((flat == expert).sum()) for expert in range(6)]
    for group in tokens.split(counts.tolist()):
        assert torch.equal(group, group.sort().values)


def test_the_bias_chooses_experts_but_does_not_weigh_them() -> None:
    h, gate = randn(40, 16, seed=1), randn(6, 16, seed=2, std=0.25)
    bias = torch.tensor([0.0, 5.0, 0.0, 0.0, 4.0, 0.0])
    routing = ops.route(h, gate, bias, 2, 2.5)
    assert torch.equal(routing.experts.sort(dim=-1).values, torch.tensor([1, 4]).expand(40, 2))
    scores = torch.sigmoid(h.double() @ gate.double().T).gather(1, routing.experts)
    assert relative(routing.weights, 2.5 * scores / scores.sum(-1, keepdim=True)) < 1e-6
    assert routing.weights.dtype == torch.float32


def test_a_router_without_bias_takes_the_highest_scores() -> None:
    h, gate = randn(40, 16, seed=1), randn(6, 16, seed=2)
    expected = (h.double() @ gate.double().T).topk(3, dim=-1).indices.sort(dim=-1).values
    assert torch.equal(ops.route(h, gate, None, 3, 1.0).experts.sort(dim=-1).values, expected)


@pytest.mark.parametrize("one_plus", [False, True])
def test_rms_norm(one_plus: bool) -> None:
    x, weight = randn(5, 3, 32, seed=1, std=4.0), randn(32, seed=2)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (weight.double() + one_plus)
    assert relative(ops.rms_norm(x, weight, 1e-6, one_plus), expected) < 1e-6
    narrow = ops.rms_norm(x.bfloat16(), weight.bfloat16(), 1e-6, one_plus)
    assert narrow.dtype == torch.bfloat16
    assert relative(narrow, expected) < 1e-2


@pytest.mark.parametrize("act", [SILU, OAI], ids=lambda act: act.kind)
def test_gate_inside_and_outside_the_clamps(act: Activation) -> None:
    gate, up = randn(4, 64, seed=1, std=3.0), randn(4, 64, seed=2, std=3.0)
    assert relative(ops.gated(gate, up, act), gate_reference(gate, up, act)) < 1e-6


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="gelu"):
        Activation("gelu")
