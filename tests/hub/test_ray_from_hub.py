"""A Ray cluster converts a repo of the Hub: the driver fetches every shard once, the nodes ask the Hub nothing, the bytes are a local run's."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from m3quant.checkpoint import Checkpoint
from m3quant.checkpoint.shard_plan import ShardPlan
from m3quant.errors import CheckpointError
from m3quant.planning.plan import make_plan
from m3quant.planning.streaming import conversion_shards
from m3quant.recipe.recipe import build_recipe, named_recipe
from tests.convert.test_ray import address, running
from tests.hub.test_convert_from_hub import same
from tests.support.convert.resharded import as_repo, reshard, watched
from tests.support.paths import FIXTURES
from tests.support.publish.client import Client, Done
from tests.support.publish.hub_state import Fault, Hub

__all__ = ["address"]  # its nodes know neither the test's Hub nor its token

IMPORTED_ONCE = ("m3quant.convert.conversion", "m3quant.convert.ray.units")
REPO, SHARDS = "org/tiny-m2", 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reshard(FIXTURES / "tiny-m2", tmp_path_factory.mktemp("source") / "tiny-m2", SHARDS)


@pytest.fixture(scope="module")
def alone(folder: Path, parent: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "out"
    done = parent.run({"cli": ["convert", str(folder), str(output), "--to", "int4", "--device", "cpu"]}, token=None)
    assert done.code == 0, done.err
    return output


@pytest.fixture
def convert(hub: Hub, client: Client, folder: Path, address: str) -> Callable[..., Done]:
    hub.add(REPO, as_repo(folder), large=True)

    def run(output: Path, *options: object, started: Callable[[int], None] | None = None) -> Done:
        words = ["convert", REPO, output, "--to", "int4", "--device", "cpu", "--ray", "--address", address, *options]
        return client.run({"cli": list(map(str, words))}, started=started)

    return run


def needs(folder: Path, budget: int | None = None) -> ShardPlan:
    return conversion_shards(make_plan(Checkpoint.open(folder), build_recipe(named_recipe("int4"))), budget)


@pytest.mark.parametrize("room", ["least", "once"])
def test_two_nodes_give_the_bytes_of_one_process_within_the_disk_given(
    convert: Callable[..., Done], hub: Hub, folder: Path, alone: Path, tmp_path: Path, room: str
) -> None:
    need, output = needs(folder), tmp_path / "out"
    budget = need.least_once if room == "once" else need.least
    with watched(output / ".m3quant" / "source") as most:
        done = convert(output, "--cache-disk", budget)
    assert done.code == 0, done.err
    assert "over 2 nodes, 2 cores, 1 core for each" in done.err
    same(output, alone)
    assert most[0] <= budget + 20_000
    fetched = sum(count for _, file, count in hub.sent if file.endswith(".safetensors"))
    within = needs(folder, budget)
    assert within.fetch_bytes <= fetched <= within.fetch_bytes + SHARDS * 130 * 1024 + 10_000
    assert not (output / ".m3quant").exists()


def test_a_unit_whose_worker_is_killed_is_done_again_from_the_same_shards(
    convert: Callable[..., Done], hub: Hub, folder: Path, alone: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill(_: int) -> None:
        def watch() -> None:
            until = time.monotonic() + 120
            while not killed and time.monotonic() < until:
                for pid in running("ray::_convert_unit")[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                time.sleep(0.02)

        threading.Thread(target=watch, daemon=True).start()

    done = convert(tmp_path / "out", started=kill)
    assert done.code == 0 and killed, done.err
    same(tmp_path / "out", alone)
    fetched = sum(count for _, file, count in hub.sent if file.endswith(".safetensors"))
    assert fetched <= needs(folder).fetch_bytes + SHARDS * 130 * 1024 + 10_000


def test_a_shard_that_cannot_be_had_ends_the_run_which_then_continues(
    convert: Callable[..., Done], hub: Hub, alone: Path, tmp_path: Path
) -> None:
    hub.faults = [Fault("GET .*/model-00006", 403, skip=1, times=100)]
    done = convert(tmp_path / "out")
    assert done.code == 2 and "not open to you" in done.err, done.err
    assert not list((tmp_path / "out" / ".m3quant").glob("attempt-*"))
    hub.faults = []
    done = convert(tmp_path / "out")
    assert done.code == 0, done.err
    same(tmp_path / "out", alone)


def test_a_node_that_does_not_see_what_was_fetched_says_so(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    name, info = next(iter(checkpoint.tensors.items()))
    there = pickle.loads(pickle.dumps(checkpoint.fetched_into(tmp_path)))
    with pytest.raises(
        CheckpointError,
        match=rf"node \S+ cannot read .*{info.shard}, which was fetched to .*: No such file.*all nodes share",
    ):
        there.read(name)
    (tmp_path / info.shard).write_bytes(b"1")
    with pytest.raises(CheckpointError, match=r"it has 1 bytes there, not [\d,]+\. Put the output"):
        there.read(name)
    shutil.copy(folder / info.shard, tmp_path)
    assert there.read(name).equal(checkpoint.read(name))


def test_a_calibrated_recipe_is_refused_before_there_is_a_folder(convert: Callable[..., Done], tmp_path: Path) -> None:
    done = convert(tmp_path / "out", "--to", "awq")
    assert done.code == 2, done.err
    assert "recipe 'awq' reads a source that all nodes see, and org/tiny-m2 is on the Hub" in done.err
    assert "take a recipe without calibration" in done.err
    assert not (tmp_path / "out").exists()
