"""convert --publish: what is on the Hub and on the disk while it runs and at its end, and what is refused before it begins."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.publish.test_upload import on_main, refused
from tests.support.convert.common import rewrite, run_convert, stored
from tests.support.publish.client import READ_TOKEN, Client
from tests.support.publish.converting import BASE, IMPORTED, REPO, STAGING, command, hub_with, shards, small_source
from tests.support.publish.hub_state import ATTRIBUTES, Entry, Fault, Hub
from tests.support.publish.outputs import record_download

IMPORTED_ONCE = IMPORTED


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("source") / "m2")


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same conversion, not published."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run_convert(source, out, "int4")
    return out


@pytest.fixture
def hub_with_base(hub: Hub, source: Path) -> Iterator[Hub]:
    with hub_with(hub, source):
        yield hub


def same_shards(hub: Hub, plain: Path) -> bool:
    there = {n: data for n, data in on_main(hub, REPO).items() if n.endswith(".safetensors")}
    return there == {name: (plain / name).read_bytes() for name in shards(plain)}


def test_shards_go_up_while_later_ones_are_made_and_leave_the_disk(
    hub_with_base: Hub, client: Client, source: Path, plain: Path, tmp_path: Path
) -> None:
    hub, out = hub_with_base, tmp_path / "out"
    seen: list[tuple[str, list[str]]] = []
    hub.after = lambda line: seen.append((line, shards(out)))
    done = client.run(command(source, out, "--drop-uploaded", "--json"))
    assert done.code == 0, done.err
    repo, facts = hub.repos[REPO], done.json["published"]
    assert (
        repo.private and repo.tags == {"v1": repo.head} == {"v1": facts["commit"]} and list(repo.branches) == ["main"]
    )
    assert same_shards(hub, plain)
    assert shards(out) == [] and json.loads((out / "m3quant.json").read_bytes())["shards"].keys() == set(shards(plain))
    committed = [here for line, here in seen if line == f"POST /api/models/{REPO}/commit/{STAGING}"]
    assert len(committed) > len(shards(plain)), "a commit a shard"
    assert max(map(len, committed)) < len(shards(plain)), "the first was gone before the last was made"
    whole = on_main(hub, REPO)
    assert facts["sent"] + facts["copied"] == facts["bytes"] == sum(map(len, whole.values()))
    card = whole["README.md"].decode()
    assert "every value is finite" in card and "No shard was compared with the base's weights" in card
    assert "The licence of the base asks of you" in done.err
    assert all(f"  {line}" in done.err for line in facts["obligations"]) and facts["obligations"]
    # A stranger gets it whole, and it is what the conversion would have left.
    pulled = client.run({"cli": ["pull", REPO, str(tmp_path / "copy")]})
    assert pulled.code == 0, pulled.err
    verified = client.run({"cli": ["verify", str(tmp_path / "copy"), "--source", str(source)]})
    assert verified.code == 0, verified.err
    # The same command again finds everything in place.
    received = hub.received(".")
    again = client.run(command(source, out, "--drop-uploaded", "--json"))
    assert again.code == 0 and again.json["published"]["commit"] == facts["commit"], again.err
    assert hub.received(".") - received < 1500 and again.json["published"]["sent"] == 0
    for words in (["verify"], ["eval"], ["publish"], ["card"], ["serve"], ["plan"], ["convert"]):
        given = {"publish": [REPO, "--yes"], "convert": [str(tmp_path / "new")]}.get(words[0], [])
        refused(client, {"cli": [*words, str(out), *given]}, 2, "dropped here", f"m3quant pull {REPO}", longest=700)


def test_without_dropping_everything_stays_and_is_published(
    hub_with_base: Hub, client: Client, source: Path, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = client.run(command(source, out, "--tag", "v2"))
    assert done.code == 0, done.err
    assert same_shards(hub_with_base, plain) and shards(out) == shards(plain)
    assert "tagged v2; it is private" in done.out
    # Dropping may be asked for later, of what is published already.
    assert client.run(command(source, out, "--tag", "v2", "--drop-uploaded")).code == 0
    assert shards(out) == []


def test_what_cannot_be_published_is_refused_before_a_layer_is_converted(
    hub_with_base: Hub, client: Client, source: Path, tmp_path: Path
) -> None:
    hub, out = hub_with_base, tmp_path / "out"
    refused(client, command(source, out), 2, "no Hub token", token=None)
    refused(client, command(source, out), 2, "can only read", token=READ_TOKEN)
    refused(client, command(source, out, repo="elsewhere/model"), 2, "403", "You don't have the rights")
    refused(client, command(source, out, repo="model"), 2, "ORG/NAME")
    refused(client, command(source, out, "--tag", "a b"), 2, "no name for a tag")
    refused(client, command(source, out, base="MiniMaxAI/MiniMax-M2.7"), 1, "licence", "Nothing was converted")
    # Before anything is asked of the Hub or read: without a token, and in a dry run.
    for options in ((), ("--dry-run",)):
        unknown = command(source, out, *options, base=None)
        refused(client, unknown, 1, "base model is unknown", "--base-repo", "Nothing was converted", token=None)
    hub.add(REPO, {"model.safetensors": b"w" * 2000}, private=True)
    refused(client, command(source, out), 2, "holds other files (model.safetensors)", "choose another name")
    hub.add(REPO, {ATTRIBUTES: b""})
    refused(client, command(source, out), 2, "is public")
    hub.add(REPO, {ATTRIBUTES: b""}, private=True).tags["v1"] = "0" * 40
    refused(client, command(source, out), 2, "has a tag v1 on another commit")
    hub.repos.pop(REPO)
    hub.faults = [Fault("/api/repos/create", 429, times=9, headers={"Retry-After": "900"})]
    refused(client, command(source, out), 4, "429", "run the same command again in 900 s")
    hub.faults = []
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    (bare / "tokenizer.json").unlink()
    refused(client, command(bare, out), 1, "tokenizer", "Nothing was converted", longest=700)
    assert not out.exists() and REPO not in hub.repos and hub.received() == 0


@pytest.mark.parametrize(
    ("words", "phrases"),
    [
        (["--drop-uploaded"], ["--drop-uploaded is about an upload", "--publish ORG/NAME"]),
        (["--base-repo", BASE], ["--base-repo is about an upload"]),
        (["--publish", REPO, "--eval", "quick"], ["--eval does not go with --publish", "m3quant eval on the repo"]),
        (["--publish", REPO, "--fit", "1xH200"], ["--budget and --fit do not go with --publish", "--recipe-out"]),
    ],
)
def test_options_that_do_not_go_together(
    client: Client, source: Path, tmp_path: Path, words: list[str], phrases: list[str]
) -> None:
    to = [] if "--fit" in words else ["--to", "int4"]
    refused(client, {"cli": ["convert", str(source), str(tmp_path / "out"), *to, *words]}, 2, *phrases)
    assert not (tmp_path / "out").exists()


def test_an_upload_that_fails_stops_the_run_and_the_same_command_continues(
    hub_with_base: Hub, client: Client, source: Path, plain: Path, tmp_path: Path
) -> None:
    hub, out = hub_with_base, tmp_path / "out"
    wanted = command(source, out, "--drop-uploaded")
    hub.faults = [Fault("/commit/m3quant", 503, times=99, skip=2)]
    refused(client, wanted, 4, "503", "run the same command again")
    assert not (out / "config.json").exists() and set(hub.repos[REPO].tree()) == {ATTRIBUTES}
    sent = set(hub.repos[REPO].tree(STAGING)) - {ATTRIBUTES}
    assert len(sent) == 2 and shards(out) and not sent & set(shards(out)), (
        "what was not sent is here, what was sent is not"
    )
    # A Hub that asks for a pause gets it.
    hub.faults = [Fault("/commit/m3quant", 429, headers={"Retry-After": "7"})]
    # Nobody else may take over what is on the branch alone.
    refused(
        client,
        {"cli": ["convert", str(source), str(out), "--to", "int4", "--device", "cpu"]},
        2,
        f"--publish {REPO}",
        "repeat",
    )
    refused(client, command(source, out, "--drop-uploaded", repo="org/another"), 2, f"--publish {REPO}", "repeat")
    stored = hub.received()
    done = client.run(wanted)
    assert done.code == 0 and max(done.pauses) >= 7, done.err
    assert same_shards(hub, plain) and shards(out) == []
    whole = sum((plain / name).stat().st_size for name in shards(plain))
    assert hub.received() - stored < whole, "content that had arrived was sent again"


def test_shards_that_the_hub_lost_are_made_again(
    hub_with_base: Hub, client: Client, source: Path, plain: Path, tmp_path: Path
) -> None:
    hub, out = hub_with_base, tmp_path / "out"
    hub.faults = [Fault("/commit/m3quant", 503, times=99, skip=3)]
    assert client.run(command(source, out, "--drop-uploaded")).code == 4
    hub.faults = []
    hub.repos[REPO].branches.pop(STAGING)
    hub.repos[REPO].lfs.clear()
    done = client.run(command(source, out, "--drop-uploaded"))
    assert done.code == 0 and same_shards(hub, plain), done.err


def test_a_signal_ends_both_and_a_draft_is_carried(hub: Hub, client: Client, tmp_path: Path) -> None:
    source, out = small_source(tmp_path / "m2", layers=3), tmp_path / "out"
    (source / "dspark").mkdir()
    shutil.copy(next(source.glob("*.safetensors")), source / "dspark" / "model.safetensors")
    record_download(source)
    process: list[int] = []

    def interrupt(line: str) -> None:
        if "PUT /lfs" in line and process:
            os.kill(process.pop(), signal.SIGINT)

    with hub_with(hub, source):
        hub.before = interrupt
        stopped = client.run(command(source, out, "--drop-uploaded"), started=process.append)
        assert stopped.code == 130 and "run the same command to continue" in stopped.err.splitlines()[-1], stopped.err
        assert not (out / "config.json").exists() and hub.public_view(REPO) is None
        hub.before = lambda line: None
        done = client.run(command(source, out, "--drop-uploaded"))
        assert done.code == 0, done.err
        assert on_main(hub, REPO)["dspark/model.safetensors"] == (source / "dspark" / "model.safetensors").read_bytes()


def test_a_key_in_a_tensors_name_is_found_before_a_layer_is_converted(hub: Hub, client: Client, tmp_path: Path) -> None:
    source, out = small_source(tmp_path / "m2", layers=1), tmp_path / "out"
    key = "hf_" + "qZtRwMkPxLvBnYdGsHcJfT7391uEoAi5K2"
    rewrite(source, {**stored(source), f"model.layers.0.{key}.weight": torch.ones(2, dtype=torch.bfloat16)})
    record_download(source)
    with hub_with(hub, source):
        told = refused(client, command(source, out), 1, "Hugging Face token", "--allow FILE", "Nothing was converted")
    assert key not in told and not out.exists() and REPO not in hub.repos


@pytest.mark.parametrize("how", ["another checksum", "refused", "changed here"])
def test_what_arrives_otherwise_is_told_and_kept(
    hub_with_base: Hub, client: Client, source: Path, tmp_path: Path, how: str
) -> None:
    hub, out = hub_with_base, tmp_path / "out"
    wanted = command(source, out, "--drop-uploaded")
    if how == "another checksum":
        hub.corrupts = lambda path, entry: (
            Entry(entry.data, True, "0" * 64) if path.endswith("4-of-00006.safetensors") else entry
        )
        refused(client, wanted, 1, "model-00004-of-00006.safetensors", "kept here", "0000", longest=700)
    elif how == "refused":
        hub.faults = [Fault("PUT /lfs/", 403, times=9, body=b'{"error":"storage quota reached"}')]
        refused(client, wanted, 2, "403", "storage quota reached")
    else:

        def damage(line: str) -> None:
            if "objects/batch" in line:
                with open(out / shards(out)[0], "r+b") as file:
                    file.seek(-1, os.SEEK_END)
                    file.write(b"\xff")

        hub.before = damage
        refused(client, wanted, 2, "400", "another sha256")
    assert shards(out) and not (out / "config.json").exists()
    assert set(hub.repos[REPO].tree()) == {ATTRIBUTES} and hub.public_view(REPO) is None


def test_every_step_is_told_and_none_stays(hub_with_base: Hub, client: Client, tmp_path: Path) -> None:
    """From the Hub and to it: what is waited for is what is said."""
    done = client.run(command(BASE, tmp_path / "out", "--drop-uploaded", "--verbose", base=None))
    assert done.code == 0, done.err
    # Progress lines add numbers after a semicolon.
    told = [line for line in done.err.splitlines() if line.startswith(("int4: ", "publish: ")) and "; " not in line]
    assert told == [
        "int4: checking what will be published",
        "int4: looking at the source and at what is finished",
        "int4: fetching and reading embeddings, head and the rest",
        *(f"int4: {number} of 6 shards are finished" for number in range(7)),
        "int4: waiting for the last uploads",
        "int4: writing the files beside the shards",
        "publish: checking what is left to send",
        f"publish: looking at {REPO}",
        f"publish: sending to branch {STAGING}",
        "publish: comparing what arrived",
        "publish: one commit on main",
        "publish: tag v1",
    ]
