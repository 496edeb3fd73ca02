"""Measuring for `fit` and `convert`: windows, progress, and the file that is written."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import Checkpoint, write_bytes_atomic
from ..errors import OutputError, PlanError
from ..extras import need
from ..planning.fit import Fitting
from ..planning.sensitivity import Sensitivity
from ..running import steps
from ..running.progress import ShowProgress, quietly
from .calibration_text import calibration_windows

WINDOWS, HELDOUT = 16, 16  # of 512 tokens: docs/fit.md has what more of them change


def measure_file(
    checkpoint: Checkpoint,
    path: Path,
    device: str,
    corpus: tuple[str, ...],
    windows: int | None = None,
    heldout: int | None = None,
    progress: ShowProgress = quietly,
    cache_disk: int | None = None,
) -> Sensitivity:
    """Measure what each scheme costs in each layer of `checkpoint`, and write it to `path`.

    cache_disk: bytes that shards of one on the Hub or in an object store may take beside `path` at a time.
    Raises PlanError or OutputError, before anything is read, where the one has no weights or the other cannot be
    written, StoppedError where the GPU has too little room, and PackageMissing without torch.
    """
    need("convert", "m3quant fit --measure")
    from ..calibration.mixture import mixture_sha256, parse_mixture
    from ..convert.device_memory import check_measuring
    from ..convert.measure import MeasureSettings, measure
    from ..running.device import pick_device

    if not checkpoint.local and checkpoint.remote is None:
        raise PlanError(
            f"{checkpoint.root} has no weights, and measuring reads every weight: give a checkpoint, or leave --measure out."
        )
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise OutputError(f"{path} cannot be written: give --sensitivity a file in a folder that exists.")
    data = {"windows": windows or WINDOWS, "heldout_windows": heldout or HELDOUT}
    fitting = Fitting(checkpoint, data)
    check_measuring(fitting, pick_device(device))
    parts = parse_mixture(corpus)
    partial = path.with_name(f"{path.name}.partial")
    how = MeasureSettings(device=device, shards=path.with_name(f"{path.name}.shards"), cache_disk=cache_disk)
    with progress("measure") as shown:
        steps.step(f"reading text for {sum(data.values())} windows")
        text = calibration_windows(fitting.base, parts)
        for note in text.notes:
            shown.say(f"note: {note}")
        found = measure(fitting, text, mixture_sha256(parts), how, shown, partial)
    write_bytes_atomic(path, found.dump())
    return found
