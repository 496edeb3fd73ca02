"""Where a conversion starts: in this process, or on the ranks of a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..planning.plan import Plan
from ..running.device import pick_device
from ..running.progress import Progress
from . import conversion
from .job import Settings


def convert(plan: Plan, output: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Convert `plan` into `output` and return the manifest. Continues an interrupted run; a finished one returns at once.

    Raises M3QuantError subclasses with what is wrong and what to do; nothing half-written is ever left under a final name.
    """
    if settings.engine == "ray" and plan.recipe.calibrated:
        from .ray.calibrated import convert_on_ranks

        conversion.check_places(plan, output, settings)
        device = pick_device(settings.device)
        if (done := conversion.finished(plan, output, settings, device, progress)) is not None:
            return done
        return convert_on_ranks(plan, output, settings, device.type, progress)
    return conversion.convert(plan, output, settings, progress)
