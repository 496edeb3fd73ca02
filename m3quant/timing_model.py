"""How long a conversion takes on a measured machine: the slowest of its stages, since they overlap. Needs no torch.

    data-free    max over stages of bytes / rate
    calibrated   per layer max(read, compute, write), where compute = search + forward, plus one read to begin with

A record of rates names the machine and the command that measured it. The one that ships, rates.json, is the benchmark
machine's; `python -m tests.benchmarks.rates` makes one from figures of `tests.benchmarks.convert`, and `--rates` reads it.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import PlanError
from .plan import Plan, Unit

RATES_FILE = "rates.json"


class Rates(BaseModel):
    """What one machine does, in bytes or floating-point operations per second. None: not measured, and not counted.

    shared: how far reading and writing at once get into each other's way: 0, the disk does both at full rate, to 1, one
    after the other. pack: BF16 bytes rounded, by all workers together. search and forward: calibration's operations as
    `search_flops` and `forward_flops` count them, over the seconds that they took.
    """

    model_config = ConfigDict(extra="forbid")

    machine: str
    measured: str  # date
    versions: dict[str, str]
    source: dict[str, str]  # rate -> the command or file that it is from
    read: float = Field(gt=0)
    write: float = Field(gt=0)
    shared: float = Field(default=1.0, ge=0, le=1)
    hash: float | None = Field(default=None, gt=0)
    h2d: float | None = Field(default=None, gt=0)
    d2h: float | None = Field(default=None, gt=0)
    pack: float | None = Field(default=None, gt=0)
    search: float | None = Field(default=None, gt=0)
    forward: float | None = Field(default=None, gt=0)


class Estimate(BaseModel):
    """Seconds of the whole conversion, what bounds it, and the seconds that each stage would need by itself."""

    machine: str
    seconds: float
    bound_by: str
    stages: dict[str, float]


def load_rates(path: Path | None = None) -> Rates:
    """A record of rates; the benchmark machine's by default. Raises PlanError naming the file and what is wrong in it."""
    try:
        text = path.read_text("utf-8") if path else (files("m3quant") / RATES_FILE).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"--rates {path}: cannot be read: {error}.") from None
    try:
        return Rates.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise PlanError(
            f"{path or RATES_FILE}: {where}: {first['msg']}. Make it with python -m tests.benchmarks.rates."
        ) from None


def estimate(plan: Plan, rates: Rates) -> Estimate | None:
    """Seconds to convert `plan` on that machine; None where it needs a rate that the record lacks."""
    if plan.recipe.calibration == "none":
        stages = _io(plan.units, rates)
        bound = max(stages, key=lambda name: stages[name])
        return Estimate(machine=rates.machine, seconds=stages[bound], bound_by=bound, stages=stages)
    if rates.search is None or rates.forward is None:
        return None
    layers = [unit for unit in plan.units if unit.layer is not None]
    compute = {
        "search": search_flops(plan) / rates.search,
        "forward": forward_flops(plan) / rates.forward,
    }
    stages = {**_io(plan.units, rates), **{name: seconds * len(layers) for name, seconds in compute.items()}}
    work, seconds = sum(compute.values()), 0.0
    bounds: dict[str, float] = {}
    for unit in layers:
        io = _io([unit], rates)
        slowest = max(io, key=lambda name: io[name])
        name, took = ("search", work) if work >= io[slowest] else (slowest, io[slowest])
        bounds[name] = bounds.get(name, 0.0) + took
        seconds += took
    others = [unit for unit in plan.units if unit.layer is None]
    seconds += max(_io(others, rates).values()) + layers[0].bytes_in / rates.read
    return Estimate(
        machine=rates.machine, seconds=seconds, bound_by=max(bounds, key=lambda name: bounds[name]), stages=stages
    )


def _io(units: list[Unit], rates: Rates) -> dict[str, float]:
    """Seconds of every stage that moves bytes; "disk" is reading and writing together."""
    bytes_in, bytes_out = sum(u.bytes_in for u in units), sum(u.bytes_out for u in units)
    read, write = bytes_in / rates.read, bytes_out / rates.write
    out = {"read": read, "write": write, "disk": max(read, write) + rates.shared * min(read, write)}
    moved = {"hash": bytes_out, "h2d": bytes_in, "d2h": bytes_out, "pack": bytes_in}
    for name, count in moved.items():
        if rate := getattr(rates, name):
            out[name] = count / rate
    return out


def _tokens(plan: Plan) -> int:
    return plan.recipe.data.windows * plan.recipe.data.window_length


def _active(plan: Plan) -> float:
    """Weights of an average layer that a token passes through: all but the routed experts that it is not sent to."""
    text = plan.family.text_config(plan.checkpoint.config)
    share = int(text["num_experts_per_tok"]) / int(text["num_local_experts"])
    layers = sum(unit.layer is not None for unit in plan.units)
    total = 0.0
    for tensor in plan.tensors:
        if tensor.role.layer is not None and len(tensor.source.info.shape) == 2:
            total += tensor.source.info.numel * (share if tensor.role.kind == "routed_experts" else 1.0)
    return total / layers


def forward_flops(plan: Plan) -> float:
    """Of both streams through an average layer, held-out windows too, attention scores not counted."""
    heldout = plan.recipe.data.heldout_windows / plan.recipe.data.windows
    return 2 * 2 * _active(plan) * _tokens(plan) * (1 + heldout)


def search_flops(plan: Plan) -> float:
    """One forward of the layer's searched weights for each candidate of the grid, and one for the reference."""
    return 2 * _active(plan) * _tokens(plan) * (plan.recipe.awq.n_grid + 1)


def sentence(found: Estimate) -> str:
    """One line for people: minutes or seconds, and what bounds them."""
    minutes, seconds = divmod(found.seconds, 60)
    took = f"{minutes:.0f} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"
    return f"about {took} on {found.machine}, bound by {found.bound_by}"
