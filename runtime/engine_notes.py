"""What is known of engine releases that matters to a checkpoint as it is stored: `plan` and `serve` say it."""

from __future__ import annotations

from ..engines.integers import is_narrow
from ..engines.rules import integer_notes, zero_point_notes
from ..schemes import Scheme
from .fit import Fit


def weight_notes(fit: Fit) -> list[str]:
    """What is known of engines that read weights stored so."""
    found = list[str]()
    if fit.ask.vision and not fit.model.has_vision:
        found.append(f"{fit.model.where} has no vision tower: --vision changes nothing")
    dtypes = {group.dtype for group in fit.model.groups if group.role == "routed_experts"}
    if "F8_E4M3" in dtypes:
        found += fit.engine.activation_notes(fit.model.family, [Scheme("fp8", bits=8)], fit.model.method)
    # Of a checkpoint's config only all schemes together are known; whether the experts have zero points, the tensors say.
    if any(group.role == "routed_experts" and group.leaf == "weight_zero_point" for group in fit.model.groups):
        found += zero_point_notes(fit.model.schemes, "compressed-tensors", [fit.engine])
    return [*found, *integer_notes([s for s in fit.model.schemes if is_narrow(s)])]


def release_notes(fit: Fit) -> list[str]:
    """Where the release that was asked for is none that was read."""
    return fit.engine.unread(fit.ask.release) if fit.ask.release else []
