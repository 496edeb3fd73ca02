"""m3quant publish from end to end: gates, then the upload to a Hub on localhost, then what another user gets from it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.publish.test_upload import refused
from tests.support.publish.client import Client
from tests.support.publish.hub_state import ATTRIBUTES, Fault, Hub
from tests.support.publish.outputs import COMMIT, converted, source_like

IMPORTED_ONCE = (
    "torch",
    "compressed_tensors.quantization",
    "m3quant.publish.gates",
    "m3quant.runtime.serving_table",
    "m3quant.verify.verification",
    "m3quant.cli.publish",
)
BASE = "MiniMaxAI/MiniMax-M3"
REPO = "org/tiny-m3-int4"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    return converted(source_like(folder / "m3"), folder / "out")


@pytest.fixture
def hub_with_base(hub: Hub, out: Path) -> Iterator[Hub]:
    """The base on the Hub, at the commit that the output records; large files from 100 kB on."""
    before = hub.lfs_from, hub.part_bytes
    hub.lfs_from, hub.part_bytes = 100_000, 2_000_000
    source = out.parent / "m3"
    hub.add(BASE, {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}, large=True, oid=COMMIT)
    yield hub
    hub.lfs_from, hub.part_bytes = before


def publish(out: Path, *options: str) -> dict[str, Any]:
    return {"cli": ["publish", str(out), REPO, "--base-repo", BASE, *options]}


def test_a_dry_run_lists_everything_and_asks_nobody(hub: Hub, client: Client, out: Path) -> None:
    (out / "README.md").unlink(missing_ok=True)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = client.run(publish(out, "--dry-run", "--json"), token=None)
    assert done.code == 0, done.err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    facts = done.json
    listed = {file["path"]: file["size"] for file in facts["files"]}
    assert {"README.md", "LICENSE", "SHA256SUMS", "config.json", "m3quant.json", "tokenizer.json"} <= set(listed)
    written = {name: (out / name).stat().st_size for name in listed if (out / name).exists()}
    assert written.items() <= listed.items() and "m3quant.json" in written and facts["bytes"] == sum(listed.values())
    assert facts["base"] == {"repo": BASE, "revision": COMMIT} and facts["obligations"]
    ran = client.run(publish(out, "--dry-run"), token=None)
    assert ran.code == 0 and all(name in ran.out for name in listed) and "Its licence asks of you" in ran.out
    assert all(line in ran.out for line in facts["obligations"])
    assert hub.log == []


def test_a_dry_run_that_a_gate_refuses_still_lists_the_files(client: Client, out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "of-unknown-base"
    shutil.copytree(out, copy)
    manifest = json.loads((copy / "m3quant.json").read_text())
    manifest["source"]["repo"] = None
    (copy / "m3quant.json").write_text(json.dumps(manifest))
    assert client.run({"cli": ["card", str(copy), "--base-repo", BASE, "--base-revision", COMMIT]}).code == 0
    carded = (copy / "README.md").read_text(encoding="utf-8")
    assert BASE in carded
    unlicensed = {"cli": ["publish", str(copy), REPO, "--dry-run"]}
    done = client.run({"cli": [*unlicensed["cli"], "--json"]}, token=None)
    assert done.code == 1 and "base model is unknown" in done.json["refused"] and done.json["refused"] in done.err
    listed = {file["path"]: file["size"] for file in done.json["files"]}
    assert {"config.json", "m3quant.json", "README.md"} <= set(listed) and done.json["bytes"] == sum(listed.values())
    ran = client.run(unlicensed, token=None)
    assert ran.code == 1 and "not to be sent yet" in ran.out and all(name in ran.out for name in listed)
    assert (copy / "README.md").read_text(encoding="utf-8") == carded  # the base that it names was not given again


def test_published_then_pulled_and_verified_by_a_stranger(
    hub_with_base: Hub, client: Client, out: Path, tmp_path: Path
) -> None:
    hub = hub_with_base
    done = client.run(publish(out, "--yes", "--public", "--json"))
    assert done.code == 0, done.err
    facts = done.json
    repo = hub.repos[REPO]
    assert facts["public"] and not repo.private and repo.tags == {"v1": facts["commit"]}
    assert facts["copied"] == ((out / "tokenizer.json").stat().st_size if client.copies else 0)
    assert facts["sent"] + facts["copied"] == facts["bytes"]
    large = sum(len(e.data) for p, e in repo.tree().items() if e.lfs)
    assert hub.received() == large - facts["copied"]
    pulled = client.run({"cli": ["pull", REPO, str(tmp_path / "copy"), "--json"]}, token=None)
    assert pulled.code == 0, pulled.err
    published = {p for p in repo.tree() if p != ATTRIBUTES}
    for path in published:
        assert (tmp_path / "copy" / path).read_bytes() == (out / path).read_bytes()
    verified = client.run({"cli": ["verify", REPO, "--json"]}, token=None)
    assert verified.code == 0, verified.err
    assert json.loads(verified.out)["holds"] and f"using {REPO}@" in verified.err


def test_what_a_gate_refuses_never_reaches_the_hub(hub_with_base: Hub, client: Client, out: Path) -> None:
    hub = hub_with_base
    refused(client, publish(out), 2, "--yes")
    refused(client, {"cli": ["publish", str(out), "org"]}, 2, "ORG/NAME")
    refused(client, {"cli": ["publish", str(out / "absent"), REPO]}, 2, "no folder")
    refused(client, publish(out, "--yes"), 2, "no Hub token", token=None)
    refused(client, {"cli": ["publish", str(out), REPO, "--yes"]}, 1, "base model is unknown", "--base-repo")
    shard = next(out.glob("*.safetensors"))
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused(client, publish(out, "--yes"), 1, shard.name)
    finally:
        shard.write_bytes(whole)
    (out / "LICENSE").rename(out / "kept")
    try:
        refused(client, publish(out, "--yes"), 1, "LICENSE")
    finally:
        (out / "kept").rename(out / "LICENSE")
    assert REPO not in hub.repos and hub.received("PUT|POST /api/repos") == 0


def test_a_hub_that_stops_answering_is_told_and_continued(hub_with_base: Hub, client: Client, out: Path) -> None:
    hub = hub_with_base
    hub.faults = [Fault("/commit/m3quant", 503, times=99, skip=int(client.copies))]
    done = client.run(publish(out, "--yes", "--public"))
    assert done.code == 4 and "run the same command again" in done.err.splitlines()[-1]
    assert hub.public_view(REPO) is None and set(hub.repos[REPO].tree()) == {ATTRIBUTES}
    received = hub.received()
    assert received > 0
    hub.faults = []
    again = client.run(publish(out, "--yes", "--public"))
    assert again.code == 0 and "tagged v1; it is public" in again.out, again.err
    assert hub.received() == received
