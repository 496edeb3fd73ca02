"""Uploading through the real huggingface_hub to a Hub on localhost: what ends up there, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from m3quant.publish import upload
from m3quant.publish.files import PublishFile
from tests.support.publish.client import READ_TOKEN, TOKEN, Client
from tests.support.publish.hub_state import ATTRIBUTES, Fault, Hub

REPO = "org/model"
SHARD = "model-00001-of-00002.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def on_main(hub: Hub, repo: str = REPO) -> dict[str, bytes]:
    return {path: entry.data for path, entry in hub.repos[repo].tree().items() if path != ATTRIBUTES}


def job(files: Path, **options: Any) -> dict[str, Any]:
    return {"upload": str(files), "repo": REPO, **options}


def large_bytes(hub: Hub, files: Path) -> int:
    return sum(len(d) for n, d in contents(files).items() if n.endswith(".safetensors") or len(d) >= hub.lfs_from)


def small_bytes(hub: Hub, files: Path) -> int:
    return sum(map(len, contents(files).values())) - large_bytes(hub, files)


def test_everything_arrives_private_tagged_and_without_a_branch(hub: Hub, client: Client, files: Path) -> None:
    done = client.run(job(files))
    assert done.code == 0, done.err
    repo = hub.repos[REPO]
    assert on_main(hub) == contents(files)
    assert repo.private and list(repo.branches) == ["main"] and repo.tags == {"v1": repo.head}
    assert done.json["commit"] == repo.head and not done.json["public"]
    assert done.json["files"] == len(contents(files))
    assert done.json["bytes"] == done.json["sent"] == sum(map(len, contents(files).values()))
    assert hub.received() == large_bytes(hub, files)
    assert len(repo.commits[repo.head].title) > 0 and repo.commits[repo.head].parent is not None
    assert sum(c.title.startswith("Stage") for c in repo.commits.values()) > 2
    large = {p for p, e in repo.tree().items() if e.lfs}
    assert large == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"}
    assert repo.tree()[ATTRIBUTES].data.decode().count("tokenizer.json") == 1
    assert any("/complete" in line for line, _ in hub.log), "no file went in several parts"


def test_public_only_when_asked_and_a_second_run_sends_nothing(hub: Hub, client: Client, files: Path) -> None:
    assert client.run(job(files, tag="v2")).code == 0
    assert hub.public_view(REPO) is None
    before = hub.received(".")
    done = client.run(job(files, tag="v2", public=True))
    assert done.code == 0 and done.json["sent"] == 0 and done.json["public"]
    assert hub.received("PUT /lfs|/commit/|preupload") and hub.received("PUT /lfs") == large_bytes(hub, files)
    assert hub.received(".") - before < 500
    view = hub.public_view(REPO)
    assert view is not None and view["files"] == sorted(contents(files)) and list(view["branches"]) == ["main"]
    again = client.run(job(files, tag="v2"))
    assert again.code == 0 and again.json["public"], "a published repo is left public"


def refused(client: Client, job: dict[str, Any], code: int, *phrases: str, longest: int = 400, **options: Any) -> str:
    done = client.run(job, **options)
    text = done.err.splitlines()[-1] if done.err else ""
    assert done.code == code, done
    assert [p for p in ("m3quant: ", *phrases) if p not in text] == [], done.err
    assert done.out == "" and len(text) < longest
    return done.err


def test_who_may_not_publish_is_told_before_anything_is_sent(hub: Hub, client: Client, files: Path) -> None:
    refused(client, job(files), 2, "no Hub token", "hf auth login", token=None)
    refused(client, job(files), 2, "can only read", "write permission", token=READ_TOKEN)
    refused(client, job(files), 2, "401", "not valid", token="hf_unknown")
    refused(client, job(files), 2, "another character", token="hf_two\x7fparts")
    refused(client, job(files) | {"repo": "elsewhere/model"}, 2, "403", "says: You don't have the rights")
    refused(client, job(files) | {"repo": "model"}, 2, "ORG/NAME")
    refused(client, job(files, tag="a b"), 2, "no name for a tag")
    refused(client, job(files, tag="main"), 2, "no name for a tag")
    assert hub.repos == {} and hub.received("PUT /lfs") == 0


def test_the_token_of_a_login_is_found(hub: Hub, client: Client, files: Path) -> None:
    home = client.folder / "hf"
    home.mkdir(exist_ok=True)
    (home / "token").write_text(TOKEN + "\n")
    try:
        assert client.run(job(files), token=None).code == 0
    finally:
        (home / "token").unlink()


def test_files_of_the_base_are_copied_on_the_hub(hub: Hub, client: Client, files: Path) -> None:
    """Large files with the same sha256 only, and only by a client that can: it sends them otherwise, and says so if it tried."""
    whole = contents(files)
    name = "tokenizer.json"
    base = hub.add("base/model", {name: whole[name], "README.md": b"another", SHARD: b"other" * 400}, large=True)
    done = client.run(job(files, base=["base/model", base.head]))
    assert done.code == 0 and on_main(hub) == whole
    copied = len(whole[name]) if done.json["copied"] else 0
    assert bool(copied) == (client.copies)
    assert hub.received() == large_bytes(hub, files) - copied == done.json["sent"] - small_bytes(hub, files)
    if copied:
        del hub.repos[REPO]
        hub.faults = [Fault("lfs-files/duplicate", 403)]
        done = client.run(job(files, base=["base/model", base.head]))
        assert done.code == 0 and done.json["copied"] == 0 and on_main(hub) == whole
        assert "could not be copied on the Hub and are sent instead" in done.err


def test_a_name_that_is_taken_is_left_alone(hub: Hub, client: Client, files: Path) -> None:
    theirs = {"model.safetensors": b"theirs", "config.json": b"{}"}
    repo = hub.add(REPO, theirs, private=True)
    head = repo.head
    refused(client, job(files), 2, REPO, "config.json", "--replace")
    assert repo.head == head and on_main(hub) == theirs and list(repo.branches) == ["main"]
    done = client.run(job(files, replace=True))
    assert done.code == 0 and on_main(hub) == contents(files)
    assert done.json["removed"] == ["model.safetensors"]
    hub.add(REPO, theirs, private=False)
    refused(client, job(files, replace=True), 2, "is public", "half-done")
    assert on_main(hub) == theirs and hub.received("PUT /lfs") == large_bytes(hub, files)


def test_a_tag_that_exists_elsewhere_is_refused_early(hub: Hub, client: Client, files: Path) -> None:
    repo = hub.add(REPO, {ATTRIBUTES: b"*"}, private=True)
    repo.tags["v1"] = repo.head
    refused(client, job(files), 2, "tag v1", "--tag")
    assert hub.received("PUT /lfs") == 0 and on_main(hub) == {}


def test_a_checksum_that_differs_there_stops_before_main(hub: Hub, client: Client, files: Path) -> None:
    from dataclasses import replace

    for name, wrong in [
        ("model-00002-of-00002.safetensors", {"claimed": "0" * 64}),
        ("config.json", {"data": b'{"model_type": "minimax_m3"}'}),
    ]:
        hub.corrupts = lambda path, entry, name=name, wrong=wrong: replace(entry, **wrong) if path == name else entry
        refused(
            client,
            job(files, public=True),
            1,
            "branch m3quant-staging",
            f"another checksum for {name}",
            "nothing was merged",
        )
        assert on_main(hub) == {} and hub.public_view(REPO) is None and hub.repos.pop(REPO).tags == {}
    hub.corrupts = lambda path, entry: entry
    assert client.run(job(files)).code == 0 and on_main(hub) == contents(files)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
def test_a_file_that_changes_during_the_upload_stops_it(hub: Hub, client: Client, files: Path, name: str) -> None:
    def change(line: str) -> None:
        if line.startswith("POST") and "/branch/" in line:
            data = bytearray((files / name).read_bytes())
            data[5] ^= 1
            (files / name).write_bytes(data)

    hub.after = change
    refused(client, job(files, public=True), 1, name, "changed on the disk", "nothing was merged")
    assert on_main(hub) == {} and hub.public_view(REPO) is None


def test_somebody_elses_commit_on_main_is_not_merged_into(hub: Hub, client: Client, files: Path) -> None:
    from tests.support.publish.hub_state import Entry

    def interfere(line: str) -> bool | None:
        if line.endswith("/commit/main") and on_main(hub) == {}:
            repo = hub.repos[REPO]
            repo.commit(repo.tree() | {"theirs.txt": Entry(b"theirs")}, "theirs")
        return None

    hub.before = interfere
    refused(client, job(files, public=True), 2, "moved", "somebody else", "nothing was merged")
    assert on_main(hub) == {"theirs.txt": b"theirs"} and hub.public_view(REPO) is None
    refused(client, job(files), 2, "theirs.txt", "--replace")
    sent = hub.received()
    done = client.run(job(files, replace=True))
    assert done.code == 0 and on_main(hub) == contents(files) and hub.received() == sent


FAILURES = [
    ("POST /api/repos/create", 403, 2, "write permission"),
    ("POST /api/models/.*/branch", 409, None, ""),
    ("POST /api/models/.*/commit/m3quant", 413, 2, "too large"),
    ("PUT /lfs/", 413, 2, "too large"),
    ("POST /api/models/.*/commit/m3quant", 422, 2, "gave no reason"),
    ("PUT /lfs/", 403, 2, "token"),
    ("POST /api/models/.*/commit/main", 409, 2, "main is still at"),
    ("GET /api/models/.*/refs", 404, 2, "does not exist"),
    ("POST /api/models/.*/tag", 403, 2, "write permission"),
    ("PUT /api/models/.*/settings", 402, 2, "quota"),
    ("GET /api/models/.*/tree", 418, 2, "418"),
]


@pytest.mark.parametrize(("pattern", "status", "code", "phrase"), FAILURES)
def test_refusals_of_the_hub_are_one_sentence(
    hub: Hub, client: Client, files: Path, pattern: str, status: int, code: int | None, phrase: str
) -> None:
    hub.faults = [Fault(pattern, status, times=99, body=b"")]
    if code is not None:
        refused(client, job(files, public=True), code, phrase)
        assert hub.public_view(REPO) is None
        if "tag" not in pattern and "settings" not in pattern:
            assert REPO not in hub.repos or on_main(hub) == {}
    hub.faults = []
    assert client.run(job(files, public=True)).code == 0
    assert on_main(hub) == contents(files)


QUOTA = "Private repository storage limit reached, please upgrade your plan"
SAID = [
    ("POST /.*/info/lfs/objects/batch", 403, {"X-Error-Message": QUOTA}, b"", QUOTA),
    ("POST /.*/info/lfs/objects/batch", 400, {}, b'{"message": "bad oid"}', "bad oid"),
    ("POST /api/models/.*/preupload", 403, {}, b'{"error": "Your storage patterns tripped our systems"}', "tripped our systems"),
    ("POST /api/models/.*/commit/m3quant", 400, {}, b'{"error": "Invalid metadata in README.md"}', "says: Invalid metadata in README.md."),
    ("POST /api/models/.*/commit/m3quant", 422, {}, b'{"error": "LFS pointer pointed to a file that does not exist"}', "LFS pointer"),
    ("POST /api/models/.*/commit/m3quant", 402, {}, b'{"error": "see https://host.example/a?signature=abc now"}', "see https://host.example/a now."),
    ("POST /api/models/.*/commit/m3quant", 400, {}, b'{"error": "' + b"x" * 5000 + b'"}', "xxx..."),
    ("POST /api/models/.*/commit/m3quant", 400, {}, b"<html>" + b"[" * 100_000, "gave no reason"),
    ("POST /api/models/.*/commit/m3quant", 400, {}, b'{"error": {"a": 1}}', "gave no reason"),
    ("POST /api/models/.*/commit/main", 412, {}, b'{"error": "A commit has happened since."}', "A commit has happened since. main is still at"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "status", "headers", "body", "phrase"), SAID)
def test_what_the_hub_says_is_passed_on(
    hub: Hub, client: Client, files: Path, pattern: str, status: int, headers: dict[str, str], body: bytes, phrase: str
) -> None:
    hub.faults = [Fault(pattern, status, times=99, headers=headers, body=body)]
    said = refused(client, job(files), 2, str(status), phrase, longest=500)
    assert "write permission" not in said and "moved from" not in said and "signature" not in said


BUSY = [
    ("POST /api/models/.*/tag", 429, {"RateLimit": '"api";r=0;t=9'}, 9.0),
    ("POST /api/models/.*/commit/m3quant", 408, {}, 1.0),
    ("POST /api/repos/create", 429, {"Retry-After": "7"}, 7.0),
    ("POST /api/repos/create", 503, {}, 1.0),
    ("POST /api/models/.*/commit/m3quant", 503, {"Retry-After": "3"}, 3.0),
    ("POST /api/models/.*/commit/main", 500, {}, 1.0),
    ("GET /api/models/.*/tree", None, {}, 1.0),
    ("POST /api/models/.*/tag", 429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
]


@pytest.mark.parametrize(("pattern", "status", "headers", "pause"), BUSY)
def test_a_busy_hub_is_asked_again_as_late_as_it_wants(
    hub: Hub, client: Client, files: Path, pattern: str, status: int | None, headers: dict[str, str], pause: float
) -> None:
    hub.faults = [Fault(pattern, status, headers=headers)]
    done = client.run(job(files))
    assert done.code == 0, done.err
    assert pause in done.pauses and on_main(hub) == contents(files)
    tree_before = hub.repos[REPO].commits.copy()
    hub.faults = [Fault("GET /api/models/", 503, times=99)]
    refused(client, job(files), 4, "503", "again after each pause", "continues")
    assert hub.repos[REPO].commits == tree_before


def test_a_pause_that_is_too_long_is_left_to_the_user(hub: Hub, client: Client, files: Path) -> None:
    hub.faults = [Fault("POST /api/repos/create", 429, headers={"Retry-After": "3600"})]
    refused(client, job(files), 4, "429", "in 3600 s")


@pytest.mark.parametrize("status", [503, None])
@pytest.mark.parametrize(
    "pattern", ["/commit/main", "/commit/m3quant", "POST /api/models/.*/branch", "POST .*/tag/", "DELETE"]
)
def test_an_answer_that_is_lost_does_no_harm(
    hub: Hub, client: Client, files: Path, pattern: str, status: int | None
) -> None:
    hub.faults = [Fault(pattern, status, after=True)]
    done = client.run(job(files))
    assert done.code == 0, done.err
    repo = hub.repos[REPO]
    assert on_main(hub) == contents(files) and repo.tags == {"v1": repo.head} and list(repo.branches) == ["main"]
    assert sum(c.title == "Publish with m3quant" for c in repo.commits.values()) == 1
    assert hub.received() == large_bytes(hub, files)


def test_parts_that_fail_are_sent_again_by_the_client(hub: Hub, client: Client, files: Path) -> None:
    hub.faults = [Fault(r"PUT /lfs/.*/2$", 500), Fault("PUT /lfs/", 503, skip=4)]
    done = client.run(job(files))
    assert done.code == 0 and on_main(hub) == contents(files)
    assert "signature" not in done.err + done.out


def test_a_hub_that_is_not_there_is_one_sentence(hub: Hub, client: Client, files: Path) -> None:
    hub.faults = [Fault(".", None, times=99)]
    refused(client, job(files), 4, "could not be asked", "check the network")


def test_groups_keep_their_limits_and_their_order(tmp_path: Path) -> None:
    def file(number: int, size: int) -> PublishFile:
        return PublishFile(str(number), tmp_path, size, "")

    sizes = [5, 5, upload.GROUP_BYTES, 5, *[upload.SMALL_BYTES] * 7, *[1] * (upload.GROUP_FILES + 1)]
    files = [file(number, size) for number, size in enumerate(sizes)]
    made = list(upload.groups(files))
    assert [f for group in made for f in group] == files and all(made)
    for group in made:
        assert len(group) <= upload.GROUP_FILES
        assert len(group) == 1 or sum(f.size for f in group) <= upload.GROUP_BYTES
        assert sum(f.size for f in group if f.size <= upload.SMALL_BYTES) <= upload.GROUP_SMALL_BYTES
    huge = file(0, 3 * upload.GROUP_BYTES)
    assert list(upload.groups([huge])) == [[huge]] and list(upload.groups([])) == []
