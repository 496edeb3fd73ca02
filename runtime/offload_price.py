"""Whether weights in host memory cost more per token than more GPUs of the same kind, by the prices of hours and the least time of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import NodeError, OptionError
from .cost import Prices, Step, decode_step
from .fit import Ask, Fit, assess
from .hardware import Node
from .near import Near, near
from .offload import NOTHING

MOST_GPUS = 8  # of one host
USUAL_CONTEXT = 32_768  # tokens of a request where no context was asked for


@dataclass(frozen=True)
class Comparison:
    """Output tokens per second of `requests` of `context` tokens here and on `node`, the smallest that needs no host memory for weights, and
    what an hour costs: in money, or in GPUs where the prices lack the GPU. slow_down: of the step, against all weights on this GPU. near: by
    which both speeds were computed; None: by the whole bandwidth."""

    context: int
    requests: int
    speed: float
    slow_down: float
    node: Node
    node_speed: float
    costs: tuple[float, float]
    near: Near | None

    @property
    def dear(self) -> bool:
        """Whether a token costs more here."""
        return self.costs[0] / self.speed > self.costs[1] / self.node_speed

    @property
    def sentence(self) -> str:
        where = (
            ""
            if self.costs[0] == self.costs[1]
            else f" on {self.node.name}, at {self.costs[1] / self.costs[0]:g} times the price"
        )
        others = self.near.others if self.near else ()
        by = f" (not measured, estimated from {' and '.join(others)}, of the same chip)" if others else ""
        return (
            f"with weights in host memory {_tokens(self.speed)} tokens/s at most for {self.requests} request(s) of {self.context:,} tokens, "
            f"{_tokens(self.node_speed)} without{where}{by}"
        )


def _tokens(speed: float) -> str:
    return f"{speed:,.1f}" if speed < 10 else f"{speed:,.0f}"


def compare(fit: Fit, prices: Prices) -> Comparison | None:
    """None where a bandwidth is not known, or no node of up to eight such GPUs holds the model by itself.

    Both sides reach the same share of their GPUs' bandwidth: the middle of what was measured near the step with all weights on the GPU, or of
    what that leaves a GPU with the same chip, else all of it.
    """
    requests, context = fit.ask.concurrency, min(fit.ask.context or USUAL_CONTEXT, fit.context)
    own = decode_step(fit, context, requests)
    other = _without(fit, context)
    step = decode_step(other, context, requests) if other else None
    if own is None or other is None or step is None:
        return None
    everything = replace(
        fit, prediction=replace(fit.prediction, ranks=tuple(replace(r, moved=NOTHING) for r in fit.prediction.ranks))
    )
    whole = decode_step(everything, context, requests)
    if whole is None:
        return None
    known = near(fit, context, requests, whole.gpu) or near(other, context, requests, step.gpu)
    share = (known.low + known.high) / 2 if known else 1.0
    tokens = requests * fit.setup.rows
    costs = [prices.per_hour(node) for node in (fit.node, other.node)]
    money = (
        (float(costs[0]), float(costs[1]))
        if costs[0] and costs[1]
        else (float(fit.node.count), float(other.node.count))
    )
    return Comparison(
        context, requests, tokens / _seconds(own, share), _seconds(own, share) / _seconds(whole, share), other.node,
        tokens / _seconds(step, share), money, known,
    )  # fmt: skip


def _seconds(step: Step, share: float) -> float:
    return step.gpu / share + step.host


def _without(fit: Fit, context: int) -> Fit | None:
    """The model on the fewest such GPUs, at least as many as here, that hold it with the context and the requests."""
    ask: Ask = replace(fit.ask, weight_offload=0, tp=None, pp=None, context=context)
    count = fit.node.count
    while count <= MOST_GPUS:
        try:
            found = assess(fit.model, Node(count, fit.node.gpu), ask)
        except NodeError:
            return None
        if found.fits:
            return found
        count *= 2
    return None


def judged(fit: Fit, prices: Prices) -> Fit:
    """The verdict, or its refusal where weights in host memory are dearer than more GPUs, or nobody can say; --slow-offload takes it all the same.

    Raises OptionError for --slow-offload without weights to move.
    """
    if fit.ask.slow_offload and not fit.ask.weight_offload:
        raise OptionError("--slow-offload is of weights in host memory: say how many bytes with --weight-offload.")
    if not (fit.fits and fit.setup.weight_offload) or fit.ask.slow_offload:
        return fit
    if not fit.node.gpu.link:
        short = "how fast the host's memory is read is not known"
        why = f"how fast {fit.node.gpu.name} reads the host's memory is not known here: --slow-offload takes what it gives"
    else:
        found = compare(fit, prices)
        if found is None or not found.dear:
            return fit
        short = f"a token costs less on {found.node.name}, without --weight-offload"
        why = f"{found.sentence}: a token costs less without; --slow-offload takes it all the same"
    return replace(fit, fits=False, dear=True, why_not=why, short=short)
