"""The conversion from end to end: checks, journal, units, finish."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..artifact.conversion_eval import conversion_record, output_fingerprint
from ..artifact.eval_record import EVAL_FILE
from ..artifact.journal import MANIFEST, Journal, check_apart, check_output_folder, refuse_other_facts, remove_leftover
from ..artifact.source_record import check_carried
from ..calibration.experts import ExpertLedger
from ..checkpoint import Checkpoint, write_json_atomic
from ..checkpoint.bounded import MANIFEST_BYTES, read_json
from ..errors import CalibrationError, CheckpointError, OutputError
from ..planning.plan import Plan, Unit
from ..planning.resources import check_disk, resources
from ..quant.reading import SourceReader
from ..running.device import device_name, pick_device
from ..running.progress import Progress
from ..running.stopping import StopFlag, stop_on_signals
from .finish import finish
from .gpu_stage import why_plain
from .job import Run, Settings, out_of_memory
from .pipeline import convert_units
from .units import shard_facts


def convert(plan: Plan, output: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    """`start.convert` in this process: all of it, or the driver of data-free units on a Ray cluster."""
    check_places(plan, output)
    device = pick_device(settings.device)
    if (done := finished(plan, output, settings, device, progress)) is not None:
        return done
    facts = job_facts(plan, settings, device)
    check_disk(plan, output, resources(plan, device.type == "cuda", spill=settings.spill))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        cluster = None
        if settings.engine == "ray":
            from .ray import cluster as ray_cluster

            # Before there is a folder: a cluster that cannot be used leaves nothing behind.
            cluster = stack.enter_context(ray_cluster.cluster(settings.address, device.type, stop))
        journal = Journal.begin(output, facts)
        stack.callback(journal.release)
        if (done := _finished(output, facts)) is not None:  # by another process, while this one waited to begin
            journal.remove()
            return done
        reader = SourceReader(plan.checkpoint, plan.sources)
        try:
            return _convert(Run(plan, output, reader, settings, device, journal, stop, progress, cluster), facts)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(device, error) from None


def finished(
    plan: Plan, output: Path, settings: Settings, device: torch.device, progress: Progress
) -> dict[str, Any] | None:
    """The manifest of an output that an earlier run completed, with what it may still lack added; None if there is none.

    Raises OutputError for a finished output of another job, CalibrationError where --strict-coverage refuses it.
    """
    done = _finished(output, job_facts(plan, settings, device))
    if done is None:
        return None
    if settings.strict_coverage:
        _refuse_starved(output, (done.get("coverage") or {}).get("starved", {}))
    _write_own_figures(plan, output, done)
    remove_leftover(output)
    progress.say(f"{output} is already complete")
    return done


def follow(plan: Plan, output: Path, settings: Settings, progress: Progress) -> None:
    """Calibrate in step with the rank that runs `convert`, writing nothing. Raises as `convert_calibrated`."""
    from .calibrated import convert_calibrated

    assert settings.ranks is not None
    journal = Journal(output)
    journal.records = settings.ranks.share(None)
    reader = SourceReader(plan.checkpoint, plan.sources)
    try:
        device = pick_device(settings.device)
        convert_calibrated(Run(plan, output, reader, settings, device, journal, StopFlag(), progress))
    except torch.OutOfMemoryError as error:
        raise out_of_memory(settings.device, error) from None


def check_places(plan: Plan, output: Path) -> None:
    """Raise CheckpointError or OutputError where the source cannot be read here or the output folder is not to be used."""
    if not plan.checkpoint.local:
        raise CheckpointError(
            f"{plan.checkpoint.root} is on the Hub: download it first "
            f"(m3quant pull {plan.checkpoint.root} FOLDER) and convert the folder."
        )
    check_apart(Path(plan.checkpoint.root), output)
    check_output_folder(output)
    check_carried(plan.checkpoint)


def transformers_version() -> str:
    from importlib.metadata import version

    return version("transformers")


def job_facts(plan: Plan, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Everything the output's bytes depend on. A resumed run must have the same."""
    calibrated = plan.recipe.calibrated
    return {
        "fingerprint": plan.fingerprint(),
        "source": plan.checkpoint.fingerprint(),
        "recipe": json.dumps(plan.recipe.model_dump(), sort_keys=True),
        "version": __version__,
        "calibration": settings.windows.sha256 if calibrated and settings.windows else None,
        # searched scales depend on the order in which a device sums
        "device": device_name(device) if calibrated else None,
        "torch": torch.__version__ if calibrated else None,
        "transformers": transformers_version() if calibrated else None,
        "micro_batch_tokens": settings.micro_batch_tokens if calibrated else None,
    }


def _finished(output: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished output made from the same facts; None if there is none. Raises OutputError if it differs."""
    path = output / MANIFEST
    if not path.exists() or not (output / "config.json").exists():
        return None
    manifest = read_json(
        path, MANIFEST_BYTES, f"{path} is damaged: remove {output} and start again.", error=OutputError
    )
    if not all(isinstance(manifest.get(key), dict) for key in ("job", "shards")):
        raise OutputError(f"{path} is damaged: remove {output} and start again.")
    refuse_other_facts(output, manifest.get("job", {}), facts, finished=True)
    for shard, written in manifest["shards"].items():
        path = output / shard
        if not path.exists() or path.stat().st_size != written["size"]:
            raise OutputError(
                f"{path} is missing or has another size than when {output} was finished: remove {output} and convert again."
            )
    return manifest


def _convert(run: Run, facts: dict[str, Any]) -> dict[str, Any]:
    plan, output, journal = run.plan, run.output, run.journal
    _drop_lost_records(plan, output, journal)
    if run.settings.strict_coverage:
        ledgers = [ExpertLedger.from_json(r["ledger"]) for r in journal.records.values() if r.get("ledger")]
        _refuse_starved(output, {str(ledger.layer): ledger.starved for ledger in ledgers if ledger.starved})
    done = sum(plan.units[i].bytes_in for i in journal.records)
    run.progress.start(sum(u.bytes_in for u in plan.units), done)
    if journal.records:
        run.progress.say(f"continuing: {len(journal.records)} of {len(plan.units)} shards are finished")
    started = time.monotonic()
    if not plan.recipe.calibrated:
        _convert_units(run)
        extra: dict[str, Any] = {}
    else:
        from .calibrated import convert_calibrated

        if run.settings.ranks is not None:
            run.settings.ranks.share(journal.records)
        extra = convert_calibrated(run)
    run.stop.check()
    extra["job"] = facts
    extra["seconds"] = round(time.monotonic() - started, 3)
    # A signal from here on finds less than a second of work left: it is done rather than dropped.
    manifest = finish(plan, output, journal, extra)
    _write_own_figures(plan, output, manifest)
    journal.remove()
    return manifest


def _refuse_starved(output: Path, starved: Mapping[str, list[int]]) -> None:
    """Raise CalibrationError for layers that a run without --strict-coverage finished: nobody would look at them again."""
    if starved:
        layer, experts = next(iter(starved.items()))
        raise CalibrationError(
            f"{output}: finished layers have experts that were topped up (layer {layer}: {', '.join(map(str, experts[:8]))}): "
            "drop --strict-coverage to keep them, or remove the folder and start again with more text or fewer --min-expert-tokens."
        )


def _write_own_figures(plan: Plan, output: Path, manifest: dict[str, Any]) -> None:
    """eval.json of what the conversion measured in its own pass, unless an evaluation has written a fuller one."""
    if manifest.get("heldout") and not (output / EVAL_FILE).exists():
        fingerprint = output_fingerprint(Checkpoint.open(output), manifest)
        record = conversion_record(plan, output.resolve().name, fingerprint, manifest)
        write_json_atomic(output / EVAL_FILE, record.model_dump(mode="json"))


def _convert_units(run: Run) -> None:
    """All units that the journal has no record of, rounded to nearest: none depends on another."""
    todo = [unit for unit in run.plan.units if unit.index not in run.journal.records]
    if run.cluster is not None:
        from .ray.units import run_units

        run_units(run, todo)
        return
    if run.device.type == "cuda" and (reason := why_plain(run.device)):
        run.progress.say(
            f"note: rounding with plain torch operations, because Triton's kernels do not run here ({reason})"
        )
    convert_units(
        run.output, todo, run.reader, run.plan.recipe.format, run.device, run.stop, run.progress.advance,
        lambda unit, record: run.journal.finish_unit(unit.index, shard_facts(record)),
    )  # fmt: skip


def _drop_lost_records(plan: Plan, output: Path, journal: Journal) -> None:
    """A recorded shard that is gone or of another size must be made again; calibrated layers can only go on from the last."""
    lost = [u for u in plan.units if u.index in journal.records and not _intact(output, u)]
    if not lost:
        return
    if plan.recipe.calibrated and any(u.layer is not None for u in lost):
        raise OutputError(
            f"{output / lost[0].shard} was finished but is missing or has another size now: calibrated layers depend on "
            f"one another, so remove {output} and start again."
        )
    for unit in lost:
        del journal.records[unit.index]


def _intact(output: Path, unit: Unit) -> bool:
    path = output / unit.shard
    return path.exists() and path.stat().st_size == unit.bytes_out
