"""A calibrated conversion on the GPUs of a Ray cluster: one actor per GPU, all on the same step (calibration/ranks.py), rank 0 writing.

Layers depend on one another, so the cluster works on one layer at a time. If a worker dies, the others cannot finish the step:
all are restarted and continue from the last finished layer, to the same bytes.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...artifact.journal import Journal
from ...errors import M3QuantError, OutputError, PlanError
from ...planning.plan import Plan
from ...running import steps
from ...running.progress import Progress, Silent
from ...running.stopping import StopFlag, stop_on_signals
from ..job import Settings
from ..words import finished_words
from .cluster import POLL_SECONDS, Cluster, Patience, amount_words, cluster, counted, describe, failure_of
from .units import MAX_RETRIES, Job, job_of, same_plan

SETTLE_SECONDS = 30.0  # for Ray to notice a dead process after its peers have lost the connection to it


def convert_on_ranks(plan: Plan, output: Path, settings: Settings, device: str, progress: Progress) -> dict[str, Any]:
    """The whole calibrated conversion on every GPU (or core) of the cluster; returns the manifest.

    Raises PlanError where Ray is missing or the cluster cannot be used, OutputError where workers were lost more than
    MAX_RETRIES times, and whatever the conversion itself raises.
    """
    if settings.spill:
        raise PlanError("--spill keeps one process's hidden states on the disk: leave it out with --ray.")
    with stop_on_signals() as stop, cluster(settings.address, device, stop) as found:
        size = int(found.ray.cluster_resources()["GPU" if device == "cuda" else "CPU"])
        output.mkdir(parents=True, exist_ok=True)  # what a node is asked whether it sees
        for attempt in range(MAX_RETRIES + 1):
            told = f"{counted(size, 'rank')} in step over {describe(found.ray)}, {amount_words(found.amount)} for each"
            progress.say(f"ray: {told}")
            manifest = _try(found, plan, output, settings, size, progress, stop)
            if manifest is not None:
                return manifest
            if attempt < MAX_RETRIES:
                progress.say("ray: a worker was lost; all are started anew from the last finished layer")
    raise OutputError(
        f"{output}: Ray workers were lost {MAX_RETRIES + 1} times; finished layers are kept: look at the nodes' memory and logs, "
        "and run the same command again."
    )


def _try(
    found: Cluster, plan: Plan, output: Path, settings: Settings, size: int, progress: Progress, stop: StopFlag
) -> dict[str, Any] | None:
    """One start of all ranks; None if a worker died."""
    ray = found.ray
    actor = ray.remote(scheduling_strategy="SPREAD", **found.amount)(_Worker)
    workers = [actor.remote() for _ in range(size)]
    running: list[Any] = []
    try:
        meeting = "{}:{}".format(*_all_started(found, workers, progress, stop))
        job, local = job_of(plan, output, found.device), replace(settings, engine="local", address=None)
        threads = found.amount["num_cpus"]
        running = [worker.run.remote(job, local, rank, size, meeting, threads) for rank, worker in enumerate(workers)]
        watch = _Watch(plan, output, progress)
        first, waiting = running[0], list(running)
        while True:
            done, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
            stop.check()
            watch.look()
            for reference in done:
                manifest, refusal = ray.get(reference)
                if refusal is not None:
                    raise refusal
                if reference == first:
                    return dict(manifest)
    except ray.exceptions.RayActorError:
        return None
    except ray.exceptions.RayTaskError as error:
        if _somebody_died(ray, running):
            return None
        raise OutputError(f"{output}: {failure_of(error)}: finished layers are kept.") from None
    finally:
        for worker in workers:
            ray.kill(worker)


def _all_started(found: Cluster, workers: Sequence[Any], progress: Progress, stop: StopFlag) -> tuple[str, int]:
    """Wait until the cluster has room for every rank; where rank 0 can be met. A signal ends the waiting."""
    ray = found.ray
    steps.step("waiting for the ranks to start")
    answers = [worker.node.remote() for worker in workers]
    waiting = list(answers)
    wanted = f"every one of {counted(len(workers), 'rank')} wants {amount_words(found.amount)}"
    patience = Patience(wanted, found, progress)
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
        stop.check()
        patience.look(not waiting)
    meeting: tuple[str, int] = ray.get(answers[0])
    return meeting


def _somebody_died(ray: Any, running: Sequence[Any]) -> bool:
    """Whether a rank's process ended: its peers then fail with errors of the broken connection, often before Ray says why."""
    done, _ = ray.wait(list(running), num_returns=len(running), timeout=SETTLE_SECONDS)
    for reference in done:
        try:
            ray.get(reference)
        except ray.exceptions.RayActorError:
            return True
        except ray.exceptions.RayError:
            continue
    return False


class _Watch:
    """Tells of finished layers, which rank 0 journals on the file system that the driver sees too."""

    def __init__(self, plan: Plan, output: Path, progress: Progress) -> None:
        self.plan, self.journal, self.progress = plan, Journal(output), progress
        self.seen: set[int] = set()
        self.begun = False

    def look(self) -> None:
        self.journal.look()
        new = [index for index in self.journal.records if index not in self.seen]
        sizes = {unit.index: unit.bytes_in for unit in self.plan.units}
        first, self.begun = not self.begun, True
        if first:
            self.progress.start(sum(sizes.values()), sum(sizes[index] for index in new), "convert")
        else:
            for index in new:
                self.progress.advance(sizes[index])
                record = self.journal.records[index]
                if record.get("layer") is not None:
                    self.progress.say(f"layer {record['layer']}: stream error {record['stream_error']:.4f}")
        self.seen.update(new)
        if new or first:
            steps.step(finished_words(self.plan, self.journal))


class _Worker:
    """One rank. Ray shows it its own GPU only, as cuda:0."""

    def node(self) -> tuple[str, int]:
        """This node's address and a free port on it, where the ranks meet if this is rank 0."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def run(
        self, job: Job, settings: Settings, rank: int, size: int, meeting: str, threads: int
    ) -> tuple[dict[str, Any] | None, M3QuantError | None]:
        """The conversion as this rank sees it. A refusal is returned, not raised, so that Ray does not wrap it."""
        import torch
        import torch.distributed as dist

        from ...calibration.ranks import Ranks
        from ..conversion import convert, follow

        if job.device == "cpu":
            torch.set_num_threads(threads)
        dist.init_process_group(
            "nccl" if job.device == "cuda" else "gloo", init_method=f"tcp://{meeting}", rank=rank, world_size=size
        )
        settings = replace(settings, device=job.device, ranks=Ranks(rank, size, torch.device(job.device)))
        try:
            plan = same_plan(job)
            _check_alike(job.device)
            # The driver reports progress.
            if rank:
                follow(plan, Path(job.output), settings, Silent())
                return {}, None
            return convert(plan, Path(job.output), settings, Silent()), None
        except M3QuantError as error:
            return None, error


def _check_alike(device: str) -> None:
    """Raises PlanError unless every rank has the same kind of device and the same torch: the bytes depend on both."""
    import torch
    import torch.distributed as dist

    from ...running.device import device_name

    mine = f"{device_name(torch.device(device))} with torch {torch.__version__}"
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    if len(set(found)) > 1:
        raise PlanError(f"the Ray cluster mixes {', '.join(sorted(set(found)))}: calibrate on nodes that are alike.")
