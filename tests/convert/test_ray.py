"""Ray: two raylets on this machine stand for two nodes. The output is a single process's, also when a worker dies."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from m3quant import __version__ as m3quant_version
from m3quant.checkpoint import Checkpoint, sha256_file
from m3quant.convert.job import Settings
from m3quant.convert.ray import cluster as ray_cluster
from m3quant.convert.start import convert
from m3quant.errors import PlanError
from m3quant.planning.plan import make_plan
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.running.progress import Silent
from tests.support.convert.common import add_tokenizer, make_source
from tests.support.paths import FIXTURES

FIXTURE = FIXTURES / "tiny-m2"
STORE_BYTES = 80_000_000
# Sums of several threads are rounded otherwise than those of one, which a rank has here.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# Enough layers to kill a rank between two of them, and as few experts as two ranks can share.
AWQ_MODEL = {"num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 2}
AWQ = ("--to", "awq", "--device", "cpu", "--windows", "2", "--window-length", "64")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        yield cluster.address
    finally:
        cluster.shutdown()


def m3quant(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "m3quant", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env={**os.environ, **ONE_THREAD},
    )  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("alone") / "out"
    done = m3quant("convert", FIXTURE, output, "--to", "int4", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return hashes(output)


def running(task: str) -> list[int]:
    """Process ids of Ray workers at this task now: Ray writes its name over their command line. Of the cluster that this process
    started, as other tests may have theirs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cmdline").read_bytes().startswith(task.encode()) and os.getpid() in ancestors(entry.name):
                    found.append(int(entry.name))
            except OSError:  # it has ended
                continue
    return found


def ancestors(pid: str) -> Iterator[int]:
    while pid != "0":
        pid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        yield int(pid)


def test_units_on_two_nodes_give_the_bytes_of_one_process(address: str, alone: dict[str, str], tmp_path: Path) -> None:
    done = m3quant(
        "convert", FIXTURE, tmp_path / "out", "--to", "int4", "--device", "cpu", "--ray", "--address", address
    )
    assert done.returncode == 0, done.stderr
    assert "over 2 nodes, 2 cores, 1 core for each" in done.stderr, done.stderr
    assert hashes(tmp_path / "out") == alone
    assert not (tmp_path / "out" / ".m3quant").exists()


def test_a_unit_whose_worker_is_killed_is_done_again(address: str, alone: dict[str, str], tmp_path: Path) -> None:
    command = ["convert", FIXTURE, tmp_path / "out", "--to", "int4", "--device", "cpu", "--ray"]
    run = subprocess.Popen(
        [sys.executable, "-m", "m3quant", *map(str, command), "--address", address], stderr=subprocess.PIPE, text=True
    )
    deadline, killed = time.monotonic() + 120, 0
    while time.monotonic() < deadline and run.poll() is None and killed < 2:
        for pid in running("ray::_convert_unit")[:1]:
            os.kill(pid, signal.SIGKILL)
            killed += 1
        time.sleep(0.02)
    _, errors = run.communicate(timeout=240)
    assert killed == 2, "no worker was caught at work"
    assert run.returncode == 0, errors
    assert hashes(tmp_path / "out") == alone
    assert not (tmp_path / "out" / ".m3quant").exists()


def test_a_stopped_run_is_continued_by_a_single_process(address: str, alone: dict[str, str], tmp_path: Path) -> None:
    command = ["convert", FIXTURE, tmp_path / "out", "--to", "int4", "--device", "cpu"]
    run = subprocess.Popen(
        [sys.executable, "-m", "m3quant", *map(str, command), "--ray", "--address", address],
        stderr=subprocess.PIPE,
        text=True,
    )
    units = tmp_path / "out" / ".m3quant" / "units.jsonl"
    while run.poll() is None and not units.exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=120)
    assert run.returncode in (0, 143), errors  # 0: the last unit was done before the signal was noticed
    assert m3quant(*command).returncode == 0
    assert hashes(tmp_path / "out") == alone


def test_no_gpu_in_the_cluster_is_refused() -> None:
    def ray(*nodes: dict[str, float]) -> Any:
        return SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": node} for node in nodes])

    head = {"CPU": 64.0}  # its cores are no share of another node's GPU: a task that asks for them would wait for ever
    with pytest.raises(PlanError, match="no GPU"):
        ray_cluster.unit_resources(ray(head), "cuda")
    gpus = [{"CPU": 32.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}]
    assert ray_cluster.unit_resources(ray(head, *gpus), "cuda") == {"num_gpus": 1, "num_cpus": 8}
    assert ray_cluster.unit_resources(ray(head), "cpu") == {"num_cpus": 1}


def test_an_error_in_a_worker_is_told_as_what_it_is() -> None:
    import ray

    from m3quant.convert.ray.units import _result
    from m3quant.errors import OutputError

    def get(_: object) -> None:
        raise ray.exceptions.RayTaskError("convert", "", ValueError("no such thing"))

    double: Any = SimpleNamespace(get=get, exceptions=ray.exceptions)
    unit: Any = SimpleNamespace(label="layer 0")
    with pytest.raises(OutputError, match=r"layer 0: a Ray worker failed \(ValueError: no such thing\)"):
        _result(double, None, unit)


def test_one_gpu_of_this_machine_is_no_device_of_a_cluster(tmp_path: Path) -> None:
    done = m3quant("convert", FIXTURE, tmp_path / "out", "--to", "int4", "--ray", "--device", "cuda:0")
    assert done.returncode == 2 and "names one GPU" in done.stderr, done.stderr


def test_a_cluster_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    done = m3quant("convert", FIXTURE, tmp_path / "out", "--to", "int4", "--ray", "--address", f"127.0.0.1:{free}")
    assert done.returncode == 2 and "cannot be reached" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_node_with_another_version_is_refused_before_there_is_a_folder(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(Checkpoint.open(FIXTURE), build_recipe(named_recipe("int4")))
    monkeypatch.setattr(ray_cluster, "__version__", "9.9")
    with pytest.raises(PlanError, match=rf"node \S+ has m3quant {m3quant_version}, this machine 9\.9: install one"):
        convert(plan, tmp_path / "out", Settings("cpu", engine="ray", address=address), Silent())
    assert not (tmp_path / "out").exists()


def test_a_node_without_m3quant_is_told_as_such() -> None:
    import ray

    def get(_: object) -> None:
        raise ray.exceptions.RayTaskError("versions", "", ModuleNotFoundError("No module named 'm3quant'"))

    double: Any = SimpleNamespace(get=get, exceptions=ray.exceptions)
    with pytest.raises(PlanError, match=r"node seven cannot run m3quant: .*No module named 'm3quant'.*install there"):
        ray_cluster._compare(double, None, "seven", ray_cluster.versions())


HOLD = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
class Holder:
    def here(self): return True
held = [Holder.remote() for _ in range(2)]
ray.get([one.here.remote() for one in held])
print("held", flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("recipe", [("--to", "int4", "--device", "cpu"), AWQ], ids=["data-free", "calibrated"])
def test_waiting_for_a_busy_cluster_is_told_once_and_ends_at_ctrl_c(
    address: str, tmp_path: Path, recipe: tuple[str, ...]
) -> None:
    command = ["convert", FIXTURE, tmp_path / "out", *recipe]
    with subprocess.Popen([sys.executable, "-c", HOLD, address], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            run = subprocess.Popen(
                [sys.executable, "-m", "m3quant", *map(str, command), "--ray", "--address", address],
                stderr=subprocess.PIPE,
                text=True,
            )
            assert run.stderr is not None
            lines = []
            while not lines or "waiting for room" not in lines[-1]:
                lines.append(run.stderr.readline())
                assert lines[-1], lines
            time.sleep(2)  # more than one look at the cluster: it is not printed again
            run.send_signal(signal.SIGINT)
            _, errors = run.communicate(timeout=60)
        finally:
            holder.kill()
    assert re.search(r"wants 1 core, and 0 of 2 cores are free", lines[-1]), lines
    assert run.returncode == 130 and "waiting for room" not in errors and "Traceback" not in errors, errors
    assert "stopped by SIGINT" in errors
    assert not list((tmp_path / "out" / ".m3quant").glob("attempt-*"))


def test_what_is_told_of_a_cluster_is_words() -> None:
    def ray(nodes: int, **resources: float) -> Any:
        return SimpleNamespace(nodes=lambda: [{"Alive": True}] * nodes, cluster_resources=lambda: resources)

    assert ray_cluster.describe(ray(1, CPU=1.0)) == "1 node, 1 core"
    assert ray_cluster.describe(ray(2, CPU=32.0, GPU=1.0)) == "2 nodes, 32 cores, 1 GPU"
    assert ray_cluster.describe(ray(2, CPU=32.0, GPU=16.0)) == "2 nodes, 32 cores, 16 GPUs"
    assert ray_cluster.amount_words({"num_gpus": 1, "num_cpus": 8}) == "1 GPU and 8 cores"
    assert ray_cluster.amount_words({"num_gpus": 1, "num_cpus": 0}) == "1 GPU"
    assert ray_cluster.amount_words({"num_cpus": 1}) == "1 core"


def test_waiting_is_told_by_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "TELL_SECONDS", 0.0)
    ray: Any = SimpleNamespace(
        cluster_resources=lambda: {"CPU": 16.0, "GPU": 2.0, "memory": 1e9}, available_resources=lambda: {"CPU": 3.0}
    )
    progress = Silent()
    found = ray_cluster.Cluster(ray, "cuda", {"num_gpus": 1, "num_cpus": 8})
    patience = ray_cluster.Patience("a shard wants 1 GPU and 8 cores", found, progress)
    patience.look(at_work=True)
    assert progress.lines == []
    for _ in range(2):
        time.sleep(0.01)
        patience.look(at_work=False)
    assert progress.lines == [
        "ray: waiting for room: a shard wants 1 GPU and 8 cores, and 0 of 2 GPUs and 3 of 16 cores are free "
        "in the cluster now; it goes on by itself, and Ctrl-C ends it"
    ]


def test_an_address_without_ray_is_refused(tmp_path: Path) -> None:
    done = m3quant("convert", FIXTURE, tmp_path / "out", "--to", "int4", "--address", "127.0.0.1:6379")
    assert done.returncode == 2 and "--ray" in done.stderr


def test_a_node_that_sees_another_checkpoint_says_so(tmp_path: Path) -> None:
    from m3quant.convert.ray.units import job_of, same_plan

    plan = make_plan(Checkpoint.open(FIXTURE), build_recipe(named_recipe("int4")))
    job: Any = job_of(plan, tmp_path / "out", "cpu")
    with pytest.raises(PlanError, match="does not see the output folder"):
        same_plan(job)
    (tmp_path / "out").mkdir()
    assert same_plan(job).fingerprint() == plan.fingerprint()
    with pytest.raises(PlanError, match="another checkpoint"):
        same_plan(replace(job, fingerprint="0" * 64))


@pytest.fixture(scope="module")
def awq_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make_source(tmp_path_factory.mktemp("awq-source") / "m2", "m2", **AWQ_MODEL))


@pytest.fixture(scope="module")
def awq_alone(awq_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("awq-alone") / "out"
    done = m3quant("convert", awq_source, output, *AWQ)
    assert done.returncode == 0, done.stderr
    return hashes(output)


def test_two_ranks_calibrate_to_the_bytes_of_one_process(
    address: str, awq_source: Path, awq_alone: dict[str, str], tmp_path: Path
) -> None:
    done = m3quant("convert", awq_source, tmp_path / "out", *AWQ, "--ray", "--address", address)
    assert done.returncode == 0, done.stderr
    assert "2 ranks in step over 2 nodes" in done.stderr
    assert hashes(tmp_path / "out") == awq_alone
    assert m3quant("verify", tmp_path / "out", "--source", awq_source).returncode == 0


def test_ranks_go_on_from_the_last_layer_when_one_is_killed(
    address: str, awq_source: Path, awq_alone: dict[str, str], tmp_path: Path
) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "m3quant", "convert", awq_source, tmp_path / "out", *AWQ, "--ray", "--address", address],
        stderr=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD},
    )  # fmt: skip
    units = tmp_path / "out" / ".m3quant" / "units.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and run.poll() is None:
        if units.exists() and units.read_text().count("\n") >= 2:  # a layer is finished, the next is under way
            os.kill(running("ray::_Worker.run")[-1], signal.SIGKILL)
            break
        time.sleep(0.02)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert "started anew" in errors
    assert hashes(tmp_path / "out") == awq_alone
