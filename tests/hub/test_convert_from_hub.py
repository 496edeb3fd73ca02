"""Converting a repo of the Hub on localhost without downloading it: the bytes of a local conversion, within the disk that was given."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3quant.checkpoint import Checkpoint
from m3quant.checkpoint.shard_plan import ShardPlan
from m3quant.planning.plan import make_plan
from m3quant.planning.streaming import conversion_shards
from m3quant.recipe.recipe import build_recipe, named_recipe, read_recipe_file
from tests.support.convert.common import add_tokenizer, files, make_source
from tests.support.convert.resharded import as_repo, bytes_in, reshard, watched
from tests.support.paths import FIXTURES
from tests.support.publish.client import Client, Done
from tests.support.publish.hub_state import Entry, Fault, Hub
from tests.support.workers import left_over

# What every child would else import.
IMPORTED_ONCE = (
    "m3quant.cli.convert",
    "m3quant.cli.plan",
    "m3quant.cli.verify",
    "m3quant.convert.conversion",
    "m3quant.convert.calibrated",
    "m3quant.calibration.awq_quantizer",
    "m3quant.calibration.feedback.quantizer",
    "m3quant.verify.verification",
    "compressed_tensors.quantization",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
)
SHARDS = 7
RECIPES = {"int4": ("--to", "int4"), "quick": ("--recipe", str(Path(__file__).with_name("quick.yaml")))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained fixtures, and two small random checkpoints, in SHARDS shards."""
    root = tmp_path_factory.mktemp("sources")
    made = {name: reshard(FIXTURES / name, root / name, SHARDS) for name in ("tiny-m2", "tiny-m3")}
    for family in ("m2", "m3"):
        source = add_tokenizer(make_source(root / f"whole-{family}", family))
        made[f"small-{family}"] = reshard(source, root / f"small-{family}", 4)
    return made


@pytest.fixture(scope="module")
def local(folders: dict[str, Path], parent: Client, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The output of a conversion from the folder, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def convert(name: str, to: str) -> Path:
        if (name, to) not in made:
            output = made[name, to] = tmp_path_factory.mktemp("local") / "out"
            done = parent.run({"cli": ["convert", str(folders[name]), str(output), *RECIPES[to]]}, token=None)
            assert done.code == 0, done.err
        return made[name, to]

    return convert


def add(hub: Hub, folders: dict[str, Path], name: str, **facts: Any) -> str:
    hub.add(f"org/{name}", as_repo(folders[name]), large=True, **facts)
    return f"org/{name}"


def convert(client: Client, source: str, output: Path, to: str, *options: object, **how: Any) -> Done:
    return client.run({"cli": ["convert", source, str(output), *RECIPES[to], *map(str, options)]}, **how)


def needs(folder: Path, to: str, budget: int | None = None) -> ShardPlan:
    recipe = read_recipe_file(Path(RECIPES[to][1])) if to == "quick" else named_recipe(to)
    return conversion_shards(make_plan(Checkpoint.open(folder), build_recipe(recipe)), budget)


def made(folder: Path) -> dict[str, bytes]:
    return files(folder, but=("m3quant.json", "eval.json", "m3quant-report/"))


def same(output: Path, local: Path) -> None:
    """Bytes as from the folder, and a manifest that differs in where the source was alone."""
    assert made(output) == made(local)
    there, here = (json.loads((folder / "m3quant.json").read_bytes()) for folder in (output, local))
    for manifest in (there, here):
        for key in ("finished", "seconds"):
            del manifest[key]
        for key in ("identity", "repo", "revision", "files", "left_behind"):
            del manifest["source"][key]
    assert there == here


@pytest.mark.parametrize(
    ("name", "to", "room"),
    [
        ("tiny-m2", "int4", "once"),
        ("tiny-m3", "int4", "least"),
        ("small-m2", "quick", "least"),
        ("small-m3", "quick", "once"),
    ],
)
def test_the_bytes_are_those_of_a_local_conversion_within_the_disk_given(
    hub: Hub,
    client: Client,
    folders: dict[str, Path],
    local: Callable[..., Path],
    tmp_path: Path,
    name: str,
    to: str,
    room: str,
) -> None:
    need, repo, output = needs(folders[name], to), add(hub, folders, name), tmp_path / "out"
    budget = need.least_once if room == "once" else need.least
    assert need.least < 0.8 * need.fetch_bytes, "the shards are too few for a test of a cache"
    with watched(output / ".m3quant" / "source") as most:
        done = convert(client, repo, output, to, "--cache-disk", budget)
    assert done.code == 0, done.err
    same(output, local(name, to))
    # Beside shards there are huggingface_hub's records of them, of a few hundred bytes each.
    assert need.least <= most[0] + 20_000 and most[0] <= budget + 20_000
    fetched = sum(count for _, file, count in hub.sent if file.endswith(".safetensors"))
    within = needs(folders[name], to, budget)
    assert (
        within.fetch_bytes <= fetched <= within.fetch_bytes + SHARDS * 130 * 1024 + 10_000
    )  # the headers are read first
    assert (within.fetch_bytes == sum(within.sizes.values())) == (budget >= need.least_once)
    assert not (output / ".m3quant").exists()
    source = json.loads((output / "m3quant.json").read_bytes())["source"]
    assert (source["repo"], source["revision"]) == (repo, hub.repos[repo].head)
    assert {facts["as_on_hub"] for facts in source["files"].values()} == {True}


def test_downloads_in_processes_of_their_own_bring_the_same_bytes_and_say_the_same(
    hub: Hub, client: Client, folders: dict[str, Path], local: Callable[..., Path], tmp_path: Path
) -> None:
    repo, output = add(hub, folders, "tiny-m2"), tmp_path / "out"
    job = {"cli": ["convert", repo, str(output), *RECIPES["int4"]], "processes": True}
    hub.faults = [
        Fault("GET .*/model-00002", 503, skip=1, headers={"Retry-After": "7"}),
        Fault("GET .*/model-00003", None, skip=1, body_fault="wrong"),
        Fault("GET .*/model-00006", 403, skip=1, times=100),
    ]
    done = client.run(job)
    assert done.code == 2 and "not open to you" in done.err, done.err
    hub.faults = hub.faults[:2]
    done = client.run(job)
    assert done.code == 0, done.err
    same(output, local("tiny-m2", "int4"))
    assert not left_over(client.folder)


def test_seventeen_megabytes_of_disk_are_enough_for_the_trained_fixture(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    hub.add("org/tiny-m3", as_repo(FIXTURES / "tiny-m3"), large=True)
    output = tmp_path / "out"
    few = ("--to", "awq", "--windows", "2", "--window-length", "64", "--cache-disk", "17MB")
    with watched(output / ".m3quant" / "source") as most:
        done = client.run({"cli": ["convert", "org/tiny-m3", str(output), *few]})
    assert done.code == 0 and 12_000_000 < most[0] <= 17_000_000, (done.err, most)
    checked = client.run({"cli": ["verify", str(output), "--source", "org/tiny-m3", "--cache-disk", "17MB"]})
    assert checked.code == 0 and "the same source" in checked.out, checked.err


def test_the_plan_says_beforehand_what_is_fetched_and_takes_no_weight(
    hub: Hub, client: Client, folders: dict[str, Path], tmp_path: Path
) -> None:
    need, repo = needs(folders["tiny-m3"], "quick"), add(hub, folders, "tiny-m3")
    budget = need.least_once
    asked = (*RECIPES["quick"], "--cache-disk", str(budget), "--network", "1MB/s")
    for command in (["convert", repo, str(tmp_path / "out"), "--dry-run"], ["plan", repo]):
        told = client.run({"cli": [*command, *asked, "--json"]})
        assert told.code == 0, told.err
        facts = told.json["from_hub"]
        assert facts == needs(folders["tiny-m3"], "quick", budget).to_json(1e6)
        assert facts["fetch_seconds"] == pytest.approx(need.fetch_bytes / 1e6)
        words = client.run({"cli": [*command, *asked]}).out
        assert (
            f"{need.fetch_bytes:,} bytes" in words
            and f"at least {need.least:,} bytes" in words
            and "at 1.00 MB/s" in words
        )
    assert max(count for *_, count in hub.sent) <= 128 * 1024
    assert not (tmp_path / "out").exists()
    for bad, phrase in (
        (["plan", str(folders["tiny-m3"]), "--to", "int4", "--network", "1GB/s"], "is here: leave them out"),
        (["plan", repo, "--cache-disk", "1GB"], "give --to NAME"),
        (["convert", repo, str(tmp_path / "out"), "--network", "1GB/s"], "give --dry-run"),
        (
            ["convert", str(folders["tiny-m3"]), str(tmp_path / "out"), "--to", "int4", "--cache-disk", "1GB"],
            "is a folder",
        ),
        (["convert", repo, str(tmp_path / "out"), "--to", "int4", "--cache-disk", "much"], "no size"),
    ):
        done = client.run({"cli": bad})
        assert done.code == 2 and phrase in done.err, done.err


def refused(done: Done, code: int, *phrases: str) -> None:
    assert done.code == code, (done.code, done.err)
    for phrase in phrases:
        assert phrase in done.err, done.err


def fetching(output: Path, line: str) -> bool:
    """Whether a request is for a whole shard; headers and routing biases are read before."""
    return bool(re.search(r"GET .*\.safetensors$", line)) and (output / ".m3quant" / "source").exists()


def fault(folder: Path, number: int, status: int, **facts: Any) -> Fault:
    """What happens to requests for a whole shard of `folder`."""
    name = f"model-{number:05d}-of-00004.safetensors"
    before = sum(t.shard == name and t.name.endswith("bias") for t in Checkpoint.open(folder).tensors.values())
    return Fault(f"GET .*/{name}", status, skip=1 + before, **facts)


def test_what_cannot_be_read_is_said_before_the_first_weight(
    hub: Hub, client: Client, folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused(convert(client, "org/absent", out, "int4"), 2, "org/absent", "does not exist or is not open to you")
    add(hub, folders, "small-m2", files_status=403, error_code="GatedRepo")
    refused(convert(client, "org/small-m2", out, "int4"), 2, "gated", "hf auth login")
    add(hub, folders, "small-m2", private=True)
    refused(convert(client, "org/small-m2", out, "int4", token="hf_expired"), 2, "not open to you", "hf auth login")
    add(hub, folders, "small-m2")
    refused(convert(client, "org/small-m2@v9", out, "int4"), 2, "no revision")
    least = needs(folders["small-m2"], "int4").least
    refused(convert(client, "org/small-m2", out, "int4", "--cache-disk", least - 1), 2, f"at least {least:,} bytes")
    refused(
        convert(client, "org/small-m2", out, "int4", "--cache-disk", "900TB"), 4, "--cache-disk 900.00 TB", "free space"
    )
    hub.add("org/small-m2", as_repo(folders["small-m2"]))  # shards in git itself: the Hub states no sha256
    refused(convert(client, "org/small-m2", out, "int4"), 2, "states no sha256")
    assert not out.exists() and max((count for *_, count in hub.sent), default=0) <= 128 * 1024


@pytest.mark.parametrize("wrong", ["size", "checksum"])
def test_a_shard_that_is_not_the_one_listed_is_fetched_again_once(
    hub: Hub, client: Client, folders: dict[str, Path], local: Callable[..., Path], tmp_path: Path, wrong: str
) -> None:
    repo, folder = add(hub, folders, "small-m2"), folders["small-m2"]
    name = "model-00002-of-00004.safetensors"
    size = (folder / name).stat().st_size
    body = bytes(size if wrong == "checksum" else size // 2)
    hub.faults = [fault(folder, 2, 200, body=body)]
    done = convert(client, repo, tmp_path / "out", "int4")
    assert done.code == 0 and f"{repo}/{name}" in done.err and "fetching it again" in done.err, done.err
    same(tmp_path / "out", local("small-m2", "int4"))
    hub.faults = [fault(folder, 2, 200, body=body, times=2)]
    again = tmp_path / "again"
    refused(
        convert(client, repo, again, "int4"),
        2,
        f"{repo}/{name} was fetched twice and is not the file that the Hub lists",
    )
    # What was finished stays, nothing half is there, and the same command goes on.
    assert not list(again.glob(".*tmp")) and not (again / "config.json").exists()
    assert not (again / ".m3quant" / "source" / name).exists()
    assert convert(client, repo, again, "int4").code == 0
    same(again, local("small-m2", "int4"))


def test_a_server_that_is_busy_or_refuses_is_asked_again_and_this_is_told(
    hub: Hub, client: Client, folders: dict[str, Path], local: Callable[..., Path], tmp_path: Path
) -> None:
    repo, folder = add(hub, folders, "small-m2"), folders["small-m2"]
    hub.faults = [
        fault(folder, 1, 503, times=2),
        fault(folder, 3, 502),
        fault(folder, 4, 429, headers={"Retry-After": "7"}),
    ]
    done = convert(client, repo, tmp_path / "out", "int4")
    assert done.code == 0, done.err
    assert f"{repo}/model-00001-of-00004.safetensors: the Hub answered 503; again in 1 s" in done.err
    assert "again in 2 s" in done.err and sum(done.pauses) >= 7
    same(tmp_path / "out", local("small-m2", "int4"))
    hub.faults = [fault(folder, 2, 503, times=100)]
    refused(convert(client, repo, tmp_path / "late", "int4"), 4, "answered 503", "the same command continues")
    hub.faults = [fault(folder, 2, 401, times=100)]
    refused(convert(client, repo, tmp_path / "late", "int4"), 2, "not open to you", "hf auth login")
    hub.faults = []
    assert convert(client, repo, tmp_path / "late", "int4").code == 0
    same(tmp_path / "late", local("small-m2", "int4"))


@pytest.mark.parametrize(("name", "to", "points"), [("small-m2", "int4", (1, 2, 3, 4)), ("small-m3", "quick", (2, 3))])
def test_killed_at_any_fetch_the_same_command_comes_to_the_same_bytes(
    hub: Hub,
    client: Client,
    folders: dict[str, Path],
    local: Callable[..., Path],
    tmp_path: Path,
    name: str,
    to: str,
    points: tuple[int, ...],
) -> None:
    """Before a shard is sent and when it has been; one output is killed again and again, too."""
    repo, budget = add(hub, folders, name), needs(folders[name], to).least
    process: list[int] = []

    def run(output: Path, at: int, after: bool) -> int:
        """The exit code of a run that is killed at a shard's request with this number."""
        seen: list[str] = []
        lock = threading.Lock()

        def strike(line: str) -> bool | None:
            with lock:
                if fetching(output, line):
                    seen.append(line)
                if len(seen) != at:
                    return None
                os.kill(process[0], signal.SIGKILL)
                return False

        setattr(hub, "after" if after else "before", strike)
        process.clear()
        done = convert(client, repo, output, to, "--cache-disk", budget, started=process.append)
        hub.before = hub.after = lambda line: None  # type: ignore[assignment]
        return done.code

    killed = 0
    for at in points:
        output = tmp_path / str(at)
        if run(output, at, after=bool(at % 2)) == 0:
            break
        killed += 1
        assert not (output / "config.json").exists()
        assert convert(client, repo, output, to, "--cache-disk", budget).code == 0
        same(output, local(name, to))
    again = tmp_path / "again"
    at = 1
    while (code := run(again, at, after=True)) != 0:  # each time a little later than the last
        assert code == -signal.SIGKILL and at < 20
        killed, at = killed + 1, at + 1
    same(again, local(name, to))
    assert killed >= len(points) + 3


def test_a_signal_ends_a_fetch_that_hangs_and_the_same_command_continues(
    hub: Hub, client: Client, folders: dict[str, Path], local: Callable[..., Path], tmp_path: Path
) -> None:
    repo, process, out = add(hub, folders, "small-m2"), list[int](), tmp_path / "out"
    held = threading.Event()

    def before(line: str) -> None:
        if fetching(out, line) and process:
            os.kill(process.pop(), signal.SIGTERM)
            held.wait(20)

    hub.before = before
    began = time.monotonic()
    done = convert(client, repo, out, "int4", started=process.append)
    held.set()
    refused(done, 143, "stopped by SIGTERM", "run the same command")
    assert time.monotonic() - began < 20
    hub.before = lambda line: None
    assert convert(client, repo, out, "int4").code == 0
    same(out, local("small-m2", "int4"))


def test_a_branch_that_moves_is_left_and_this_is_said(
    hub: Hub, client: Client, folders: dict[str, Path], local: Callable[..., Path], tmp_path: Path
) -> None:
    repo, out = add(hub, folders, "small-m2"), tmp_path / "out"
    first = hub.repos[repo].head
    hub.repos[repo].tags["v1"] = first
    hub.faults = [fault(folders["small-m2"], 3, 403, times=100)]
    assert convert(client, repo, out, "int4", "--cache-disk", needs(folders["small-m2"], "int4").least).code == 2
    hub.faults = []
    tree = dict(hub.repos[repo].tree())
    tree["README.md"] = Entry(b"# another card\n")
    moved = hub.repos[repo].commit(tree, "a card")
    # Another revision that somebody asks for is no move.
    refused(convert(client, f"{repo}@{moved}", out, "int4"), 2, "its revision was")
    done = convert(client, repo, out, "int4")
    assert done.code == 0 and f"has moved to {moved[:12]}" in done.err and f"continuing with {first[:12]}" in done.err
    assert json.loads((out / "m3quant.json").read_bytes())["source"]["revision"] == first
    same(out, local("small-m2", "int4"))
    finished = convert(client, repo, out, "int4")
    assert finished.code == 0 and "already complete" in finished.err and "has moved" in finished.err


def test_a_folder_and_its_repo_continue_each_other_where_the_checksums_are_known(
    hub: Hub, client: Client, folders: dict[str, Path], local: Callable[..., Path], tmp_path: Path
) -> None:
    repo, out, pulled = add(hub, folders, "small-m2"), tmp_path / "out", tmp_path / "pulled"
    assert client.run({"cli": ["pull", repo, str(pulled)]}).code == 0
    least = needs(folders["small-m2"], "int4").least
    hub.faults = [fault(folders["small-m2"], 3, 403, times=100)]
    assert convert(client, repo, out, "int4", "--cache-disk", least).code == 2
    hub.faults = []
    assert convert(client, str(pulled), out, "int4").code == 0
    same(out, local("small-m2", "int4"))
    assert "already complete" in convert(client, repo, out, "int4").err
    unknown = tmp_path / "unknown"
    assert convert(client, str(folders["small-m2"]), unknown, "int4").code == 0
    refused(convert(client, repo, unknown, "int4"), 2, "was made of a source of which nothing says", "give that source")


def test_two_runs_on_one_output_do_not_share_a_cache(
    hub: Hub, client: Client, folders: dict[str, Path], tmp_path: Path
) -> None:
    repo, state = add(hub, folders, "small-m2"), tmp_path / "out" / ".m3quant"
    (state / "source").mkdir(parents=True)
    (state / "source" / "model-00001-of-00004.safetensors").write_bytes(b"half")
    with open(state / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(convert(client, repo, tmp_path / "out", "int4"), 2, "in use by another m3quant process")
    assert (state / "source" / "model-00001-of-00004.safetensors").read_bytes() == b"half"


def test_a_draft_beside_the_shards_is_carried_over_and_lies_on_the_disk_once(
    hub: Hub, client: Client, folders: dict[str, Path], tmp_path: Path
) -> None:
    draft = bytes(range(256)) * 40_000
    hub.add(
        "org/with-draft",
        as_repo(folders["small-m2"]) | {"dspark/model.safetensors": draft, "dspark/config.json": b"{}"},
        large=True,
    )
    out = tmp_path / "out"
    with watched(out) as most:
        done = convert(client, "org/with-draft", out, "int4", "--cache-disk", needs(folders["small-m2"], "int4").least)
    assert done.code == 0, done.err
    assert (out / "dspark" / "model.safetensors").read_bytes() == draft
    digest = hashlib.sha256(draft).hexdigest()
    facts = json.loads((out / "m3quant.json").read_bytes())
    assert (
        facts["files"]["dspark/model.safetensors"]
        == digest
        == facts["source"]["identity"]["files"]["dspark/model.safetensors"]
    )
    assert most[0] < bytes_in(out) + needs(folders["small-m2"], "int4").least
