"""What one pass over the weights measures beside each scheme's error: which errors are carried to the end, and which whole recipes run along; and
the device memory that all of it takes."""

from __future__ import annotations

from collections.abc import Sequence

from ..planning.fit import Fitting
from ..planning.plan import Plan
from ..planning.quantizers import facts_of
from ..planning.resources import FLOAT32, hidden_state_bytes, resources
from ..schemes import parse_scheme

# Errors that are carried to the end: a large and a small one for the role that most bytes and most of the loss are in,
# one for the others. Where a role's candidates have none of them, the one of fewest bits.
BULK_PROBES = ("int2-g128-asym", "int4-g128")
OTHER_PROBES = ("int4-g128",)
# Whole recipes: routed experts, and what every token passes through.
PILOTS = (("int2-g128-asym", "int8-g128"), ("int3-g128-asym", "int8-g128"), ("int4-g128", "int8-g128"))
# One more pilot, like the last of those but for what every token passes through: its error is compensated in part by the
# experts that are rounded after it, and this says how much of it is left.
OTHERS_PILOT = ("int4-g128", "int4-g128")
PROBE_BYTES = 16 * 10**9
BF16 = 2


def probes_of(fitting: Fitting, role: str, names: Sequence[str]) -> list[str]:
    """Those of a role's candidates whose error in a layer is carried to the end."""
    wanted = BULK_PROBES if role == fitting.bulk else OTHER_PROBES
    return [name for name in names if name in wanted] or [min(names, key=lambda name: parse_scheme(name).bits)]


def probe_windows(fitting: Fitting, heldout: int, window_bytes: int) -> int:
    """Held-out windows that each probe carries: all of them, if PROBE_BYTES hold that for all probes, but two at least."""
    return min(heldout, max(2, PROBE_BYTES // (window_bytes * _probes(fitting))))


def _probes(fitting: Fitting) -> int:
    return sum(
        len(probes_of(fitting, role, names)) for own in fitting.choices.candidates for role, names in own.items()
    )


def pilot_recipes(fitting: Fitting) -> list[tuple[list[dict[str, str]], bool | None]]:
    """(layers, whether it is OTHERS_PILOT) of the pilots whose schemes are candidates wherever a role exists; the first
    candidates if no pilot is possible."""
    candidates = fitting.choices.candidates
    found: list[tuple[list[dict[str, str]], bool | None]] = []
    for schemes in (*PILOTS, OTHERS_PILOT):
        layers = [{role: schemes[role != fitting.bulk] for role in own} for own in candidates]
        if all(own[role] in names for own, has in zip(layers, candidates, strict=True) for role, names in has.items()):
            found.append((layers, schemes == OTHERS_PILOT))
    return found or [([{role: names[0] for role, names in own.items()} for own in candidates], False)]


def device_bytes(fitting: Fitting, plan: Plan | None = None) -> int:
    """Peak memory of a GPU that measures on the text of `plan` (None: that of the fitting): what a conversion takes of it, by which one candidate is searched, and besides

    - the pilots' streams in BF16;
    - the held-out windows in float32: as they enter the layer, as the source gives them, and as the candidate does;
    - the probes, at their most in the last layer;
    - the routed experts as a candidate rounds them, in BF16, where that is more than the search took.

    Not measured on a GPU; tests/convert/test_measure_memory.py compares the streams with those that a pass holds.
    """
    plan = plan or fitting.base
    data = plan.recipe.data
    pilots = len(pilot_recipes(fitting)) * hidden_state_bytes(plan, BF16)
    window = data.window_length * plan.family.hidden_size * FLOAT32
    heldout = data.heldout_windows * window
    probes = _probes(fitting) * probe_windows(fitting, data.heldout_windows, window) * window
    bulk = max(
        sum(t.source.numel for t in unit.tensors if t.role.kind == fitting.bulk)
        for unit, _ in plan.kinds
        if unit.layer is not None
    )
    rounded = max(0, BF16 * bulk - facts_of(plan.recipe.rounding).scratch(plan))
    return resources(plan, on_gpu=True).device + pilots + 3 * heldout + probes + rounded
