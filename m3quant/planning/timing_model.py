"""How long a conversion takes on a measured machine: the slowest of its stages, since they overlap. Needs no torch.

    data-free    max over stages of bytes / rate
    calibrated   read of the first layer + for every layer but the last max(stages of its output and of the next one's
                 reading, compute) + of the last: compute, then hash or write + start; compute = search + forward, and
                 "write" holds both streams, which are saved after every layer

Starting the process is not counted: 2 s, and some 4 s more where Triton compiles its kernels for the first time.

A record of rates names the machine and the command that measured it. Two ship: rates.json is the benchmark machine's,
rates_cpu.json that of two CPU cores, taken for as many cores as a machine has.  `python -m tests.benchmarks.rates` makes one from figures of `tests.benchmarks.convert`, and `--rates` reads it.
"""

from __future__ import annotations

import os
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..checkpoint.bounded import TEXT_BYTES, read_text
from ..errors import PlanError
from ..running.complaints import complaint, key_of
from ..running.words import LONG_SECONDS, duration
from .plan import Plan
from .quantizers import active_weights, facts_of, tokens_of
from .resources import hidden_state_bytes
from .unit import Unit

RATES_FILE, CPU_RATES_FILE = "rates.json", "rates_cpu.json"
CPU = "cpu"  # what --rates takes in place of a file
_BY_CORES = ("pack", "search", "feedback", "forward")  # rates that grow with a CPU's cores
_CPU_CORES = 2  # of the machine of CPU_RATES_FILE
SEARCH_RATE = {"awq": "search", "feedback": "feedback"}  # rounding -> the rate of its own computing


class Rates(BaseModel):
    """What one machine does, in bytes or floating-point operations per second. None: not measured, and not counted.

    shared: how much reading and writing at once slow each other down: 0, the disk does both at full rate; 1, one after
    the other; above 1, both at once take longer than that. pack: BF16 bytes rounded, by all workers together. search (AWQ), feedback and forward: calibration's operations as
    `search_flops` and `forward_flops` count them, over the seconds that they took. start: seconds of a calibrated run, once,
    that belongs to no stage: CUDA's code and pinned memory made ready beyond the first layer's read, packing and closing at the end.
    """

    model_config = ConfigDict(extra="forbid")

    machine: str
    measured: str  # date
    versions: dict[str, str]
    source: dict[str, str]  # rate -> the command or file that it is from
    read: float = Field(gt=0)
    write: float = Field(gt=0)
    shared: float = Field(default=1.0, ge=0)
    hash: float | None = Field(default=None, gt=0)
    h2d: float | None = Field(default=None, gt=0)
    d2h: float | None = Field(default=None, gt=0)
    pack: float | None = Field(default=None, gt=0)
    search: float | None = Field(default=None, gt=0)
    feedback: float | None = Field(default=None, gt=0)
    forward: float | None = Field(default=None, gt=0)
    start: float = Field(default=0.0, ge=0)
    device_memory: int | None = Field(default=None, gt=0)  # bytes of one GPU, as its driver reports them


class Estimate(BaseModel):
    """Seconds of the whole conversion, what limits it, and the seconds that each stage would need alone."""

    machine: str
    seconds: float
    bound_by: str
    stages: dict[str, float]


def load_rates(path: Path | None = None, on: str = "cuda") -> Rates:
    """A record of rates; the benchmark machine's by default, or with on="cpu" those of as many CPU cores as are here.

    Raises PlanError naming the file and what is wrong in it.
    """
    if path is None and on == CPU:
        return _of_cores(_read(None, CPU_RATES_FILE), os.cpu_count() or 1)
    return _read(path)


def rates_option(text: str | None) -> Rates:
    """The rates that --rates names: a file, `cpu`, or None for the benchmark machine's."""
    return load_rates(on=CPU) if text == CPU else load_rates(Path(text) if text else None)


def _of_cores(rates: Rates, cores: int) -> Rates:
    """The same machine with more or fewer cores; what its disk does stays."""
    faster = {name: getattr(rates, name) * cores / _CPU_CORES for name in _BY_CORES if getattr(rates, name)}
    return rates.model_copy(update={**faster, "machine": f"a CPU of {cores} cores"})


def _read(path: Path | None, ships: str = RATES_FILE) -> Rates:
    try:
        packaged = files("m3quant.planning") / ships
        text = read_text(path, TEXT_BYTES, error=PlanError, follow=True) if path else packaged.read_text("utf-8")
    except PlanError as error:
        raise PlanError(f"--rates: {error}") from None
    try:
        return Rates.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = key_of(first) or "the file"
        raise PlanError(
            f"{path or ships}: {complaint(where, first)}. Write it as the file that ships: planning/rates.json of the package."
        ) from None


def estimate(plan: Plan, rates: Rates) -> Estimate | None:
    """Seconds to convert `plan` on that machine; None where it needs a rate that the record lacks."""
    if not plan.recipe.calibrated:
        stages = _of(plan.units, rates)
        bound = max(stages, key=lambda name: stages[name])
        return Estimate(machine=rates.machine, seconds=stages[bound], bound_by=bound, stages=stages)
    searching = getattr(rates, SEARCH_RATE[plan.recipe.rounding])
    if searching is None or rates.forward is None:
        return None
    layers = [unit for unit in plan.units if unit.layer is not None]
    compute = search_flops(plan) / searching + forward_flops(plan) / rates.forward
    saved = stream_bytes(plan)
    bounds: dict[str, float] = {}
    for unit, following in pairwise(layers):
        io = _io(following.bytes_in, unit.bytes_out, saved, rates)
        slowest = max(io, key=lambda name: io[name])
        name, took = ("search", compute) if compute >= io[slowest] else (slowest, io[slowest])
        bounds[name] = bounds.get(name, 0.0) + took
    last = _io(0, layers[-1].bytes_out, saved, rates)
    for name, took in (
        ("start", rates.start),
        ("read", layers[0].bytes_in / rates.read),
        ("search", compute),
        ("hash" if "hash" in last and last["hash"] > last["write"] else "write", max(last.values())),
    ):
        bounds[name] = bounds.get(name, 0.0) + took
    others = [unit for unit in plan.units if unit.layer is None]
    seconds = sum(bounds.values()) + max(_of(others, rates).values())
    stages = _of(plan.units, rates, saved * len(layers)) | {
        "search": search_flops(plan) / searching * len(layers),
        "forward": forward_flops(plan) / rates.forward * len(layers),
    }
    return Estimate(
        machine=rates.machine, seconds=seconds, bound_by=max(bounds, key=lambda name: bounds[name]), stages=stages
    )


def _of(units: list[Unit], rates: Rates, saved: int = 0) -> dict[str, float]:
    return _io(sum(u.bytes_in for u in units), sum(u.bytes_out for u in units), saved, rates)


def _io(bytes_in: int, bytes_out: int, saved: int, rates: Rates) -> dict[str, float]:
    """Seconds of every stage that moves bytes; "disk" is reading and writing together. saved: written, and not hashed."""
    read, write = bytes_in / rates.read, (bytes_out + saved) / rates.write
    out = {"read": read, "write": write, "disk": max(read, write) + rates.shared * min(read, write)}
    moved = {"hash": bytes_out, "h2d": bytes_in, "d2h": bytes_out, "pack": bytes_in}
    for name, count in moved.items():
        if rate := getattr(rates, name):
            out[name] = count / rate
    return out


def layer_io(plan: Plan, rates: Rates) -> float:
    """Seconds in which an average layer is read and its output written, saved hidden states not counted."""
    layers = [unit for unit in plan.units if unit.layer is not None]
    return _of(layers, rates)["disk"] / len(layers)


def forward_flops(plan: Plan) -> float:
    """Of both streams through an average layer, held-out windows too, attention scores not counted."""
    heldout = plan.recipe.data.heldout_windows / plan.recipe.data.windows
    return 2 * 2 * active_weights(plan) * tokens_of(plan) * (1 + heldout)


def stream_bytes(plan: Plan) -> int:
    """Of both streams as they are saved after a layer, in BF16, held-out windows too."""
    return 2 * hidden_state_bytes(plan, 2)


def search_flops(plan: Plan) -> float:
    """What the recipe's quantizer computes of an average layer, as quantizers.py counts it."""
    return facts_of(plan.recipe.rounding).flops(plan)


def sentence(found: Estimate) -> str:
    """One line for display: minutes or seconds, and what limits them."""
    minutes, seconds = divmod(found.seconds, 60)
    took = f"{minutes:.0f} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"
    if found.seconds >= LONG_SECONDS:
        took = duration(found.seconds)
    return f"about {took} on {found.machine}, bound by {found.bound_by}"
