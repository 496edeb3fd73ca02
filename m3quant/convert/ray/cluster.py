"""A Ray cluster as a conversion sees it: connected, checked before anything is written, and described to the user."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ... import __version__
from ...errors import PlanError
from ...running.progress import Progress
from ...running.stopping import StopFlag

POLL_SECONDS = 0.5  # how soon a signal is noticed while workers are at it
TELL_SECONDS = 10.0  # without a running worker before the user is told what the run waits for
NODE_SECONDS = 120.0  # for a node to start a Python process, from a shared file system perhaps, and answer


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to. device: "cuda" or "cpu". amount: what one worker takes, as Ray names it."""

    ray: Any
    device: str
    amount: dict[str, Any]


def require_ray() -> Any:
    """The module. Raises PlanError where it is not installed."""
    try:
        import ray
    except ImportError:
        raise PlanError("--ray needs Ray: pip install 'm3quant[ray]', or leave --ray out.") from None
    return ray


@contextmanager
def cluster(address: str | None, device: str, stop: StopFlag) -> Iterator[Cluster]:
    """The cluster at `address` (None: one started on this machine), left as it was found.

    Raises PlanError where Ray is missing, the cluster cannot be reached, has no GPU for device "cuda", or has nodes with
    another m3quant or torch.
    """
    ray = require_ray()
    connected = ray.is_initialized()
    try:
        if not connected:
            _connect(ray, address)
        stop.check()
        amount = unit_resources(ray, device)
        if address is not None:
            _check_versions(ray, stop)
        yield Cluster(ray, device, amount)
    finally:
        if not connected:
            ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    how: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, **how)
        else:
            _check_reachable(address)
            ray.init(address=address, **how)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PlanError(
            f"Ray at {address or 'this machine'} cannot be reached ({reason}): "
            "start it with `ray start --head` and give the address that it prints."
        ) from None
    for number, handler in handlers.items():  # Ray puts its own in their place, which end the process at once
        signal.signal(number, handler)


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes. Other forms of an address ("auto", "ray://...") are left to it. Raises OSError."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        with socket.create_connection((host, int(port)), timeout=5):
            pass


def _check_versions(ray: Any, stop: StopFlag) -> None:
    """Raise PlanError unless every node has this process's m3quant and torch. Takes no core: busy nodes answer too."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(versions)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(): node
        for node in ray.nodes()
        if node["Alive"]
    }
    waiting, deadline, here = list(asked), time.monotonic() + NODE_SECONDS, versions()
    while waiting:
        done, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
        stop.check()
        for reference in done:
            _compare(ray, reference, asked[reference]["NodeManagerHostname"], here)
        if waiting and time.monotonic() > deadline:
            name = asked[waiting[0]]["NodeManagerHostname"]
            raise PlanError(f"node {name} has not answered in {NODE_SECONDS:.0f} s: look at its Ray log, or remove it.")


def _compare(ray: Any, reference: Any, node: str, here: Mapping[str, str]) -> None:
    try:
        there = ray.get(reference)
    except ray.exceptions.RayError as error:
        reason = failure_of(error) if isinstance(error, ray.exceptions.RayTaskError) else type(error).__name__
        raise PlanError(f"node {node} cannot run m3quant: {reason}; install there what is installed here.") from None
    for package, found in there.items():
        if found != here[package]:
            raise PlanError(f"node {node} has {package} {found}, this machine {here[package]}: install one version.")


def versions() -> dict[str, str]:
    """What must be the same on all nodes, package -> version, without importing torch."""
    return {"m3quant": __version__, "torch": version("torch")}


def failure_of(error: Any) -> str:
    """The cause of a RayTaskError, in one line: the error that the task raised, and where."""
    return f"a Ray worker failed ({type(error.cause).__name__}: {(str(error.cause).splitlines() or [''])[0]})"


def unit_resources(ray: Any, device: str) -> dict[str, Any]:
    """What one worker takes of the cluster: a GPU and its share of the cores of a node (the smallest, where nodes differ), or one core."""
    if device != "cuda":
        return {"num_cpus": 1}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    if not nodes:
        raise PlanError("the Ray cluster has no GPU: give --device cpu, or start its nodes with --num-gpus.")
    return {"num_gpus": 1, "num_cpus": min(int(node.get("CPU", 0)) // int(node["GPU"]) for node in nodes)}


class Patience:
    """Tells once what is waited for, where no worker has been at work for TELL_SECONDS: others have the GPUs."""

    def __init__(self, wanted: str, cluster: Cluster, progress: Progress) -> None:
        self.wanted, self.cluster, self.progress = wanted, cluster, progress
        self._idle_since, self._told = time.monotonic(), False

    def look(self, at_work: bool) -> None:
        now = time.monotonic()
        if at_work:
            self._idle_since = now
        elif not self._told and now - self._idle_since > TELL_SECONDS:
            self._told = True
            self.progress.say(
                f"ray: waiting for room: {self.wanted}, and {_free_words(self.cluster)} free in the cluster now; "
                "it goes on by itself, and Ctrl-C ends it"
            )


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def amount_words(amount: Mapping[str, Any]) -> str:
    """ "1 GPU and 8 cores" of what `unit_resources` gives."""
    gpus, cores = amount.get("num_gpus", 0), amount["num_cpus"]
    parts = ([counted(gpus, "GPU")] if gpus else []) + ([counted(cores, "core")] if cores else [])
    return " and ".join(parts)


def describe(ray: Any) -> str:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    parts = [counted(len(nodes), "node"), counted(int(total.get("CPU", 0)), "core")]
    return ", ".join(parts + ([counted(int(total["GPU"]), "GPU")] if total.get("GPU") else []))


def _free_words(cluster: Cluster) -> str:
    """ "0 of 2 GPUs and 3 of 16 cores are": Ray leaves out what is not there at all."""
    total, free = cluster.ray.cluster_resources(), cluster.ray.available_resources()
    kinds = [("GPU", "GPU"), ("CPU", "core")] if cluster.device == "cuda" else [("CPU", "core")]
    parts = [f"{int(free.get(key, 0))} of {counted(int(total.get(key, 0)), noun)}" for key, noun in kinds]
    return " and ".join(parts) + " are"
