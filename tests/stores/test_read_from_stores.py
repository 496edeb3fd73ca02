"""Sources under s3:// (moto) and gs:// (a server of the tests): the bytes of a local conversion, and what is said where that cannot be."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import yaml

from m3quant.checkpoint import Checkpoint, object_store
from m3quant.checkpoint.object_store import ObjectStore
from m3quant.checkpoint.shard_plan import ShardPlan
from m3quant.errors import CheckpointError
from m3quant.planning.plan import make_plan
from m3quant.planning.streaming import conversion_shards
from m3quant.recipe.recipe import build_recipe, named_recipe
from tests.support.convert.common import add_tokenizer, files, make_source, run_convert
from tests.support.convert.resharded import as_repo, reshard, watched
from tests.support.publish.client import Client, Done
from tests.support.publish.hub_state import Fault
from tests.support.stores.objects import Objects

IMPORTED_ONCE = (
    "m3quant.cli.convert",
    "m3quant.cli.eval",
    "m3quant.cli.verify",
    "compressed_tensors.quantization",
    "m3quant.convert.conversion",
    "m3quant.verify.verification",
    "m3quant.evaluate.evaluation",
    "transformers.models.auto.tokenization_auto",
)
SHARDS = 4
DRAFT = bytes(range(256)) * 40_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    made = reshard(add_tokenizer(make_source(root / "whole", "m2")), root / "small-m2", SHARDS)
    (made / "dspark").mkdir()
    (made / "dspark" / "model.safetensors").write_bytes(DRAFT)
    (made / "dspark" / "config.json").write_bytes(b"{}")
    return made


@pytest.fixture(scope="module")
def local(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("local") / "out"
    run_convert(folder, output, "int4")
    return made(output)


def made(folder: Path) -> dict[str, bytes]:
    return files(
        folder, but=("m3quant.json", "recipe.yaml")
    )  # `run_convert` asks for less text, and the recipe says so


def needs(folder: Path) -> ShardPlan:
    return conversion_shards(make_plan(Checkpoint.open(folder), build_recipe(named_recipe("int4"))), None)


def convert(client: Client, source: str, output: Path, *options: object, **how: object) -> Done:
    return client.run({"cli": ["convert", source, str(output), "--to", "int4", *map(str, options)]}, **how)  # type: ignore[arg-type]


def refused(done: Done, code: int, *phrases: str) -> None:
    assert done.code == code, (done.code, done.err)
    for phrase in phrases:
        assert phrase in done.err, done.err


def weights(output: Path, line: str) -> bool:
    """Whether a request is for the content of a shard, after the headers and routing biases were read."""
    return bool(re.search(r"GET .*\.safetensors$", line)) and (output / ".m3quant" / "source").exists()


def test_a_conversion_has_the_bytes_of_one_from_a_folder_within_the_disk_given(
    store: Objects, client: Client, folder: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    url, out, need = store.add("some/where", as_repo(folder)), tmp_path / "out", needs(folder)
    planned = client.run({"cli": ["plan", url, "--to", "int4", "--cache-disk", str(need.least), "--json"]}).json
    assert planned["from_hub"]["least_disk"] == need.least and store.bytes_of(".safetensors") <= SHARDS * 200_000
    store.sent.clear()
    with watched(out / ".m3quant" / "source") as most:
        done = convert(client, url, out, "--cache-disk", need.least)
    assert done.code == 0, done.err
    assert made(out) == local and (out / "dspark" / "model.safetensors").read_bytes() == DRAFT
    assert need.least * 0.9 <= most[0] <= max(need.least, len(DRAFT))
    within = conversion_shards(make_plan(Checkpoint.open(folder), build_recipe(named_recipe("int4"))), need.least)
    assert store.bytes_of(".safetensors") <= within.fetch_bytes + len(DRAFT) + SHARDS * 200_000
    manifest = (out / "m3quant.json").read_text()
    assert "some/where" not in manifest and store.scheme + "://" not in manifest  # it is published
    assert json.loads(manifest)["source"]["repo"] is None
    assert "already complete" in convert(client, url, out).err
    checked = client.run({"cli": ["verify", str(out), "--source", url, "--cache-disk", str(need.least)]})
    assert checked.code == 0 and "the same source" in checked.out, checked.err


def test_an_evaluation_reads_output_and_source(store: Objects, client: Client, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_convert(folder, out, "int4")
    task = {"task": "perplexity-gptq", "window": 64, "max_windows": 1}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"name": "mine", "tasks": [task]}))
    places = {
        "here": (str(out), str(folder)),
        "there": (store.add("out", as_repo(out)), store.add("in", as_repo(folder))),
    }
    found = {}
    for name, (output, source) in places.items():
        given = ("--suite", tmp_path / "suite.yaml", "--device", "cpu", "--report", tmp_path / name)
        done = client.run({"cli": ["eval", output, "--source", source, *map(str, given)]})
        assert done.code == 0, done.err
        record = json.loads((tmp_path / name / "eval.json").read_bytes())
        found[name] = [(r["task"], r["metrics"], r["source_metrics"]) for r in record["results"]]
    assert found["here"] == found["there"]
    shard = max(out.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = shard.read_bytes()
    store.put(f"out/{shard.name}", data[:-1] + bytes([data[-1] ^ 1]))  # and the store itself says nothing against it
    done = client.run({"cli": ["eval", places["there"][0], *map(str, given[:-1]), str(tmp_path / "other")]})
    refused(done, 2, shard.name, "its sha256 is")


def test_a_shard_that_comes_damaged_is_fetched_again_once(
    store: Objects, client: Client, folder: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    """A short answer shows on any store; a changed bit where the store states an md5, or in the header that was planned from."""
    url, out, fault = (
        store.add("some/where", as_repo(folder)),
        tmp_path / "out",
        "wrong" if store.scheme == "gs" else "cut",
    )
    spoil = Fault(r"GET .*model-00002-of-00004\.safetensors$", None, times=0, body_fault=fault)
    store.faults.append(spoil)

    def arm(line: str) -> None:
        if weights(out, line) and not spoil.seconds:
            spoil.seconds, spoil.times = 1.0, 1

    store.before = arm
    done = convert(client, url, out)
    assert done.code == 0, done.err
    assert ("fetching it again" if fault == "wrong" else "did not answer in full; again in 1 s") in done.err, done.err
    assert made(out) == local
    if fault == "wrong":
        spoil.times, spoil.seconds, late = 0, 0.0, tmp_path / "late"

        def always(line: str) -> None:
            spoil.times = int(weights(late, line)) * 9

        store.before = always
        refused(convert(client, url, late), 2, "was fetched twice and is not the file that Google Cloud Storage lists")
        assert not (late / "config.json").exists()


def test_a_busy_store_is_asked_again_and_an_object_that_changes_is_refused(
    store: Objects, client: Client, folder: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    repo = as_repo(folder)
    url, out = store.add("some/where", repo), tmp_path / "out"
    name, budget = (
        "model-00004-of-00004.safetensors",
        needs(folder).least,
    )  # with which the last comes when a unit is finished
    other = repo[name][:-1] + bytes([repo[name][-1] ^ 1])

    def change(line: str) -> None:
        if weights(out, line) and line.endswith(name):
            store.before = lambda line: None
            store.put(f"some/where/{name}", other)

    store.before = change
    refused(convert(client, url, out, "--cache-disk", budget), 2, f"{url}/{name} has changed since it was listed")
    store.put(f"some/where/{name}", repo[name])
    done = convert(client, url, out)
    assert done.code == 0 and made(out) == local, done.err
    store.put(f"some/where/{name}", other)  # of what is finished nothing says that this is the same
    refused(convert(client, url, out), 2, f"nothing says that {name} is the shard that is now on")
    store.put(f"some/where/{name}", repo[name])
    if store.scheme == "gs":
        return  # gcsfs repeats by itself for half a minute, without a word
    late, armed = tmp_path / "late", Fault(rf"GET .*{name}$", 503, times=0)
    store.faults.append(armed)

    def busy(line: str) -> None:
        if weights(late, line):
            store.before, armed.times = (lambda line: None), 2

    store.before = busy
    done = convert(client, url, late)
    assert done.code == 0 and made(late) == local, done.err
    assert f"{url}/{name}: S3 answered 503; again in 1 s" in done.err and "again in 2 s" in done.err


def test_killed_while_it_fetches_the_same_command_comes_to_the_same_bytes(
    store: Objects, client: Client, folder: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    url, budget, process = store.add("some/where", as_repo(folder)), needs(folder).least, list[int]()
    for at in (1, 4):
        out, seen = tmp_path / str(at), list[str]()

        def strike(line: str, out: Path = out, seen: list[str] = seen, at: int = at) -> None:
            if weights(out, line):
                seen.append(line)
                if len(seen) == at:
                    os.kill(process[0], signal.SIGKILL)

        process.clear()
        store.before = strike
        assert convert(client, url, out, "--cache-disk", budget, started=process.append).code == -signal.SIGKILL
        store.before = lambda line: None
        assert convert(client, url, out, "--cache-disk", budget).code == 0
        assert made(out) == local


def test_what_cannot_be_read_is_said_before_the_first_weight(
    store: Objects, client: Client, folder: Path, tmp_path: Path
) -> None:
    url, out, scheme = store.add("some/where", as_repo(folder)), tmp_path / "out", store.scheme
    refused(convert(client, f"{scheme}://absent-bucket/some/where", out), 2, "no such bucket")
    refused(convert(client, f"{scheme}://models/nothing", out), 2, "nothing under that prefix")
    refused(convert(client, f"{scheme}://models/some", out), 2, "has no config.json")
    refused(convert(client, f"{scheme}://models/some/../where", out), 2, "is no address of a checkpoint")
    refused(convert(client, "ftp://models/some", out), 2, "is no address of a checkpoint")
    refused(convert(client, f"{scheme}://models/so\nme", out), 2, "is no address of a checkpoint")
    refused(client.run({"cli": ["plan", url, "--revision", "main", "--to", "int4"]}), 2, "has no revision 'main'")
    least = needs(folder).least
    refused(convert(client, url, out, "--cache-disk", least - 1), 2, f"at least {least:,} bytes")
    store.faults = [Fault("GET|LIST", 403, times=100)]
    way_in = {"s3": "FSSPEC_S3_ANON=true", "gs": "FSSPEC_GS_TOKEN=anon"}[scheme]
    refused(convert(client, url, out), 2, "is not open to you", way_in)
    assert not out.exists()


def test_a_level_is_listed_page_by_page_until_it_is_too_large(store: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    count, pages = 2500, list[str]()
    url = store.add("many", {"config.json": b"{}", **{f"file-{number:04}": b"x" for number in range(count)}})
    store.before = pages.append
    assert len(ObjectStore(url).sizes) == count + 1
    whole = len(pages)
    pages.clear()
    monkeypatch.setattr(object_store, "MOST_OBJECTS", count // 5)
    with pytest.raises(CheckpointError, match="holds more than 500 objects"):
        ObjectStore(url)
    assert 1 <= len(pages) < whole
