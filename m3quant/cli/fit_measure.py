"""Measuring for `fit` and `convert`: windows, progress, and the file that is written."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import Checkpoint, write_bytes_atomic
from ..errors import OutputError, PlanError
from ..planning.fit import Fitting
from ..planning.sensitivity import Sensitivity

WINDOWS, HELDOUT = 16, 16  # of 512 tokens: docs/fit.md has what more of them change


def measure_file(
    checkpoint: Checkpoint,
    path: Path,
    device: str,
    corpus: tuple[str, ...],
    windows: int | None = None,
    heldout: int | None = None,
) -> Sensitivity:
    """Measure `checkpoint` and write `path`. Raises PlanError or OutputError, before anything is
    read, where the one is not on this machine or the other cannot be written."""
    from ..calibration.mixture import mixture_sha256, parse_mixture
    from ..convert.measure import MeasureSettings, measure
    from .convert import calibration_windows
    from .progress import BytesProgress

    if not checkpoint.local:
        raise PlanError(
            f"{checkpoint.root} is no folder with weights on this machine, and measuring reads every weight: download it "
            "first (m3quant pull), or leave --measure out."
        )
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise OutputError(f"{path} cannot be written: give --sensitivity a file in a folder that exists.")
    data = {"windows": windows or WINDOWS, "heldout_windows": heldout or HELDOUT}
    fitting = Fitting(checkpoint, data)
    parts = parse_mixture(corpus)
    partial = path.with_name(f"{path.name}.partial")
    with BytesProgress("measure") as progress:
        progress.say(f"reading text for {sum(data.values())} windows")
        text = calibration_windows(fitting.base, parts)
        for note in text.notes:
            progress.say(f"note: {note}")
        found = measure(fitting, text, mixture_sha256(parts), MeasureSettings(device=device), progress, partial)
    write_bytes_atomic(path, found.dump())
    return found
