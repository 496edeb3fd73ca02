"""Data-free units over every GPU (or core) of a Ray cluster. Ray schedules; the driver alone keeps the journal.

A unit is one Ray task: it depends on no other, and rounding to nearest gives the same bytes wherever it runs, so the output
is the one of a single GPU. A task whose worker or node dies is run again elsewhere. Every attempt writes into a folder of its
own and renames the finished shard into place: a worker believed dead that wakes up again can harm nobody's file.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, make_folder, sync_folder
from ..errors import M3QuantError, OutputError, PlanError
from ..plan import Plan, Unit, make_plan
from ..recipe import build_recipe
from .journal import FOLDER, Journal
from .stopping import StopFlag

MAX_RETRIES = 3  # of a unit whose worker died; a refusal of ours is not retried
POLL_SECONDS = 0.5  # how soon a signal is noticed while units are running
_ATTEMPT = "attempt-"


@dataclass(frozen=True)
class Job:
    """What a worker needs to plan the same conversion by itself: it sees the checkpoint and the output under the same paths."""

    source: str
    output: str
    recipe: str  # JSON of the resolved recipe
    fingerprint: str
    device: str  # "cuda" or "cpu"; Ray shows a worker its own GPU only


def job_of(plan: Plan, output: Path, device: str) -> Job:
    source = str(Path(plan.checkpoint.root).resolve())
    return Job(source, str(output.resolve()), plan.recipe.model_dump_json(), plan.fingerprint(), device)


def run_units(
    plan: Plan,
    output: Path,
    units: list[Unit],
    device: str,
    address: str | None,
    journal: Journal,
    stop: StopFlag,
    on_bytes: Callable[[int], None],
    say: Callable[[str], None],
) -> None:
    """Convert `units` on the cluster at `address` (None: one started on this machine), journalling each as it finishes.

    Raises PlanError where Ray is missing, the cluster cannot be reached or has no GPU for device "cuda"; OutputError where a
    unit was lost more than MAX_RETRIES times; and whatever the conversion of a unit raises.
    """
    job = job_of(plan, output, device)
    with cluster(address) as ray:
        amount = unit_resources(ray, device)
        say(f"ray: {len(units)} shards over {describe(ray)}, {amount} for each")
        remote = ray.remote(max_retries=MAX_RETRIES, scheduling_strategy="SPREAD", **amount)(_convert_unit)
        running = {remote.remote(job, unit.index): unit for unit in units}
        try:
            while running:
                done, _ = ray.wait(list(running), timeout=POLL_SECONDS)
                stop.check()
                for reference in done:
                    unit = running.pop(reference)
                    facts = _result(ray, reference, unit)
                    journal.finish_unit(unit.index, facts)
                    on_bytes(unit.bytes_in)
        finally:
            # Workers of a driver that has left are ended by Ray; what they leave is removed here or with the journal.
            running.clear()
            _drop_attempts(output)


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


def failure_of(error: Any) -> str:
    """What a RayTaskError stands for, in one line: the error that the task raised, and where."""
    return f"a Ray worker failed ({type(error.cause).__name__}: {(str(error.cause).splitlines() or [''])[0]})"


def _convert_unit(job: Job, index: int) -> tuple[dict[str, Any] | None, M3QuantError | None]:
    """The task: one unit into place. A refusal is returned, not raised, so that Ray neither retries nor wraps it."""
    import torch

    from ..reading import SourceReader
    from .pipeline import convert_unit
    from .run import out_of_memory
    from .units import shard_facts

    attempt = Path(job.output) / FOLDER / f"{_ATTEMPT}{uuid.uuid4().hex}"
    try:
        plan = same_plan(job)
        unit = plan.units[index]
        make_folder(attempt)
        reader = SourceReader(plan.checkpoint, plan.sources)
        record = convert_unit(
            attempt, unit, reader, plan.recipe.format, torch.device(job.device), StopFlag(), lambda count: None
        )
        os.replace(attempt / unit.shard, Path(job.output) / unit.shard)
        sync_folder(Path(job.output))
        return shard_facts(record), None
    except M3QuantError as error:
        return None, error
    except torch.OutOfMemoryError as error:
        return None, out_of_memory(f"{job.device} on node {socket.gethostname()}", error)
    finally:
        shutil.rmtree(attempt, ignore_errors=True)


@lru_cache(maxsize=1)
def same_plan(job: Job) -> Plan:
    """The plan as this node sees it. Raises PlanError where this node sees another checkpoint or another output folder."""
    here = socket.gethostname()
    if not Path(job.output).is_dir():
        raise PlanError(
            f"node {here} does not see the output folder {job.output}: put it on a file system that all nodes share."
        )
    plan = make_plan(Checkpoint.open(job.source), build_recipe(json.loads(job.recipe)))
    if plan.fingerprint() != job.fingerprint:
        raise PlanError(
            f"node {here} sees another checkpoint at {job.source}, or has another version of m3quant: use one shared copy of both."
        )
    return plan


@contextmanager
def cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected; left as it was found. Raises PlanError where it is missing or cannot be reached."""
    try:
        import ray
    except ImportError:
        raise PlanError("--engine ray needs Ray: pip install 'm3quant[ray]', or leave --engine out.") from None
    connected = ray.is_initialized()
    if not connected:
        how: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            if address is None:
                ray.init(address="local", include_dashboard=False, **how)
            else:
                _check_reachable(address)
                ray.init(address=address, **how)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise PlanError(
                f"Ray at {address or 'this machine'} cannot be reached ({str(error).splitlines()[0]}): "
                "start it with `ray start --head` and give the address that it prints."
            ) from None
        for number, handler in handlers.items():  # Ray puts its own in their place, which end the process at once
            signal.signal(number, handler)
    try:
        yield ray
    finally:
        if not connected:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes. Other forms of an address ("auto", "ray://...") are left to it. Raises OSError."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        with socket.create_connection((host, int(port)), timeout=5):
            pass


def unit_resources(ray: Any, device: str) -> dict[str, Any]:
    """What one unit takes of the cluster: a GPU and its share of the cores of a node (the smallest, where nodes differ), or one core."""
    if device != "cuda":
        return {"num_cpus": 1}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    if not nodes:
        raise PlanError("the Ray cluster has no GPU: give --device cpu, or start its nodes with --num-gpus.")
    return {"num_gpus": 1, "num_cpus": min(int(node.get("CPU", 0)) // int(node["GPU"]) for node in nodes)}


def describe(ray: Any) -> str:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    gpus = f", {int(total['GPU'])} GPUs" if total.get("GPU") else ""
    return f"{len(nodes)} nodes, {int(total.get('CPU', 0))} cores{gpus}"


def _drop_attempts(output: Path) -> None:
    """What dead or cancelled workers left of their attempts."""
    for folder in (output / FOLDER).glob(f"{_ATTEMPT}*"):
        shutil.rmtree(folder, ignore_errors=True)
