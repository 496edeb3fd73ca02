"""Large files sent by processes of their own: they arrive the same, what fails is told the same, and no process is left."""

import os
import signal
from pathlib import Path

import pytest

from tests.publish.test_upload import REPO, contents, job, large_bytes, on_main, refused
from tests.support.convert.common import run_convert
from tests.support.publish.client import Client
from tests.support.publish.converting import IMPORTED, command, hub_with, shards, small_source
from tests.support.publish.converting import REPO as CONVERTED
from tests.support.publish.hub_state import Fault, Hub
from tests.support.workers import left_over

IMPORTED_ONCE = IMPORTED
BATCH = "POST /.*/info/lfs/objects/batch"


def test_everything_arrives_once_sent_by_processes(hub: Hub, client: Client, files: Path) -> None:
    seen: set[int] = set()
    hub.before = lambda line: seen.update(left_over(client.folder)) if line.startswith("PUT /lfs") else None
    done = client.run(job(files, processes=True))
    assert done.code == 0, done.err
    assert on_main(hub) == contents(files) and seen and not left_over(client.folder)
    assert hub.received() == large_bytes(hub, files), "the commit sent content again"
    assert sum(line.endswith("objects/batch") for line, _ in hub.log) == 3, (
        "the commit asked again where to send content"
    )
    seen.clear()
    del hub.repos[REPO]
    assert client.run(job(files)).code == 0 and not seen, "so few bytes are worth no process"


@pytest.mark.parametrize(
    ("pattern", "status", "headers", "body", "phrase"),
    [
        (BATCH, 403, {"X-Error-Message": "Private repository storage limit reached"}, b"", "storage limit reached"),
        (BATCH, 400, {}, b'{"message": "see https://host.example/a?signature=abc"}', "see https://host.example/a."),
        (BATCH, 200, {}, b'{"objects": [{"oid": "0", "size": 1, "error": {"code": 1, "message": "no room"}}]}', "no room"),
        (BATCH, 401, {}, b"", "the token is not valid"),
        ("POST /api/models/.*/preupload", 403, {}, b'{"error": "Your storage patterns tripped"}', "patterns tripped"),
        ("PUT /lfs/", 403, {}, b"", "token"),
        ("PUT /lfs/", 413, {}, b"", "too large"),
    ],
)  # fmt: skip
def test_a_refusal_is_told_in_the_same_words(
    hub: Hub, client: Client, files: Path, pattern: str, status: int, headers: dict[str, str], body: bytes, phrase: str
) -> None:
    told = []
    for processes in (False, True):
        hub.repos.clear()
        hub.faults = [Fault(pattern, status, times=99, headers=headers, body=body)]
        text = refused(client, job(files, processes=processes), 2, phrase, longest=500)
        told.append([line for line in text.splitlines() if "m3quant: " in line])
    assert told[0] == told[1] and "signature" not in str(told)
    assert not left_over(client.folder)


def test_pauses_are_told_and_made_by_the_command(hub: Hub, client: Client, files: Path) -> None:
    """Those after huggingface_hub has given up."""
    hub.faults = [Fault(BATCH, 503, times=999)]
    told = refused(client, job(files, processes=True), 4, "503", "again after each pause", "continues")
    assert [f"the Hub answered 503 when asked to take files; again in {n} s" in told for n in (1, 2, 4, 8)] == [
        True
    ] * 4
    hub.faults = [Fault(BATCH, 429, times=999, headers={"Retry-After": "3600"})]
    refused(client, job(files, processes=True), 4, "429", "in 3600 s")
    hub.faults = []
    assert client.run(job(files, processes=True)).code == 0 and on_main(hub) == contents(files)


def test_a_process_that_dies_counts_as_a_lost_connection(hub: Hub, client: Client, files: Path) -> None:
    killed: list[int] = []

    def kill(line: str) -> bool | None:
        if line.startswith("PUT /lfs") and not killed:
            killed.extend(left_over(client.folder))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            return False
        return None

    hub.before = kill
    done = client.run(job(files, processes=True))
    assert done.code == 0 and killed and on_main(hub) == contents(files), done.err
    assert done.pauses == [1.0] and "the Hub answered nothing when asked to take files; again in 1 s" in done.err
    killed.clear()
    always: list[int] = []

    def kill_each(line: str) -> bool | None:
        if line.startswith("PUT /lfs"):
            killed.clear()
            always.append(kill(line) is False)
            return False
        return None

    hub.repos.clear()
    hub.before = kill_each
    refused(client, job(files, processes=True), 4, f"a process ended with {-signal.SIGKILL}", "it continues")
    assert not left_over(client.folder)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_a_run_that_is_stopped(hub: Hub, client: Client, files: Path, number: int) -> None:
    process: list[int] = []
    at_work: list[int] = []

    def stop(line: str) -> bool | None:
        if line.startswith("PUT /lfs") and not at_work:
            at_work.extend(left_over(client.folder))
            os.kill(process[0], number)
        return None

    hub.before = stop
    done = client.run(job(files, processes=True), started=process.append)
    assert done.code == (-number if number == signal.SIGKILL else 130) and at_work, done.err
    hub.before = lambda line: None
    assert client.run(job(files, processes=True)).code == 0
    assert on_main(hub) == contents(files) and not left_over(client.folder)


def test_shards_go_up_beside_a_conversion_by_processes(hub: Hub, client: Client, tmp_path: Path) -> None:
    source, out, plain = small_source(tmp_path / "m2", layers=3), tmp_path / "out", tmp_path / "plain"
    run_convert(source, plain, "int4")
    wanted = command(source, out, "--drop-uploaded") | {"processes": True}
    with hub_with(hub, source):
        hub.faults = [Fault("/objects/batch", 403, skip=1, times=99, headers={"X-Error-Message": "no more room"})]
        refused(client, wanted, 2, "403", "no more room")
        assert not left_over(client.folder)
        hub.faults = [Fault("PUT /lfs/", None)]
        done = client.run(wanted)
        assert done.code == 0 and done.pauses, done.err
        there = {n: data for n, data in on_main(hub, CONVERTED).items() if n.endswith(".safetensors")}
        assert there == {name: (plain / name).read_bytes() for name in shards(plain)} and shards(out) == []
        assert not left_over(client.folder)


def test_a_thread_that_comes_when_sending_has_ended_sends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from m3quant.publish import remote as module
    from m3quant.running import workers

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(module, "uses_xet", lambda: False)
    monkeypatch.setattr(workers, "WORTH_BYTES", 1)
    remote = module.Remote(REPO)
    monkeypatch.setattr(remote.api, "preupload_lfs_files", lambda *_, **__: pytest.fail("sent in this process"))
    (tmp_path / "shard").write_bytes(b"x" * 100)
    late = [huggingface_hub.CommitOperationAdd("shard", str(tmp_path / "shard"))]
    with remote.sending(100):
        pass
    with pytest.raises(workers.WorkersEnded):
        remote.preupload(late, "main", 1)
    with remote.sending(0):
        assert remote._sender is None
