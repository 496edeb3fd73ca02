"""Price of a node, the least that a million output tokens can cost on it, and what they cost by measured speeds.

The throughput is a bound, not a forecast: decoding reads the weights it uses and each request's cache from HBM once a step, so
    tokens/s <= requests x bandwidth / (bytes of weights used + bytes of cache read)    per GPU, the slowest stage deciding.
Engines reach a part of it (kernels, all-reduce, scheduling, prefill). Where steps near the plan were measured, they give a range
(runtime/near.py); those of another GPU with the same chip give the range that they leave this one. Elsewhere the price shown is the floor
alone.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..checkpoint.bounded import read_yaml
from ..errors import NodeError
from .fit import Fit
from .hardware import Node
from .memory import DRAFT
from .near import Near, near
from .weights import as_kept, rank_weights, stage_of_layers

PRICES = Path(__file__).with_name("prices.yaml")


class Prices(BaseModel):
    """Prices of one day. per_gpu_hour: GPU name as in `--on` -> price."""

    model_config = ConfigDict(extra="forbid")

    date: datetime.date
    currency: str = "USD"
    source: str
    per_gpu_hour: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(min_length=1)

    def per_hour(self, node: Node) -> float | None:
        """Price of a node for an hour, or None where the file does not have the GPU."""
        price = {name.lower(): value for name, value in self.per_gpu_hour.items()}.get(node.gpu.name.lower())
        return None if price is None else node.count * price


def load_prices(path: Path | None = None) -> Prices:
    """The prices in `path`, or those that ship with m3quant. Raises NodeError with the key that is wrong."""
    path = path or PRICES
    document = read_yaml(path, "price file", error=NodeError)
    if not isinstance(document, dict):
        raise NodeError(f"price file {path} holds no mapping: write the keys {', '.join(Prices.model_fields)}.")
    try:
        return Prices.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise NodeError(f"price file {path}, key '{'.'.join(map(str, first['loc']))}': {first['msg']}.") from None


@dataclass(frozen=True)
class Step:
    """The least time of one decoding step of the slowest stage, seconds: what is read from the GPU's memory, and from the host's."""

    gpu: float
    host: float


def decode_bound(fit: Fit, context: int, requests: int) -> float:
    """Output tokens per second that memory bandwidth allows for `requests` at once, each `context` tokens long; 0.0 if unknown."""
    step = decode_step(fit, context, requests)
    return requests * fit.setup.rows / (step.gpu + step.host) if step else 0.0


def decode_step(fit: Fit, context: int, requests: int) -> Step | None:
    """The step that `decode_bound` is of; None if a bandwidth is unknown.

    Experts read: all that the tokens of a step reach if each picks top_k of E at random, E x (1 - (1 - top_k / E)^tokens). A step has
    one token of each request and what a draft guesses for it, of which the bound takes all to be right.
    """
    gpu, ranks = fit.node.gpu, fit.prediction.ranks
    if not gpu.bandwidth or requests < 1 or (not gpu.link and any(rank.moved.weights for rank in ranks)):
        return None
    family = fit.model.family
    tokens = requests * fit.setup.rows
    reached = 1 - (1 - family.moe.top_k / family.moe.num_experts) ** tokens if family.moe else 1.0
    geometry = family.kv_geometry
    stages = rank_weights(
        as_kept(fit.model.groups, fit.setup.memory), fit.setup.split, geometry.kv_heads, geometry.layers
    )
    if fit.setup.draft:
        stages[-1][DRAFT] = fit.setup.draft.rank_bytes(fit.setup.split.tp)
    slowest = Step(0.0, 0.0)
    for rank, weights, layers in zip(ranks, stages, stage_of_layers(geometry.layers, fit.setup.split.pp), strict=True):
        moved = rank.moved.weights * reached
        read = sum(
            size * (reached if role == "routed_experts" else 1)
            for role, size in weights.items()
            if role not in _NOT_READ
        )
        own = (read - moved + requests * _cache_read(fit, layers, context)) / gpu.bandwidth
        slowest = max(slowest, Step(own, moved / gpu.link if moved else 0.0), key=lambda step: step.gpu + step.host)
    return slowest


_NOT_READ = ("embedding", "vision", "projector", "mtp")  # looked up by row, or not part of a decoding step


def _cache_read(fit: Fit, layers: range, context: int) -> float:
    """Bytes of cache that one rank reads for one token of one request: block-sparse layers read all index keys and the chosen blocks."""
    family, setup = fit.model.family, fit.setup
    geometry = family.kv_geometry
    heads = max(1, geometry.kv_heads // setup.split.tp)
    per_layer = 2 * heads * geometry.head_dim * setup.memory.kv_bytes[setup.kv_dtype]
    chosen = min(context, family.selected_tokens or context)
    sparse = sum(family.has_index_keys(layer) for layer in layers)
    index = sparse * context * geometry.index_dim * setup.memory.index_bytes[setup.index_dtype]
    return index + per_layer * (sparse * chosen + (len(layers) - sparse) * context)


@dataclass(frozen=True)
class Speed:
    """Decoded tokens per second for `requests` of `context` tokens. bound: what bandwidth allows, 0.0 if unknown; near: None where nothing
    near was measured, else low and high are the range by it."""

    context: int
    requests: int
    bound: float
    near: Near | None

    @property
    def low(self) -> float:
        return self.bound * self.near.low if self.near else 0.0

    @property
    def high(self) -> float:
        return self.bound * self.near.high if self.near else 0.0


def decode_speed(fit: Fit, context: int, requests: int) -> Speed:
    """The bound and the measured range; neither for a plan that does not fit.

    No range with weights in host memory: all figures are of weights on the GPU, and what the link adds to a step was measured as 1.3 to 4
    times the bound's share of it (docs/serving.md, Host memory).
    """
    step = decode_step(fit, context, requests) if fit.fits else None
    if step is None:
        return Speed(context, requests, 0.0, None)
    bound = requests * fit.setup.rows / (step.gpu + step.host)
    return Speed(context, requests, bound, None if step.host else near(fit, context, requests, step.gpu))


def price_per_million(per_hour: float, tokens_per_second: float) -> float:
    """Price of a million output tokens at that rate."""
    return per_hour / 3600 / tokens_per_second * 1e6
