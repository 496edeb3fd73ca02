"""The best recipe within a budget: every layer's schemes, chosen by measured sensitivity, or evenly where nothing was measured.

All experts of a layer share one scheme, and so do its attention and indexer; layers may differ (`engines.integers`). With
a sensitivity file the answer is the recipe with the least predicted KL divergence of all that the budget allows
(`knapsack`): more budget never gives a worse one. Without one, the rule is simple: weights that every token uses get their
widest scheme first, then the routed experts of all layers are widened step by step, and a step that the budget allows
only in part goes to layers at equal distances.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import OptionError
from ..recipe.recipe import ModelOfLayers, Recipe, build_recipe, join_layers
from .choices import Choices, bulk_role, default_candidates, layer_choices, unit_bytes
from .knapsack import efficient, solve
from .plan import Plan, make_plan
from .sensitivity import ROLES, Sensitivity

NAME = "fit"
ROUNDING = "feedback"  # widths below 4 bits are of no use otherwise
_UNIT = 1e-12  # nats: estimates are added up as whole multiples of it, exactly
# Shards and index lines of layers are counted exactly; the texts of config.json and recipe.yaml depend on the whole
# recipe. By so many bytes at most they are shorter than those of `base`, which has one scheme per role.
_SHORTER_TEXT = 2048

Schemes = Mapping[str, str]  # role -> scheme name, of one layer


@dataclass(frozen=True)
class Room:
    """What one pool of memory, or a whole checkpoint, has for the layers in it: bytes, in the unit of the costs."""

    layers: range
    budget: int


@dataclass(frozen=True)
class Point:
    """One recipe: the schemes of every layer, the bytes of its output, and what it is predicted to lose (None: nothing
    was measured). nbytes counts shards and index exactly, config.json and recipe.yaml as those of a recipe without layers."""

    schemes: tuple[Schemes, ...]
    nbytes: int
    kl: float | None


class Fitting:
    """What can be chosen for one checkpoint. data: the `data` of its recipes.

    candidates: by role, what is tried; by default what was measured, or else `choices.default_candidates`.

    Raises PlanError where a role's candidates do not divide a layer's weights, OptionError where the sensitivity file
    lacks a layer or a role of the checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: Mapping[str, Any],
        sensitivity: Sensitivity | None = None,
        candidates: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.checkpoint, self.data, self.sensitivity = checkpoint, data, sensitivity
        schemes = dict.fromkeys(ROLES, "fp8-channel")  # divides any shape
        self.base = make_plan(checkpoint, build_recipe({"rounding": ROUNDING, "schemes": schemes, "data": dict(data)}))
        self.bulk = bulk_role(self.base.family)
        measured = {role: sensitivity.schemes(role) for role in ROLES} if sensitivity else {}
        known = {**default_candidates(self.base.family), **measured, **(candidates or {})}
        self.choices: Choices = layer_choices(self.base, known)
        self.losses = self._losses(sensitivity) if sensitivity else None

    def refuse(self, schemes: Mapping[tuple[str, str], str]) -> None:
        """Leave out some schemes of some roles, (role, scheme) -> why. Raises PlanError where a role has none left."""
        if schemes:
            self.choices = self.choices.without(schemes)
            self.losses = self._losses(self.sensitivity) if self.sensitivity else None
            for name in ("output_costs", "_index"):
                self.__dict__.pop(name, None)

    def _losses(self, sensitivity: Sensitivity) -> list[list[int]]:
        if len(sensitivity.layers) != len(self.choices.layers):
            raise OptionError(
                f"the sensitivity file has {len(sensitivity.layers)} layers, the model {len(self.choices.layers)}: measure again."
            )
        found = []
        for layer, choices in enumerate(self.choices.layers):
            own = sensitivity.layers[layer].candidates
            for role, names in self.choices.candidates[layer].items():
                if missing := [name for name in names if name not in own.get(role, {})]:
                    raise OptionError(
                        f"the sensitivity file says nothing of {missing[0]} for {role} of layer {layer}, which other layers "
                        "have: it is not whole; measure again."
                    )
            found.append(
                [sum(round(own[role][s].kl / _UNIT) for role, s in choice.schemes.items()) for choice in choices]
            )
        return found

    @cached_property
    def output_costs(self) -> list[list[int]]:
        """Bytes of the output, layer by layer, of every choice."""
        return [[choice.nbytes for choice in choices] for choices in self.choices.layers]

    @property
    def least(self) -> list[int]:
        """Every layer's choice of the fewest bytes."""
        return [0] * len(self.choices.layers)

    @cached_property
    def _outside_layers(self) -> int:
        """Bytes of an output that belong to no layer's choice, with the texts of a recipe that has one scheme per role."""
        return self.base.output_bytes - sum(unit_bytes(unit) for unit in self.base.units[1:])

    def recipe(self, chosen: Sequence[int]) -> Recipe:
        return self.recipe_of(self.schemes(chosen))

    def recipe_of(self, layers: Sequence[Schemes]) -> Recipe:
        model = ModelOfLayers.of(self.base.family)
        return build_recipe(recipe_document(layers, self.data) | {"model": model})

    def plan(self, chosen: Sequence[int]) -> Plan:
        return make_plan(self.checkpoint, self.recipe(chosen))

    def schemes(self, chosen: Sequence[int]) -> tuple[Schemes, ...]:
        return tuple(choices[i].schemes for choices, i in zip(self.choices.layers, chosen, strict=True))

    def point(self, chosen: Sequence[int]) -> Point:
        layers = zip(self.choices.layers, chosen, strict=True)
        nbytes = self._outside_layers + sum(choices[i].nbytes for choices, i in layers)
        return Point(self.schemes(chosen), nbytes, self.predicted_kl(chosen))

    def predicted_kl(self, chosen: Sequence[int]) -> float | None:
        """Nats a token, on the text that was measured on; None where nothing was."""
        if self.sensitivity is None or self.losses is None:
            return None
        total = sum(own[i] for own, i in zip(self.losses, chosen, strict=True))
        return self.sensitivity.kl_of(total * _UNIT)

    def within_output(self, budget: int) -> tuple[list[int], Plan] | None:
        """The best recipe whose output has at most `budget` bytes, and its plan; None if the smallest has more."""
        room = budget - self._outside_layers + _SHORTER_TEXT
        for chosen in self._by_falling_cost(Room(range(len(self.choices.layers)), room), self.output_costs):
            plan = self.plan(chosen)
            if plan.output_bytes <= budget:
                return chosen, plan
        return None

    def within_rooms(self, rooms: Sequence[Room], costs: Sequence[Sequence[int]]) -> list[int] | None:
        """The best recipe of which every room holds its layers; None if one does not hold its layers' least choices.

        costs: by layer, of every choice, in the unit of the rooms. The rooms' layers are those of the model, in order.
        """
        found: list[int] = []
        for room in rooms:
            best = next(self._by_falling_cost(room, costs), None)
            if best is None:
                return None
            found += best
        return found

    def _by_falling_cost(self, room: Room, costs: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """The best choices of a room's layers, then the best of those that cost less, and so on."""
        own = [costs[layer] for layer in room.layers]
        if self.losses is None:
            states = [s for s in self._even_steps(room.layers, own) if s.cost <= room.budget]
            yield from (list(state.chosen) for state in reversed(states))
            return
        items = [list(zip(own[i], self.losses[layer], strict=True)) for i, layer in enumerate(room.layers)]
        budget = room.budget
        while (solution := solve(items, budget)) is not None:
            yield list(solution.chosen)
            budget = solution.cost - 1

    def frontier(self, costs: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
        """Choices from the least bytes to the most, each the best at its cost; without sensitivity the even steps that
        leave no layer behind."""
        costs = costs or self.output_costs
        if self.losses is None:
            steps = self._even_steps(range(len(costs)), costs)
            return [list(step.chosen) for step in steps if step.whole]
        items = [list(zip(own, losses, strict=True)) for own, losses in zip(costs, self.losses, strict=True)]
        return [list(solution.chosen) for solution in efficient(items)]

    def _even_steps(self, layers: range, costs: Sequence[Sequence[int]]) -> list[_Step]:
        """The rule of a fit without sensitivity: choices by rising cost. costs: of these layers."""
        ladders = [self.choices.candidates[layer] for layer in layers]
        now = [{role: names[0] for role, names in ladder.items()} for ladder in ladders]
        states = [self._step(layers, costs, now, True)]
        others = [role for role in ROLES if role != self.bulk]
        states += self._widen(
            layers, costs, now, [{r: ladder[r][-1] for r in others if r in ladder} for ladder in ladders]
        )
        for rung in range(1, max((len(ladder.get(self.bulk, ())) for ladder in ladders), default=0)):
            wider = [
                {r: ladder[r][min(rung, len(ladder[r]) - 1)] for r in (self.bulk,) if r in ladder} for ladder in ladders
            ]
            states += self._widen(layers, costs, now, wider)
        return sorted(states, key=lambda state: state.cost)

    def _widen(
        self, layers: range, costs: Sequence[Sequence[int]], now: list[dict[str, str]], wider: Sequence[Schemes]
    ) -> list[_Step]:
        """Give more and more of the layers that change their wider schemes; `now` has all of them afterwards."""
        changing = [i for i, own in enumerate(wider) if any(now[i][role] != s for role, s in own.items())]
        states = []
        for count in range(1, len(changing) + 1):
            picked = {changing[int((k + 0.5) * len(changing) / count)] for k in range(count)}
            schemes = [{**own, **wider[i]} if i in picked else own for i, own in enumerate(now)]
            states.append(self._step(layers, costs, schemes, count == len(changing)))
        for i in changing:
            now[i] |= wider[i]
        return states

    def _step(self, layers: range, costs: Sequence[Sequence[int]], schemes: Sequence[Schemes], whole: bool) -> _Step:
        chosen = [self._index[layer][tuple(sorted(own.items()))] for layer, own in zip(layers, schemes, strict=True)]
        return _Step(tuple(chosen), sum(own[i] for own, i in zip(costs, chosen, strict=True)), whole)

    @cached_property
    def _index(self) -> list[dict[tuple[tuple[str, str], ...], int]]:
        return [
            {tuple(sorted(choice.schemes.items())): i for i, choice in enumerate(choices)}
            for choices in self.choices.layers
        ]


@dataclass(frozen=True)
class _Step:
    """Choices of some layers. whole: no layer of them lags behind the others."""

    chosen: tuple[int, ...]
    cost: int
    whole: bool


def recipe_document(layers: Sequence[Schemes], data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with these schemes: the most frequent one of each role for all layers, and `layers` for the others."""
    default = {}
    for role in ROLES:
        counts = Counter(own[role] for own in layers if role in own)
        if counts:
            default[role] = min(counts, key=lambda s: (-counts[s], s))
    differing = {n: {r: s for r, s in own.items() if s != default[r]} for n, own in enumerate(layers)}
    document = {"name": NAME, "format": "compressed-tensors", "rounding": ROUNDING, "schemes": default}
    return document | {"layers": join_layers(differing), "data": dict(data)}
