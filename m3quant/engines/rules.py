"""What all engines can read of a checkpoint, by release: rules of plan, verify, serve and cards. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import EngineMissing, PlanError
from ..families import Family
from ..schemes import Scheme
from . import DEFAULT, ENGINES
from .base import Engine, precedes
from .installed import Installed
from .integers import has_common_zero_points, is_narrow, names


def check_family_format(family: Family, fmt: str) -> None:
    """Raise PlanError for an output format in which the engine that plans are made for cannot load the family."""
    if reason := family.in_engine(DEFAULT.name).refused_formats.get(fmt):
        raise PlanError(f"format '{fmt}' cannot be served for {family.model_type}: {reason}.")


def check_expert_scheme(scheme: Scheme) -> None:
    """Raise PlanError for a scheme that no engine runs routed experts in."""
    refusals = [engine.expert_refusal(scheme) for engine in ENGINES]
    if all(refusals):
        raise PlanError(refusals[0])


def check_schemes(engine: Engine, installed: Installed | None, schemes: Collection[Scheme]) -> None:
    """Raise EngineMissing where the engine, or its installed release, does not read integers of these widths."""
    narrow = sorted({scheme.bits for scheme in schemes if is_narrow(scheme)})
    if not narrow:
        return
    what = f"integers of {' and '.join(map(str, narrow))} bits"
    first = engine.can.narrow_integers
    if not first:
        others = " or ".join(f"{e.title} {e.can.narrow_integers} or newer" for e in ENGINES if e.can.narrow_integers)
        raise EngineMissing(f"{engine.title} does not read {what}, only 4 and 8: serve this checkpoint with {others}.")
    if installed is not None and precedes(installed.version, first):
        raise EngineMissing(
            f"{engine.title} {installed.version} does not read {what}, only 4 and 8: install {first} or newer."
        )


def integer_notes(experts: Collection[Scheme], others: Collection[Scheme] = ()) -> tuple[str, ...]:
    """What the user must know of engine releases before serving these schemes of routed experts and of other modules."""
    notes = []
    if narrow := names(filter(is_narrow, {*experts, *others})):
        able = [
            f"{e.title} {e.can.narrow_integers} or newer {e.can.narrow_integers_by}"
            for e in ENGINES
            if e.can.narrow_integers
        ]
        unable = ["older ones", *(e.title for e in ENGINES if not e.can.narrow_integers)]
        notes.append(f"{narrow}: {', '.join(able)}; {_listed(unable)} read integers of 4 and 8 bits only, AutoAWQ of 4")
    return (*notes, *(note for engine in ENGINES for note in engine.expert_notes(experts)))


def zero_point_notes(experts: Collection[Scheme], fmt: str, engines: Sequence[Engine] = ENGINES) -> tuple[str, ...]:
    """The same of routed experts with zero points in compressed-tensors. AutoAWQ's files go another way.

    Widths that only newer releases read need a release that is newer than these anyway.
    """
    stopping = [engine.can.no_zero_points for engine in engines if engine.can.no_zero_points]
    if fmt != "compressed-tensors" or not stopping or not any(map(has_common_zero_points, experts)):
        return ()
    return (
        f"routed experts with zero points: {'; '.join(stopping)}. Serve with a newer release, or quantize routed experts "
        "without zero points",
    )


def activation_notes(family: Family, experts: Collection[Scheme], fmt: str) -> tuple[str, ...]:
    """The same of the experts' activation. fmt: the checkpoint's format, or its quant_method."""
    return tuple(note for engine in ENGINES for note in engine.activation_notes(family, experts, fmt))


def lookup_problems(family: Family, quantization: Mapping[str, Any], modules: Mapping[str, Scheme]) -> list[str]:
    """Where an engine would find another scheme in `quantization_config` than on-disk `modules` have; empty when all load as meant."""
    return [problem for engine in ENGINES for problem in engine.lookup_problems(family, quantization, modules)]


def _listed(words: Sequence[str]) -> str:
    """For display: "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
