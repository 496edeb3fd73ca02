"""Reference maths of decoder layers, as functions on tensors.

Formulas: transformers 5.23 `models/minimax_m2`, `minimax_m3_vl`, `llama`, `qwen3_moe`. Norms, router scores and the gate are
computed in float32 (float64 inputs stay float64) whatever the compute dtype; a weight stored in another dtype than the
activation is converted one matrix at a time, so that a BF16 layer never exists twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from m3quant.calibration.routers import scores_of
from m3quant.families.spec import SILU, Activation
from m3quant.quant.activations import round_activations
from m3quant.schemes import Activations

# One kind of matrix for all experts of a layer: a stack [E, N, K], or E matrices [N, K] kept where they were read.
Experts = torch.Tensor | Sequence[torch.Tensor]

# Above this many padded rows the batched fallback of `grouped_linear` would spend its memory on padding.
_KERNEL_GROUPS = 512  # torch 2.11 refuses 1,024
_PADDED_ROWS = 1 << 17


@dataclass(frozen=True)
class Routing:
    """Which experts a token goes to. experts: [T, k] int64; weights: [T, k] float32, normalised and scaled."""

    experts: torch.Tensor
    weights: torch.Tensor


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or unchanged where it already is float32 or float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., K] times weight [N, K] transposed, in x's dtype; a weight of another dtype is converted for this call."""
    return F.linear(x, weight if weight.dtype == x.dtype else weight.to(x.dtype))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, one_plus: bool) -> torch.Tensor:
    """RMSNorm over the last dimension, [..., K] -> [..., K] in x's dtype, float32 inside.

    one_plus: multiply by 1 + weight (Gemma style); otherwise by weight.
    """
    wide = at_least_float32(x)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    scale = weight.to(wide.dtype)
    return (normed * (1.0 + scale if one_plus else scale)).to(x.dtype)


def gated(gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
    """act(gate) combined with up, elementwise; float32 inside, result in gate's dtype.

    silu:      silu(gate) * up
    swigluoai: (clamp(up, -limit, limit) + beta) * g * sigmoid(alpha * g), with g = min(gate, limit)
    """
    g, u = at_least_float32(gate), at_least_float32(up)
    if act.kind == SILU:
        return (F.silu(g) * u).to(gate.dtype)
    g = g.clamp(max=act.limit)
    u = u.clamp(min=-act.limit, max=act.limit)
    return ((u + act.beta) * g * torch.sigmoid(act.alpha * g)).to(gate.dtype)


def glu_mlp(
    x: torch.Tensor,
    gate_proj: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act: Activation,
    hidden: Activations | None = None,
) -> torch.Tensor:
    """A dense or shared MLP: x [..., H], gate_proj and up_proj [I, H], down_proj [H, I] -> [..., H] in x's dtype.

    x: as gate and up read it. hidden: how what down reads is rounded.
    """
    return linear(round_activations(gated(linear(x, gate_proj), linear(x, up_proj), act), hidden), down_proj)


def linear_with_bias(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear`, plus a bias [N] in x's dtype if there is one."""
    out = linear(x, weight)
    return out if bias is None else out + bias.to(x.dtype)


def router_scores(h: torch.Tensor, gate_weight: torch.Tensor, kind: str = "sigmoid") -> torch.Tensor:
    """What a router of that kind makes of h @ gate_weight.T: h [T, H], gate_weight [E, H] -> [T, E] float32."""
    wide = at_least_float32(h)
    return scores_of(kind)(F.linear(wide, gate_weight.to(wide.dtype)))


def route(
    h: torch.Tensor,
    gate_weight: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    scaling: float,
    *,
    kind: str = "sigmoid",
    normalise: bool = True,
) -> Routing:
    """Choose top_k experts per token. h [T, H], gate_weight [E, H] and bias [E] as stored.

    The bias takes part in the choice only; the weights are the plain scores of the chosen experts, divided by their sum if
    the model normalises, times `scaling` (routed_scaling_factor; transformers multiplies the routed sum instead, which is
    the same number).
    """
    scores = router_scores(h, gate_weight, kind)
    choice = scores if bias is None else scores + bias.to(scores.dtype)
    experts = torch.topk(choice, top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    return Routing(experts, (weights / weights.sum(dim=-1, keepdim=True) if normalise else weights) * scaling)


def sort_by_expert(routing: Routing, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Order the T*k (token, slot) pairs by expert.

    Returns pairs [T*k] int64 (flat index token * k + slot, grouped by expert, token order kept within a group),
    tokens [T*k] int64 (the token of each pair) and counts [E] int64 (pairs per expert).
    """
    flat = routing.experts.reshape(-1)
    pairs = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    return pairs, pairs // routing.experts.shape[1], counts


def experts_forward(
    h: torch.Tensor,
    routing: Routing,
    w1: Experts,
    w3: Experts,
    w2: Experts,
    act: Activation,
    rounding: tuple[Activations | None, Activations | None] = (None, None),
) -> torch.Tensor:
    """Weighted sum of the chosen experts: h [T, H], w1 and w3 [E, I, H] (gate, up), w2 [E, H, I] -> [T, H], h's dtype.

    Each of w1, w3, w2 is a stack or a sequence of E matrices. Pairs are sorted by expert, and only experts with tokens
    are computed. Stacks on CUDA take three grouped products; otherwise one expert at a time, converting that expert's
    weights alone. The k results of a token are summed in float32 in slot order: deterministic, where an atomic
    scatter-add would not be. rounding: how the experts' inputs are rounded, and what w2 reads.
    """
    pairs, tokens, counts = sort_by_expert(routing, len(w1))
    x = round_activations(h, rounding[0])[tokens]
    if isinstance(w1, torch.Tensor) and isinstance(w3, torch.Tensor) and isinstance(w2, torch.Tensor) and h.is_cuda:
        hidden = gated(grouped_linear(x, w1, counts), grouped_linear(x, w3, counts), act)
        y = grouped_linear(round_activations(hidden, rounding[1]), w2, counts)
    else:
        y = torch.empty_like(x)
        start = 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                rows = slice(start, start + count)
                y[rows] = glu_mlp(x[rows], w1[expert], w3[expert], w2[expert], act, rounding[1])
                start += count
    position = torch.empty_like(pairs)
    position[pairs] = torch.arange(pairs.shape[0], device=pairs.device)
    position = position.view(routing.experts.shape)
    out = torch.zeros(h.shape, dtype=at_least_float32(h[:0]).dtype, device=h.device)
    for slot in range(position.shape[1]):
        out.addcmul_(y[position[:, slot]].to(out.dtype), routing.weights[:, slot, None].to(out.dtype))
    return out.to(h.dtype)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """One product per group: rows of x [P, K], sorted by group, times weight [E, N, K] transposed -> [P, N], x's dtype.

    counts [E] int64: rows per group, summing to P. On CUDA in BF16 this is one grouped kernel, in another dtype batched
    products padded to the longest group; on the CPU, and where weight has another dtype than x, a loop over the groups
    that have rows.
    """
    if x.is_cuda and x.dtype == weight.dtype:
        # The kernel wants rows of whole 16-byte words.
        aligned = x.shape[1] % 8 == 0 and weight.shape[1] % 8 == 0
        if x.dtype == torch.bfloat16 and aligned and hasattr(torch, "_grouped_mm"):
            return _grouped_mm(x, weight, counts)
        return _padded_bmm(x, weight, counts.tolist())
    out = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for group, count in enumerate(counts.tolist()):
        if count:
            out[start : start + count] = linear(x[start : start + count], weight[group])
            start += count
    return out


def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """torch's grouped kernel, called as often as its limit of groups asks for."""
    if weight.shape[0] <= _KERNEL_GROUPS:
        return torch._grouped_mm(x, weight.transpose(-2, -1), offs=counts.cumsum(0).to(torch.int32))
    parts = torch.split(counts, _KERNEL_GROUPS)
    rows = torch.split(x, [int(part.sum()) for part in parts])
    return torch.cat(
        [_grouped_mm(*part) for part in zip(rows, torch.split(weight, _KERNEL_GROUPS), parts, strict=True)]
    )


def _padded_bmm(x: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Grouped product as batched ones over runs of experts, each padded to the run's largest group."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    first, start = 0, 0
    while first < len(sizes):
        last, longest = first, 0
        while last < len(sizes) and (last == first or max(longest, sizes[last]) * (last + 1 - first) <= _PADDED_ROWS):
            longest = max(longest, sizes[last])
            last += 1
        if longest:
            run = torch.tensor(sizes[first:last], device=x.device)
            keep = torch.arange(longest, device=x.device) < run[:, None]
            rows = slice(start, start + sum(sizes[first:last]))
            padded = x.new_zeros(last - first, longest, x.shape[1])
            padded[keep] = x[rows]
            out[rows] = torch.bmm(padded, weight[first:last].transpose(-2, -1))[keep]
            start = rows.stop
        first = last
    return out
