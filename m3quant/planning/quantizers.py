"""What a plan must know about each rounding: its needs and costs. Torch-free; the quantizers are in calibration/.

A quantizer that is not described here cannot be planned; a description without one is refused by calibration/quantizers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..schemes import Scheme
    from .plan import Plan
    from .unit import Unit

# Weights that the AWQ search has on a GPU at once (calibration/glu.py), and bytes for each: float32 copies of them folded,
# rounded and paired, and their activations. 17 GB for 2^30 weights were measured on an H200.
AWQ_CHUNK = 1 << 29
AWQ_BYTES_PER_WEIGHT = 20
# Matrices of K x K float32 that feedback holds for each expert of a chunk: moments and cross moments of two halves of the
# rows, damped inverses, factors, and those in work. A chunk is as many experts as these bytes allow on a GPU: 16 of M2 or 4 of M3.
FEEDBACK_CHUNK_BYTES = 12_500_000_000
FEEDBACK_MATRICES = 14
# Two chunks are in work at once where they and two layers (this and the next) take no more: with M2, while M3 stays below 60 GB.
_TWO_CHUNKS_BYTES = 42_000_000_000
_FINE_BITS = 4
# Device bytes of a token's hidden channel, in BF16 streams. Searching a layer holds both streams, each with the layer's output
# in addition to its input; feedback holds both before and after attention, what is missing, and the experts' sum in float32.
STREAMS_BYTES = 4 * 2
FEEDBACK_STATE_BYTES = 2 * 2 + 2 * 2 + 2 + 4


@dataclass(frozen=True)
class QuantizerFacts:
    """needs_text: layers are calibrated in order, on text. folds: norms and their readers may be scaled.

    nearest_codes: every code is the (folded) source's weight rounded to nearest under the stored scale, which verify then
    demands. flops: of a layer on average, in addition to the forward passes of both streams. scratch: device bytes of a layer's
    search, in addition to the layer, its codes and the streams. state: device bytes that exist of every token for each hidden channel.
    """

    name: str
    needs_text: bool
    folds: bool
    nearest_codes: bool
    flops: Callable[[Plan], float]
    scratch: Callable[[Plan], int]
    state: int


def facts_of(rounding: str) -> QuantizerFacts:
    """The description of a recipe's `rounding`."""
    return QUANTIZERS[rounding]


def feedback_rounds(scheme: Scheme, given: int | None) -> int:
    """Rounds of descent and refit for a weight of this scheme; given: what the recipe says.

    On the fixtures' development windows four rounds instead of two take 1 to 2 % off the KL divergence at 2 bits, and nothing
    that can be distinguished from chance at 4 (docs/rounding.md); they take twice the time.
    """
    if given is not None:
        return given
    return 4 if scheme.bits < _FINE_BITS else 2


def tokens_of(plan: Plan) -> int:
    """Calibration tokens, held-out windows not counted."""
    return plan.recipe.data.windows * plan.recipe.data.window_length


def routed_share(plan: Plan) -> float:
    """Experts that a token is sent to, of all; 1 for a model without routed experts."""
    moe = plan.family.moe
    return moe.top_k / moe.num_experts if moe else 1.0


def layers_of(plan: Plan) -> list[Unit]:
    return [unit for unit in plan.units if unit.layer is not None]


def active_weights(plan: Plan) -> float:
    """Weights of an average layer that a token passes through: all but the routed experts that it is not sent to."""
    share, total = routed_share(plan), 0.0
    for unit, count in plan.kinds:
        for tensor in unit.tensors:
            if tensor.role.layer is not None and len(tensor.source.shape) == 2:
                total += count * tensor.source.numel * (share if tensor.role.kind == "routed_experts" else 1.0)
    return total / len(layers_of(plan))


def _nothing(plan: Plan) -> int:
    return 0


def _awq_flops(plan: Plan) -> float:
    """One forward of the layer's searched weights for each candidate of the grid, and one for the reference.

    A measure of size, not a count: the search takes a sample of the tokens and rounds all experts, hit or not.
    """
    return 2 * active_weights(plan) * tokens_of(plan) * (plan.recipe.awq.n_grid + 1)


def _awq_scratch(plan: Plan) -> int:
    largest = max(sum(t.source.numel for t in unit.tensors) for unit, _ in plan.kinds if unit.layer is not None)
    return AWQ_BYTES_PER_WEIGHT * min(AWQ_CHUNK, largest)


def _feedback_flops(plan: Plan) -> float:
    """Moments of every input (two products of rows x K x K), four factors and two solutions (4 K^3 in all), and for each
    weight [N, K] so many products of 2 N K^2: its loss when rounded to nearest 1, a sweep 1/2, a descent 1, a refit 3/2.
    A round is a refit and a descent, every other one a sweep, a descent and a refit besides; one refit is the last."""
    share, total = routed_share(plan), 0.0
    for unit, count in plan.kinds:
        if unit.layer is None:
            continue
        own, inputs = 0.0, set[tuple[str, int | None, int]]()
        for tensor in unit.tensors:
            if not tensor.scheme.quantizes:
                continue
            rows, columns = tensor.source.shape[-2:]
            rounds = feedback_rounds(tensor.scheme, plan.recipe.feedback.rounds)
            products = 1.5 + 2.5 * rounds + 3.0 * ((rounds + 1) // 2) + 1.5 * (rounds > 0)
            own += 2.0 * rows * columns**2 * products
            inputs.add((tensor.role.kind, tensor.role.expert, columns))
        for kind, _, columns in inputs:
            seen = tokens_of(plan) * (share if kind == "routed_experts" else 1.0)
            own += 4.0 * seen * columns**2 + 4.0 * columns**3
        total += count * own
    return total / len(layers_of(plan))


def _feedback_scratch(plan: Plan) -> int:
    largest = max(
        (
            t.source.shape[-1]
            for unit, _ in plan.kinds
            for t in unit.tensors
            if t.scheme.quantizes and len(t.source.shape) == 2
        ),
        default=0,
    )
    moe = plan.family.moe
    chunks = feedback_chunks(moe.num_experts, plan.family.hidden_size, moe.intermediate_size) if moe else 1
    return max(chunks * FEEDBACK_CHUNK_BYTES, FEEDBACK_MATRICES * 4 * largest**2)


def feedback_chunks(experts: int, hidden: int, inner: int) -> int:
    """How many chunks of FEEDBACK_CHUNK_BYTES a GPU has in work at once, for a layer of routed experts [inner, hidden]."""
    layer = 2 * 3 * experts * hidden * inner
    return 2 if 2 * layer + 2 * FEEDBACK_CHUNK_BYTES <= _TWO_CHUNKS_BYTES else 1


QUANTIZERS = {
    facts.name: facts
    for facts in (
        QuantizerFacts("nearest", False, False, True, lambda plan: 0.0, _nothing, 0),
        QuantizerFacts("awq", True, True, True, _awq_flops, _awq_scratch, STREAMS_BYTES),
        QuantizerFacts("feedback", True, False, False, _feedback_flops, _feedback_scratch, FEEDBACK_STATE_BYTES),
    )
}
