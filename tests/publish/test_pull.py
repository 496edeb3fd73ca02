"""Pulling through the real huggingface_hub: only what is needed, every file compared, resumed, refused."""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.publish.test_upload import refused
from tests.support.publish.client import Client
from tests.support.publish.hub_state import Entry, Fault, Hub

REPO = "org/model"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def checkpoint() -> dict[str, bytes]:
    """Files as m3quant publishes them: shards, config, manifest, sums."""
    files = {
        SHARDS[0]: bytes(range(256)) * 100,
        SHARDS[1]: bytes(range(255, -1, -1)) * 50,
        "model.safetensors.index.json": b"{}",
        "config.json": b'{"model_type": "minimax_m2"}',
        "m3quant-report/index.html": b"<p>",
        ".eval_results/a.yaml": b"- 1\n",
    }
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    shards = {name: {"size": len(files[name]), "sha256": sums[name]} for name in SHARDS}
    files["m3quant.json"] = json.dumps({"files": {"config.json": sums["config.json"]}, "shards": shards}).encode()
    sums["m3quant.json"] = hashlib.sha256(files["m3quant.json"]).hexdigest()
    files["SHA256SUMS"] = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()
    return files | {"README.md": b"# card", "old.bin": b"weights", ".gitattributes": b"*"}


NEEDED = set(checkpoint()) - {".eval_results/a.yaml", "old.bin", ".gitattributes"}


def pulled(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def pull(repo: str, folder: Path | None = None, *options: str) -> dict[str, Any]:
    return {"cli": ["pull", repo, *([str(folder)] if folder else []), *options]}


def test_what_is_needed_arrives_and_is_compared(hub: Hub, client: Client, tmp_path: Path) -> None:
    files = checkpoint()
    repo = hub.add(REPO, files, large=True)
    repo.tags["v1"] = repo.head
    done = client.run(pull(f"{REPO}@v1", tmp_path / "here", "--json"), token=None)
    assert done.code == 0, done.err
    assert pulled(tmp_path / "here") == {name: files[name] for name in NEEDED}
    facts = done.json
    assert facts["revision"] == repo.head and facts["files"] == len(NEEDED) and facts["manifest"] == len(NEEDED) - 2
    assert set(facts["left_out"]) == set(files) - NEEDED
    before = sum(count for *_, count in hub.sent)
    again = client.run(pull(REPO, tmp_path / "here"), token=None)
    assert again.code == 0 and "verified" in again.out and sum(count for *_, count in hub.sent) == before


def test_without_a_folder_it_goes_to_the_cache(hub: Hub, client: Client) -> None:
    hub.add("org/cached", checkpoint(), large=True)
    done = client.run(pull("org/cached", None, "--json"), token=None)
    assert done.code == 0, done.err
    path = Path(done.json["path"])
    assert set(pulled(path)) == NEEDED and path.is_relative_to(client.folder / "hf")


def test_a_repo_without_a_manifest_is_compared_with_the_hub(hub: Hub, client: Client, tmp_path: Path) -> None:
    files = {"model.safetensors": b"w" * 5000, "config.json": b"{}", "LICENSE": b"text"}
    hub.add(REPO, files, large=True)
    done = client.run(pull(REPO, tmp_path / "here", "--json"), token=None)
    assert done.code == 0 and done.json["manifest"] == 0 and "Hub's own checksums" in done.err
    assert pulled(tmp_path / "here") == files


def edited(hub: Hub, name: str, data: bytes | None = None, claimed: str | None = None, files: Any = None) -> None:
    """A repo in which one file is not what its manifest lists (`data`), or not what the Hub says it is (`claimed`)."""
    files = files or checkpoint()
    repo = hub.add(REPO, files, large=True)
    tree = dict(repo.tree())
    entry = tree[name]
    tree[name] = Entry(entry.data if data is None else data, entry.lfs, claimed)
    repo.commit(tree, "edited")


@pytest.mark.parametrize(
    ("name", "data", "phrases"),
    [
        (SHARDS[1], b"x" * 12_800, ["is not the file that its manifest lists"]),
        ("config.json", b'{"model_type": "minimax_m3"}', ["is not the file", "its manifest lists"]),
        ("SHA256SUMS", b"not sums\n", ["sha256sum would not write"]),
        ("m3quant.json", b"{", ["manifest of m3quant", "damaged"]),
        (
            "m3quant.json",
            b'{"files": {}, "shards": {"config.json": {"size": 28, "sha256": "%s"}}}' % (b"0" * 64),
            ["different sums", "config.json"],
        ),
    ],
)
def test_files_that_are_not_what_the_publisher_recorded_are_refused(
    hub: Hub, client: Client, tmp_path: Path, name: str, data: bytes, phrases: list[str]
) -> None:
    edited(hub, name, data)
    job = pull(REPO, tmp_path / "here")
    if name == "config.json":
        phrases = ["is not config.json of org/model", "sha256", "pull again"]
    refused(client, job, 1, *phrases, token=None)


def test_content_that_is_not_what_the_hub_says_is_refused(hub: Hub, client: Client, tmp_path: Path) -> None:
    """The Hub states the right sum and sends other bytes of the same length."""
    files = checkpoint()
    right = hashlib.sha256(files[SHARDS[0]]).hexdigest()
    edited(hub, SHARDS[0], bytes(len(files[SHARDS[0]])), claimed=right)
    refused(client, pull(REPO, tmp_path / "here"), 1, SHARDS[0], right[:12], "remove", "pull again", token=None)
    del hub.repos[REPO]
    hub.add(REPO, files, large=True)
    (tmp_path / "here" / SHARDS[0]).unlink()
    assert client.run(pull(REPO, tmp_path / "here"), token=None).code == 0


def test_shards_missing_or_unlisted_are_refused(hub: Hub, client: Client, tmp_path: Path) -> None:
    files = checkpoint()
    del files[SHARDS[1]]
    hub.add(REPO, files, large=True)
    refused(client, pull(REPO, tmp_path / "here"), 1, "lacks", SHARDS[1], "incomplete", token=None)
    hub.add(REPO, checkpoint() | {"more.safetensors": b"w" * 2000}, large=True)
    refused(client, pull(REPO, tmp_path / "there"), 1, "more.safetensors", "does not list", token=None)


def test_bad_places_and_names_are_one_sentence(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.add(REPO, checkpoint(), large=True)
    hub.add("org/private", checkpoint(), private=True)
    hub.add("org/data", {"a.txt": b"a"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused(client, pull(REPO, tmp_path / "mine"), 2, "not of org/model", "notes.txt", token=None)
    refused(client, pull(REPO, tmp_path / "mine" / "notes.txt"), 2, "is a file", token=None)
    refused(client, pull("org/private", tmp_path / "x"), 2, "not open to you", "hf auth login", token=None)
    refused(client, pull("org/absent", tmp_path / "x"), 2, "does not exist", token=None)
    refused(client, pull("org/model@v9", tmp_path / "x"), 2, "no revision", token=None)
    refused(client, pull("org/model@a", tmp_path / "x", "--revision", "b"), 2, "Two revisions", token=None)
    refused(client, pull("model", tmp_path / "x"), 2, "ORG/NAME", token=None)
    refused(client, pull("org/data", tmp_path / "x"), 2, "no config.json", token=None)
    assert client.run(pull("org/private", tmp_path / "y")).code == 0


def test_a_busy_hub_is_told_and_the_same_command_continues(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.add(REPO, checkpoint(), large=True)
    hub.faults = [Fault("GET /org/model/resolve/.*safetensors", 503, times=99)]
    refused(client, pull(REPO, tmp_path / "here"), 4, "503", "continues", token=None)
    hub.faults = [
        Fault("GET /api/models/", 429, headers={"Retry-After": "5"}),
        Fault("GET /org/model/resolve/.*safetensors", 503, headers={"Retry-After": "6"}),
    ]
    done = client.run(pull(REPO, tmp_path / "here"), token=None)
    assert done.code == 0, done.err
    assert {5.0, 6.0} <= set(done.pauses) or {5.0, 7.0} <= set(done.pauses)  # the library itself adds a second


def test_killed_in_a_file_it_continues_where_it_was(hub: Hub, client: Client, tmp_path: Path) -> None:
    files = checkpoint()
    hub.add(REPO, files, large=True)
    process: list[int] = []

    def strike(line: str) -> None:
        if line.startswith("GET") and line.endswith(SHARDS[0]):
            os.kill(process[0], signal.SIGKILL)

    hub.after = strike
    killed = client.run(pull(REPO, tmp_path / "here"), token=None, started=process.append)
    assert killed.code == -signal.SIGKILL
    hub.after = lambda line: None
    assert not (tmp_path / "here" / SHARDS[0]).exists(), "a file that is not whole has its final name"
    proofs = {"m3quant.json", "SHA256SUMS"}  # fetched before anything else
    assert proofs <= set(pulled(tmp_path / "here"))
    hub.sent.clear()
    done = client.run(pull(REPO, tmp_path / "here"), token=None)
    assert done.code == 0, done.err
    assert pulled(tmp_path / "here") == {name: files[name] for name in NEEDED}
    assert proofs.isdisjoint(file for _, file, count in hub.sent if count)


def test_a_full_disk_is_met_before_the_download(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.add(REPO, checkpoint(), large=True, sizes={SHARDS[0]: 10**18})
    refused(client, pull(REPO, tmp_path / "here"), 4, "more bytes", "free space", token=None)
    assert not [file for _, file, count in hub.sent if file in SHARDS and count]
