"""The exact bytes of each layer's roles under every scheme: whole shards, headers and index lines included.

Layers of the same tensors, and layer numbers of the same length, weigh the same: each kind is computed once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial

from ..errors import PlanError
from ..families import Family
from ..schemes import Scheme, parse_scheme
from .layout import stored_bytes, tensors_of
from .plan import Plan
from .sensitivity import ROLES
from .unit import OutputTensor, PlannedTensor, Unit

# What is tried where nothing was measured. Zero points at 2, 3 and 5 bits: one vLLM release
# unpacks symmetric experts of these widths while it loads them (engines/vllm). Symmetric at 4, 6 and 8: the kernels
# that every engine has.
BULK_CANDIDATES = (
    "int2-g128-asym",
    "int2-g64-asym",
    "int3-g128-asym",
    "int3-g64-asym",
    "int4-g128",
    "int4-g32",
    "int5-g128-asym",
    "int6-g128",
    "int8-g128",
)
# int8 in groups weighs as much as FP8, is as good as BF16, and leaves activations alone.
OTHER_CANDIDATES = ("int4-g128", "int4-g32", "int8-g128")


def bulk_role(family: Family) -> str:
    """The role that most of the weights are in: the one that few bits are for."""
    return "routed_experts" if family.moe is not None else "dense_mlp"


def default_candidates(family: Family) -> dict[str, tuple[str, ...]]:
    """Role -> schemes to try."""
    return {role: BULK_CANDIDATES if role == bulk_role(family) else OTHER_CANDIDATES for role in ROLES}


@dataclass(frozen=True)
class LayerChoice:
    """One way to store a layer: role -> scheme name. Layers of one kind share their choices."""

    schemes: Mapping[str, str]
    _unit: Callable[[], Unit] = field(repr=False)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the layer's shard and index lines. Worked out when first asked for: a header of thousands of tensors."""
        return unit_bytes(self._unit())


@dataclass(frozen=True)
class Choices:
    """layers: of every layer, all combinations of its roles' candidates, that of the fewest bytes first. candidates: by
    layer and role, those that its shapes allow, from few bytes to many. refused: why others are not among them, by role
    and scheme."""

    layers: Sequence[Sequence[LayerChoice]]
    candidates: Sequence[Mapping[str, Sequence[str]]]
    refused: Mapping[tuple[str, str], str]

    @property
    def by_role(self) -> dict[str, list[str]]:
        """Every candidate that some layer has, by role."""
        found: dict[str, dict[str, None]] = {}
        for own in self.candidates:
            for role, names in own.items():
                found.setdefault(role, {}).update(dict.fromkeys(names))
        return {role: list(names) for role, names in found.items()}

    def without(self, refused: Mapping[tuple[str, str], str]) -> Choices:
        """These without some schemes of some roles, given with the reason. Raises PlanError where a role has none left."""
        kept = [
            {role: [s for s in names if (role, s) not in refused] for role, names in own.items()}
            for own in self.candidates
        ]
        for own in kept:
            for role in own:
                if not own[role]:
                    why = next(text for (r, _), text in refused.items() if r == role)
                    raise PlanError(f"no candidate scheme of {role} is left: {why}.")
        layers = [
            [choice for choice in choices if not any(item in refused for item in choice.schemes.items())]
            for choices in self.layers
        ]
        return Choices(layers, kept, {**self.refused, **refused})


def role_of(tensor: PlannedTensor) -> str | None:
    """The role under which a tensor's scheme is chosen; None if it has no choice."""
    role = "attention" if tensor.role.kind == "indexer" else tensor.role.kind
    return role if role in ROLES and tensor.role.is_weight else None


def layer_choices(plan: Plan, candidates: Mapping[str, Sequence[str]]) -> Choices:
    """Every choice for every layer of a planned checkpoint; of the plan's recipe only the format counts.

    candidates: by role, scheme names. Raises PlanError where a layer's shapes allow none of a role's candidates.
    """
    made: dict[int, tuple[list[LayerChoice], dict[str, list[str]]]] = {}
    layers, allowed, refused = [], [], dict[tuple[str, str], str]()
    for unit in plan.units[1:]:
        key = id(unit.like or unit)
        if key not in made:
            own = _allowed(plan, unit, candidates, refused)
            made[key] = list(_choices(unit, own, plan.recipe.format)), own
        found, own = made[key]
        layers.append(found)
        allowed.append(own)
    return Choices(layers, allowed, refused)


def stored_as(tensor: PlannedTensor, scheme: Scheme, fmt: str) -> PlannedTensor:
    """The tensor as a plan would store it in `scheme`."""
    outputs = tuple(
        OutputTensor(f"{tensor.module}.{suffix}", dtype, shape)
        for suffix, (dtype, shape) in tensors_of(tensor.source.shape, scheme, fmt, tensor.role.joined).items()
    )
    return replace(tensor, action="quantize", scheme=scheme, outputs=outputs)


def _allowed(
    plan: Plan, unit: Unit, candidates: Mapping[str, Sequence[str]], refused: dict[tuple[str, str], str]
) -> dict[str, list[str]]:
    """The candidates of each role of the layer that its shapes allow."""
    found: dict[str, list[str]] = {}
    for role in ROLES:
        shapes = Counter(t.source.info.shape for t in unit.tensors if role_of(t) == role)
        if not shapes:
            continue
        sizes = {}
        for name in candidates.get(role, ()):
            try:
                scheme = parse_scheme(name)
                sizes[name] = sum(n * stored_bytes(shape, scheme, plan.recipe.format) for shape, n in shapes.items())
            except PlanError as error:
                refused.setdefault((role, name), f"{role} of layer {unit.layer} cannot be {name}: {error}")
        found[role] = sorted(sizes, key=sizes.__getitem__)
        if not found[role]:
            why = next((text for (r, _), text in refused.items() if r == role), f"no candidate scheme for {role}")
            raise PlanError(f"{why} No other candidate of {role} divides its weights either.")
    return found


def _choices(unit: Unit, allowed: Mapping[str, Sequence[str]], fmt: str) -> Iterator[LayerChoice]:
    @cache
    def part(role: str, name: str) -> dict[str, PlannedTensor]:
        return {t.name: stored_as(t, parse_scheme(name), fmt) for t in unit.tensors if role_of(t) == role}

    def stored(schemes: Mapping[str, str]) -> Unit:
        changed = {name: tensor for item in schemes.items() for name, tensor in part(*item).items()}
        return replace(unit, tensors=tuple(changed.get(t.name, t) for t in unit.tensors), like=None)

    for combination in itertools.product(*allowed.values()):
        schemes = dict(zip(allowed, combination, strict=True))
        yield LayerChoice(schemes, partial(stored, schemes))


def unit_bytes(unit: Unit) -> int:
    """Bytes of a unit's shard and of its lines in the index."""
    return unit.bytes_out + unit.index_bytes
