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
from ..artifact.identity import SOURCE, differences, identify, touched
from ..artifact.journal import Journal, check_apart, check_output_folder, refuse_other_facts, remove_leftover
from ..artifact.manifest import MANIFEST, Manifest, load_manifest
from ..artifact.partly import open_output
from ..artifact.reread import other_shards, recorded_digests, stored_infos
from ..artifact.source_record import check_carried
from ..artifact.uploads import read_uploads
from ..calibration.experts import ExpertLedger
from ..checkpoint import ShardRecord, write_json_atomic
from ..errors import CalibrationError, OutputError
from ..planning.plan import Plan
from ..planning.resources import Resources, check_disk, resources
from ..planning.streaming import Progressed
from ..planning.unit import Unit
from ..quant.reading import SourceReader
from ..running import steps
from ..running.device import device_name, pick_device
from ..running.progress import Progress
from ..running.stopping import StopFlag, stop_on_signals
from .device_memory import check_device
from .finish import finish, write_rehearsal
from .from_hub import check_local, check_remote, shards_budget, shards_of_hub
from .gpu_stage import why_plain
from .job import Run, Settings, out_of_memory
from .pipeline import convert_units
from .recheck import recheck, refuse_unknown
from .shard_sink import feed
from .units import shard_facts
from .words import LOOKING, arrival_words, finished_words


def convert(plan: Plan, output: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    """`start.convert` in this process: all of it, or the driver of data-free units on a Ray cluster."""
    check_places(plan, output, settings)
    steps.step(LOOKING)
    device = pick_device(settings.device)
    if (done := finished(plan, output, settings, device, progress)) is not None:
        return done
    facts = job_facts(plan, settings, device)
    source = {SOURCE: identify(plan.checkpoint, plan.copied_files)}
    begun = Journal(output)
    begun.check(facts, source)
    need = _check_room(plan, output, settings, device, begun)
    budget = shards_budget(plan, output, settings, need)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        cluster = None
        if settings.engine == "ray":
            from .ray import cluster as ray_cluster

            steps.step("joining the Ray cluster")
            # Before there is a folder: a cluster that cannot be used leaves nothing behind.
            cluster = stack.enter_context(ray_cluster.cluster(settings.address, device.type, stop))
            steps.step(LOOKING)
        journal = Journal.begin(output, facts, source)
        stack.callback(journal.release)
        if (done := _finished(plan, output, facts, progress)) is not None:  # by another process, while this one waited
            journal.remove()
            return done
        elsewhere = _begin_sink(settings, plan, output, stop, stack)
        recheck(plan, journal, source[SOURCE], stop, progress, elsewhere)
        journal.accept(facts, source)
        plan.checkpoint.record_reads()
        journal.unit_read = lambda unit: recorded_digests(plan.checkpoint, stored_infos(plan.units[unit]))
        reader = SourceReader(plan.checkpoint, plan.sources)
        if reader.note:
            progress.say(f"note: {reader.note}")
            plan.notes.append(reader.note)
        stack.enter_context(shards_of_hub(plan, journal, budget, stop, progress))
        try:
            return _convert(Run(plan, output, reader, settings, device, journal, stop, progress, cluster), facts)
        except torch.OutOfMemoryError as error:
            can_spill = plan.recipe.calibrated and settings.ranks is None and not settings.spill
            raise out_of_memory(device, error, can_spill) from None


def finished(
    plan: Plan, output: Path, settings: Settings, device: torch.device, progress: Progress
) -> dict[str, Any] | None:
    """The manifest of an output that an earlier run completed, with what it may still lack added; None if there is none.

    Raises OutputError for a finished output of another job, CalibrationError where --strict-coverage refuses it.
    """
    done = _finished(plan, output, job_facts(plan, settings, device), progress)
    if done is None:
        return None
    if settings.strict_coverage:
        _refuse_starved(output, (done.get("coverage") or {}).get("starved", {}))
    _write_own_figures(plan, output, done)
    remove_leftover(output)
    uploads = read_uploads(output)
    away = f"; {len(uploads.dropped)} of its shards are on {uploads.repo} alone" if uploads and uploads.dropped else ""
    progress.say(f"{output} is already complete{away}")
    return done


def what_is_there(plan: Plan, output: Path, settings: Settings, device: torch.device, progress: Progress) -> str:
    """What `convert` would find in the output folder, for a person; writes nothing.

    Raises OutputError for an output that is finished or begun otherwise, StoppedError where the disk or the GPU has too little room.
    """
    facts = job_facts(plan, settings, device)
    if _finished(plan, output, facts, progress) is not None:
        return "complete already, from the same source and recipe: nothing would be done"
    journal = Journal(output)
    begun = journal.check(facts, {SOURCE: identify(plan.checkpoint, plan.copied_files)})
    _check_room(plan, output, settings, device, journal)
    if begun:
        return f"begun: {len(journal.records)} of {len(plan.units)} shards are finished, and the run continues"
    return "new; there is room on its disk"


def _check_room(plan: Plan, output: Path, settings: Settings, device: torch.device, begun: Journal) -> Resources:
    """What the conversion takes. begun: what it goes on with. Raises StoppedError where the disk or this process's GPU has too little room."""
    so_far = Progressed(begun.records.keys(), begun.last_boundary())
    held = settings.sink.held if settings.sink else None
    need = resources(plan, device.type == "cuda", spill=settings.spill, held=held, so_far=so_far)
    check_disk(plan, output, need)
    if settings.engine == "local" and not settings.spill:  # on Ray other GPUs do it
        check_device(plan, device, need, can_spill=settings.ranks is None)
    return need


def rehearse(plan: Plan, folder: Path, settings: Settings) -> None:
    """Write into `folder` what the conversion will write beside the shards (`finish.write_rehearsal`)."""
    facts = job_facts(plan, settings, pick_device(settings.device))
    write_rehearsal(plan, folder, {"job": facts, "seconds": 0.0})


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


def _begin_sink(
    settings: Settings, plan: Plan, output: Path, stop: StopFlag, stack: contextlib.ExitStack
) -> Mapping[str, str]:
    """What `ShardSink.begin` gives. Raises OutputError where shards left the disk in an earlier run and nobody looks after them in this one."""
    if settings.sink is not None:
        stack.callback(settings.sink.close)
        return settings.sink.begin(plan, output, stop)
    uploads = read_uploads(output)
    if uploads is not None and uploads.dropped:
        raise OutputError(
            f"{output} was begun with --publish {uploads.repo} --drop-uploaded, and {len(uploads.dropped)} shards are there alone: "
            "repeat that command to continue it, or choose another folder."
        )
    return {}


def check_places(plan: Plan, output: Path, settings: Settings | None = None) -> None:
    """Raise CheckpointError, PlanError or OutputError where the source cannot be read here or the output folder is not to be used."""
    if plan.checkpoint.remote is not None:
        check_remote(plan, settings or Settings())
    else:
        check_local(plan.checkpoint, settings or Settings())
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
        "torch": torch.__version__,
        # searched scales depend on the order in which a device sums
        "device": device_name(device) if calibrated else None,
        "transformers": transformers_version() if calibrated else None,
        "micro_batch_tokens": settings.micro_batch_tokens if calibrated else None,
    }


def _finished(plan: Plan, output: Path, facts: dict[str, Any], progress: Progress) -> dict[str, Any] | None:
    """The manifest of a finished output made of the same source from the same facts; None if there is none.

    Raises OutputError if it differs. Of its shards the sizes are compared: `verify` reads their bytes.
    """
    path = output / MANIFEST
    if not path.exists() or not (output / "config.json").exists():
        return None
    try:
        manifest = load_manifest(path, Manifest)
    except ValueError as error:
        raise OutputError(f"{error}: remove {output} and start again.") from None
    begun = manifest.job.model_dump()
    if manifest.schema_version == 1 and begun["torch"] is None:
        begun["torch"] = facts["torch"]  # not recorded then for recipes that do not calibrate
    other = {SOURCE: _other_source(plan, output, manifest, progress)}
    refuse_other_facts(output, begun, facts, other, finished=True)
    uploads = read_uploads(output)
    for shard, written in manifest.shards.items():
        path = output / shard
        if uploads is not None and shard in uploads.dropped:
            continue
        if not path.exists() or path.stat().st_size != written.size:
            raise OutputError(
                f"{path} is missing or has another size than when {output} was finished: remove {output} and convert again."
            )
    return manifest.to_json()


def _other_source(plan: Plan, output: Path, manifest: Manifest, progress: Progress) -> list[str]:
    """What shows that a finished output was made from another source than the plan's; shards whose files changed are read."""
    then, now = manifest.source.identity, identify(plan.checkpoint, plan.copied_files)
    if then is None:
        progress.say(
            f"note: {output} was made before m3quant recorded what it read, so that only names, shapes and config.json of the "
            "source were compared; m3quant verify --source compares the weights"
        )
        changed = (n for n, file in manifest.source.files.items() if now.files.get(n, file.sha256) != file.sha256)
        return [f"{name} has changed" for name in changed]
    found = list(differences(then, now, finished=True))
    if found or plan.checkpoint.fingerprint() != manifest.source.fingerprint or not (moved := touched(then, now)):
        return found
    refuse_unknown(plan.checkpoint, output, moved)
    read = {unit.index: manifest.source.read.get(unit.shard, {}) for unit in plan.units}
    progress.say(
        f"files of the source were written or moved since: reading {len(moved)} shards to see that they are the same"
    )
    with stop_on_signals() as stop:
        shards = other_shards(plan.checkpoint, read, lambda i: stored_infos(plan.units[i]), moved, stop)
    return [f"{shard} holds other weights" for shard in shards]


def _convert(run: Run, facts: dict[str, Any]) -> dict[str, Any]:
    plan, output, journal = run.plan, run.output, run.journal
    if run.settings.strict_coverage:
        ledgers = [ExpertLedger.from_json(r["ledger"]) for r in journal.records.values() if r.get("ledger")]
        _refuse_starved(output, {str(ledger.layer): ledger.starved for ledger in ledgers if ledger.starved})
    done = sum(plan.units[i].bytes_in for i in journal.records)
    run.progress.start(sum(u.bytes_in for u in plan.units), done, "convert")
    if journal.records:
        run.progress.say(f"continuing: {len(journal.records)} of {len(plan.units)} shards are finished")
    started = time.monotonic()
    sink = run.settings.sink
    if sink is not None:
        feed(sink, plan, journal)
    if not plan.recipe.calibrated:
        _convert_units(run)
        extra: dict[str, Any] = {}
    else:
        from .calibrated import convert_calibrated

        if run.settings.ranks is not None:
            run.settings.ranks.share(journal.records)
        extra = convert_calibrated(run)
    run.stop.check()
    if sink is not None:
        extra["shard_checks"] = sink.checks
        steps.step("waiting for the last uploads")
        sink.wait()
    extra["job"] = facts
    extra["seconds"] = round(time.monotonic() - started, 3)
    steps.step("writing the files beside the shards")
    # A signal from here on finds less than a second of work left: it is done rather than dropped.
    manifest = finish(plan, output, journal, extra)
    _write_own_figures(plan, output, manifest)
    journal.remove()
    return manifest


def _refuse_starved(output: Path, starved: Mapping[str, list[int]]) -> None:
    """Raise CalibrationError for layers that a run without --strict-coverage finished: they would not be checked again."""
    if starved:
        layer, experts = next(iter(starved.items()))
        raise CalibrationError(
            f"{output}: finished layers have experts that were topped up (layer {layer}: {', '.join(map(str, experts[:8]))}): "
            "drop --strict-coverage to keep them, or remove the folder and start again with more text or fewer --min-expert-tokens."
        )


def _write_own_figures(plan: Plan, output: Path, manifest: dict[str, Any]) -> None:
    """eval.json of what the conversion measured in its own pass, unless an evaluation has written a fuller one."""
    if manifest.get("heldout") and not (output / EVAL_FILE).exists():
        fingerprint = output_fingerprint(open_output(output, plan), manifest)
        record = conversion_record(plan, output.resolve().name, fingerprint, manifest)
        write_json_atomic(output / EVAL_FILE, record.model_dump(mode="json"))


def _convert_units(run: Run) -> None:
    """All units that the journal has no record of, rounded to nearest: none depends on another."""
    todo = [unit for unit in run.plan.units if unit.index not in run.journal.records]
    steps.step(arrival_words(run.plan, todo))
    if run.cluster is not None:
        from .ray.units import run_units

        run_units(run, todo)
        return
    if run.device.type == "cuda" and (reason := why_plain(run.device)):
        run.progress.say(
            f"note: rounding with plain torch operations, because Triton's kernels do not run here ({reason})"
        )

    first = True

    def came(count: int) -> None:
        nonlocal first
        if first:
            steps.step(finished_words(run.plan, run.journal))
            first = False
        run.progress.advance(count)

    def finished(unit: Unit, record: ShardRecord) -> None:
        run.journal.finish_unit(unit.index, shard_facts(record))
        steps.step(finished_words(run.plan, run.journal))

    convert_units(
        run.output, todo, run.reader, run.plan.recipe.format, run.device, run.stop, came, finished,
    )  # fmt: skip
