"""Data-free units over every GPU (or core) of a Ray cluster. Ray schedules; the driver alone keeps the journal.

A unit is one Ray task: it depends on no other, and rounding to nearest gives the same bytes wherever it runs, so the output
is the one of a single GPU. A task whose worker or node dies is run again on another worker. Every attempt writes into a folder of its
own and renames the finished shard into place: a worker that was taken for dead and wakes up again can damage no file.
Of a source on the Hub or in an object store the driver fetches the shards (`arrivals`) and gives the workers its plan.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import uuid
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...artifact.identity import sampled_identity
from ...artifact.journal import FOLDER
from ...artifact.reread import recorded_digests, stored_infos
from ...checkpoint import Checkpoint, make_folder, sync_folder
from ...errors import M3QuantError, OutputError, PlanError
from ...planning.plan import Plan, make_plan
from ...planning.unit import Unit
from ...recipe.recipe import build_recipe
from ...running import steps
from ...running.stopping import StopFlag
from ..job import Run
from ..words import finished_words
from .arrivals import arrivals
from .cluster import POLL_SECONDS, Patience, amount_words, counted, describe, failure_of

MAX_RETRIES = 3  # of a unit whose worker died; a refusal by m3quant is not retried
_ATTEMPT = "attempt-"


@dataclass(frozen=True)
class Job:
    """What a worker needs to plan the same conversion by itself: it sees the checkpoint and the output under the same paths."""

    source: str
    output: str
    recipe: str  # JSON of the resolved recipe
    fingerprint: str
    sampled: str  # of the source's weights (`artifact.identity.sampled_identity`)
    device: str  # "cuda" or "cpu"; Ray shows a worker its own GPU only
    planned: Any = None  # of a source elsewhere: the plan in Ray's object store, so that no worker asks the Hub


def job_of(plan: Plan, output: Path, device: str) -> Job:
    root = plan.checkpoint.root
    source = root if plan.checkpoint.remote is not None else str(Path(root).resolve())
    sampled = sampled_identity(plan.checkpoint)
    return Job(source, str(output.resolve()), plan.recipe.model_dump_json(), plan.fingerprint(), sampled, device)


def run_units(run: Run, units: list[Unit]) -> None:
    """Convert `units` on run.cluster, journalling each as it finishes.

    Raises OutputError where a unit was lost more than MAX_RETRIES times, and whatever the conversion of a unit raises.
    """
    assert run.cluster is not None
    cluster, ray = run.cluster, run.cluster.ray
    job = job_of(run.plan, run.output, cluster.device)
    if (store := run.plan.checkpoint.remote) is not None:
        assert store.cache is not None
        fetched = run.plan.checkpoint.fetched_into(store.cache.folder.resolve())
        job = replace(job, planned=ray.put(replace(run.plan, checkpoint=fetched)))
    each = amount_words(cluster.amount)
    run.progress.say(f"ray: {counted(len(units), 'shard')} over {describe(ray)}, {each} for each")
    # max_calls: by default a worker that had a GPU ends with its task, and each shard would wait for imports and CUDA anew.
    options = {"max_retries": MAX_RETRIES, "max_calls": 0, "scheduling_strategy": "SPREAD", **cluster.amount}
    remote = ray.remote(**options)(_convert_unit)
    running: dict[Any, Unit] = {}
    patience = Patience(f"a shard wants {each}", cluster, run.progress)
    left_before = _attempts(run.output)
    try:
        with arrivals(run.plan, units) as coming:
            while running or coming.left:
                for unit in coming.take(0 if running else POLL_SECONDS):
                    running[remote.remote(job, unit.index)] = unit
                done = ray.wait(list(running), timeout=POLL_SECONDS)[0] if running else []
                run.stop.check()
                patience.look(bool(done or not running or _attempts(run.output) - left_before))
                for reference in done:
                    unit = running.pop(reference)
                    facts = _result(ray, reference, unit)
                    run.journal.finish_unit(unit.index, facts)
                    coming.release(unit)
                    steps.step(finished_words(run.plan, run.journal))
                    run.progress.advance(unit.bytes_in)
    finally:
        # Workers of a driver that has left are ended by Ray; what they leave is removed here or with the journal.
        running.clear()
        for folder in _attempts(run.output):
            shutil.rmtree(folder, ignore_errors=True)


def _result(ray: Any, reference: Any, unit: Unit) -> dict[str, Any]:
    try:
        facts, refusal = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # the task itself failed: its worker was not lost
        raise OutputError(f"{unit.label}: {failure_of(error)}: finished shards are kept.") from None
    except ray.exceptions.RayError as error:
        raise OutputError(
            f"{unit.label}: its Ray worker was lost {MAX_RETRIES + 1} times ({type(error).__name__}: {str(error).splitlines()[0]}): "
            "finished shards are kept; look at that node's memory and log, and run the same command again."
        ) from None
    if refusal is not None:
        raise refusal
    assert isinstance(facts, dict)
    return facts


def _convert_unit(job: Job, index: int) -> tuple[dict[str, Any] | None, M3QuantError | None]:
    """The task: one unit into place. A refusal is returned, not raised, so that Ray neither retries nor wraps it."""
    attempt = Path(job.output) / FOLDER / f"{_ATTEMPT}{uuid.uuid4().hex}"
    try:
        check_output_seen(job)
        make_folder(attempt)  # first, because it shows the driver that the work has begun
        return _convert_in(attempt, job, index), None
    except M3QuantError as error:
        return None, error
    finally:
        shutil.rmtree(attempt, ignore_errors=True)


def _convert_in(attempt: Path, job: Job, index: int) -> dict[str, Any]:
    """Make a unit's shard in the folder `attempt` and rename it into the output; what the journal keeps of it."""
    import torch

    from ...quant.reading import SourceReader
    from ..job import out_of_memory
    from ..pipeline import convert_unit
    from ..units import shard_facts

    plan = same_plan(job)
    unit = plan.units[index]
    plan.checkpoint.record_reads()
    reader = SourceReader(plan.checkpoint, plan.sources, looked=job.planned is not None)
    try:
        record = convert_unit(
            attempt, unit, reader, plan.recipe.format, torch.device(job.device), StopFlag(), lambda count: None
        )
    except torch.OutOfMemoryError as error:
        raise out_of_memory(f"{job.device} on node {socket.gethostname()}", error) from None
    os.replace(attempt / unit.shard, Path(job.output) / unit.shard)
    sync_folder(Path(job.output))
    return {**shard_facts(record), "read": recorded_digests(plan.checkpoint, stored_infos(unit))}


def check_output_seen(job: Job) -> None:
    """Raise PlanError where this node does not see the output folder."""
    if not Path(job.output).is_dir():
        raise PlanError(
            f"node {socket.gethostname()} does not see the output folder {job.output}: put it on a file system that all nodes share."
        )


@lru_cache(maxsize=1)
def same_plan(job: Job) -> Plan:
    """The plan as this node sees it. Raises PlanError where this node sees another checkpoint or another output folder."""
    check_output_seen(job)
    if job.planned is not None:
        import ray

        planned: Plan = ray.get(job.planned)
        return planned
    plan = make_plan(Checkpoint.open(job.source), build_recipe(json.loads(job.recipe)))
    if plan.fingerprint() != job.fingerprint or sampled_identity(plan.checkpoint) != job.sampled:
        raise PlanError(
            f"node {socket.gethostname()} sees another checkpoint at {job.source}, or has another version of m3quant: use one shared copy of both."
        )
    return plan


def _attempts(output: Path) -> set[Path]:
    """Folders in which workers are at a unit, or that dead or cancelled ones left."""
    return set((output / FOLDER).glob(f"{_ATTEMPT}*"))
