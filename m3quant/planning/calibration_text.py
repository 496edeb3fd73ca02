"""How much calibration text a run uses, and the lengths of its windows. Pure numbers: needs no torch and no tokenizer.

tokens       about as many as the disk's time allows: while the weights of a layer are read and written, the tokens pass through it
rows         tokens an expert sees on average: tokens * top_k / experts
rows per K   rows over the width of the expert's input; a second moment [K, K] of fewer rows than K has no inverse
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .plan import Plan
from .quantizers import active_weights, facts_of
from .resources import resources
from .timing_model import Rates, layer_io

# Measured on the trained fixtures: from 8 rows per K on, twice the text takes off 3 % of the KL divergence or less.
MOST_ROWS_PER_K = 8.0
# The default of a recipe, and what any machine takes.
FEWEST_TOKENS = 65_536
# A conversion may take this much longer than reading and writing alone.
FLOOR_FACTOR = 1.2
# Tokens are chosen in steps of this many: small differences of the rates do not change the run.
TOKEN_STEP = 65_536
# Share of a GPU's memory that a run may be predicted to take: the allocator needs room to cut its blocks from.
DEVICE_SHARE = 0.95
# Shares of the rows in windows of one row, of four, and past the selection of sparse attention.
LONG_SHARES = (0.25, 0.25)
MIDDLE_ROWS = 4


@dataclass(frozen=True)
class Tokens:
    """A number of calibration tokens, and what it means for one layer of a model."""

    tokens: int
    rows_per_expert: float
    rows_per_k: float
    compute_seconds: float
    """A layer's forward passes of both streams and moments of that many tokens."""
    disk_seconds: float
    """A layer's reading and writing, which hides them where it is longer."""
    bound: str
    """What ended the choice: "disk", "rows" (there are enough for any expert), "memory", "least", or "given"."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class WindowGroup:
    """Windows of one length. They follow one another from row `start` of the token grid [S, L]: each is `rows` rows
    of it, which are consecutive text; so a group is a reshape of its rows, [windows * rows, L] to [windows, rows * L]."""

    start: int
    windows: int
    rows: int


def tokens_for_rows(rows_per_k: float, hidden: int, experts: int, top_k: int) -> int:
    """Tokens with which an expert sees `rows_per_k` times as many rows as its input is wide, on average."""
    return int(rows_per_k * hidden * experts / top_k)


def flops_per_token(plan: Plan) -> float:
    """Operations of one token in an average layer: both streams' forward passes, and the second moments of the experts' inputs
    in the quantized stream and across the streams: 2 * 2 top_k (K^2 + I^2), K of w1 and w3, I of w2."""
    _, top_k, inner = _experts(plan)
    inputs = plan.family.hidden_size**2 + inner**2
    return 2 * 2 * active_weights(plan) + 2 * 2 * top_k * inputs


def _experts(plan: Plan) -> tuple[int, int, int]:
    """(experts, experts per token, their inner width). A dense MLP is one expert that every token goes to."""
    moe = plan.family.moe
    if moe is None:
        return 1, 1, max(spec.dense_intermediate_size for spec in plan.family.layers)
    return moe.num_experts, moe.top_k, moe.intermediate_size


def token_choice(plan: Plan, rates: Rates) -> Tokens:
    """As many tokens as pass through a layer in 1.2 times its disk's time, at most 8 rows per K and as many as a GPU has
    room for, at least 65,536. Without measured rates for computing, 65,536."""
    if rates.forward is None:
        return described(plan, rates, FEWEST_TOKENS, "least")
    hidden = FLOOR_FACTOR * layer_io(plan, rates) * rates.forward / flops_per_token(plan)
    experts, top_k, _ = _experts(plan)
    most = tokens_for_rows(MOST_ROWS_PER_K, plan.family.hidden_size, experts, top_k)
    bounds = [(most, "rows"), (int(hidden), "disk")]
    if rates.device_memory:
        bounds.append((device_room(plan, rates.device_memory), "memory"))
    chosen, bound = min(bounds)
    chosen = chosen // TOKEN_STEP * TOKEN_STEP
    return described(plan, rates, chosen, bound) if chosen > FEWEST_TOKENS else described(plan, rates, FEWEST_TOKENS, "least")  # fmt: skip


def device_room(plan: Plan, device_memory: int) -> int:
    """Calibration tokens for which a GPU of so many bytes has room in addition to the layers and the search; 0: for none."""
    data, state = plan.recipe.data, facts_of(plan.recipe.rounding).state
    now = (data.windows + data.heldout_windows) * data.window_length
    free = DEVICE_SHARE * device_memory - resources(plan, on_gpu=True).device
    return max(0, now + int(free / (state * plan.family.hidden_size)) - data.heldout_windows * data.window_length)


def described(plan: Plan, rates: Rates, tokens: int, bound: str = "given") -> Tokens:
    """What `tokens` mean for this model on this machine; seconds are 0 where no rate of computing is known."""
    experts, top_k, _ = _experts(plan)
    rows = tokens * top_k / experts
    compute = tokens * flops_per_token(plan) / rates.forward if rates.forward else 0.0
    return Tokens(tokens, rows, rows / plan.family.hidden_size, compute, layer_io(plan, rates), bound)


def window_groups(rows: int, length: int, selected: int) -> tuple[WindowGroup, ...]:
    """The rows of a token grid [rows, length] as windows of several lengths, shortest first; every row is in one.

    Half of the rows or more stay windows by themselves; a quarter is joined by four; a quarter by as many as twice
    `selected` tokens need, so that sparse attention selects (0: no sparse attention, and no such group).
    """
    sizes = [MIDDLE_ROWS]
    if selected and (past := -(-2 * selected // length)) > 1:
        sizes = sorted({MIDDLE_ROWS, past})
    long = [(size, int(rows * share) // size) for size, share in zip(sizes, LONG_SHARES, strict=False)]
    groups = [WindowGroup(0, rows - sum(size * windows for size, windows in long), 1)]
    for size, windows in long:
        if windows:
            groups.append(WindowGroup(groups[-1].start + groups[-1].windows * groups[-1].rows, windows, size))
    return tuple(group for group in groups if group.windows)


def run_groups(plan: Plan) -> tuple[WindowGroup, ...]:
    """The windows of a run by length, held-out ones (of one row each) last; () where all are of one length."""
    data = plan.recipe.data
    if data.lengths == "one":
        return ()
    groups = window_groups(data.windows, data.window_length, plan.family.selected_tokens)
    held_out = (WindowGroup(data.windows, data.heldout_windows, 1),) if data.heldout_windows else ()
    return (*groups, *held_out)


def groups_line(groups: tuple[WindowGroup, ...], length: int) -> str:
    """For display: "64 windows of 512 tokens, 8 of 2,048 and 4 of 4,096"."""
    parts = [f"{group.windows:,} of {group.rows * length:,}" for group in groups]
    parts[0] = parts[0].replace(" of ", " windows of ", 1) + " tokens"
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def calibration_lines(plan: Plan, rates: Rates) -> list[str]:
    """What the run's calibration text is, and how much the disk's time would hide."""
    data = plan.recipe.data
    now, choice = described(plan, rates, data.windows * data.window_length), token_choice(plan, rates)
    width = plan.family.hidden_size
    an_expert = "an expert on average" if plan.family.moe else "an MLP"
    own = [group for group in run_groups(plan) if group.start < data.windows]
    shown = (
        groups_line(tuple(own), data.window_length) if own else f"{data.windows:,} windows of {data.window_length:,}"
    )
    lines = [
        f"calibration text: {now.tokens:,} tokens in {shown}, and {data.heldout_windows} "
        f"windows held out; {now.rows_per_expert:,.0f} rows {an_expert}, {now.rows_per_k:.2f} times its input's {width:,}"
    ]
    if choice.tokens > now.tokens:
        selected = plan.family.selected_tokens
        groups = window_groups(choice.tokens // data.window_length, data.window_length, selected)
        how = "" if own else f"; in mixed lengths (--window-lengths mixed) {groups_line(groups, data.window_length)}"
        lines.append(
            f"on {rates.machine} a layer is read and written in {choice.disk_seconds:.1f} s; {choice.tokens:,} tokens "
            f"({choice.rows_per_k:.1f} rows per input) are computed in {choice.compute_seconds:.1f} s: "
            f"--calibration-tokens {choice.tokens}{how}"
        )
    return lines
