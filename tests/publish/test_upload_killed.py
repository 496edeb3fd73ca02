"""kill -9 of the publishing process at every request that changes something on the Hub, before and after it is carried out.

The server kills: nothing in the product knows of the test. After each kill the state of the Hub is read as another user sees it and as
the owner does; then the same command runs again and must come to the same end, without sending anything twice.
"""

import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

from tests.publish.test_upload import REPO, contents, job, large_bytes, on_main
from tests.support.publish.client import Client
from tests.support.publish.hub_state import ATTRIBUTES, Hub

# Requests that change nothing, though they are no GETs.
QUESTIONS = ("/preupload/", "/paths-info/", "/objects/batch", "/validate-yaml", "/verify")


def changes(line: str) -> bool:
    return not line.startswith(("GET", "HEAD")) and not any(part in line for part in QUESTIONS)


def kill_at(hub: Hub, client: Client, wanted: dict[str, Any], number: int, after: bool) -> str | None:
    """Run `wanted`; kill its process at the change with this number. The request, or None if there are fewer changes.

    Files travel side by side, so that other changes may begin before this one is carried out: it is known by its thread.
    """
    seen: list[int] = []  # the threads of the changes, in the order in which they began
    killed: list[str] = []
    process: list[int] = []
    lock = threading.Lock()

    def strike(line: str) -> None:
        killed.append(line)
        os.kill(process[0], signal.SIGKILL)

    def before(line: str) -> bool | None:
        with lock:
            if not changes(line) or killed:
                return False if killed else None
            seen.append(threading.get_ident())
            if len(seen) == number + 1 and not after:
                strike(line)
                return False
            return None

    def carried_out(line: str) -> None:
        with lock:
            mine = len(seen) > number and seen[number] == threading.get_ident()
            if after and changes(line) and mine and not killed:
                strike(line)

    hub.before, hub.after = before, carried_out
    done = client.run(wanted, started=process.append)
    hub.before = hub.after = lambda line: None  # type: ignore[assignment]
    if not killed:
        assert done.code == 0
        return None
    assert done.code == -signal.SIGKILL
    return killed[0]


def what_is_there(hub: Hub, whole: dict[str, bytes]) -> tuple[str, str]:
    """As text: what another user and what the owner see."""
    repo = hub.repos.get(REPO)
    view = hub.public_view(REPO)
    if repo is None:
        return "nothing", "no repo"
    main = "whole" if on_main(hub) == whole else "empty" if on_main(hub) == {} else "PARTIAL"
    owner = f"main {main}, {'tag' if repo.tags else 'no tag'}"
    staged = [n for n in repo.branches if n != "main"]
    if staged:
        owner += f", branch with {len(repo.tree(staged[0])) - 1} files"
    if repo.lfs:
        owner += f", {len(repo.lfs)} contents stored"
    return "nothing" if view is None else f"main with {len(view['files'])} files", owner


def test_killed_anywhere_nothing_half_done_shows_and_the_next_run_finishes(
    hub: Hub, client: Client, files: Path
) -> None:
    whole = contents(files)
    wanted = job(files, public=True, group_files=5)
    rows = []
    for number in range(100):
        for after in (False, True):
            hub.repos.clear()
            hub.log.clear()
            line = kill_at(hub, client, wanted, number, after)
            if line is None:
                break
            stranger, owner = what_is_there(hub, whole)
            rows.append(
                (
                    re.sub(r"\b[0-9a-f]{64}\b", "SHA256", re.sub(r"\b[0-9a-f]{40}\b", "COMMIT", line)),
                    "after" if after else "before",
                    stranger,
                    owner,
                )
            )
            assert "PARTIAL" not in owner, rows[-1]
            view = hub.public_view(REPO)
            if view is not None:  # the last request of all: everything is in place
                assert view["files"] == sorted(whole) and view["tags"] and list(view["branches"]) == ["main"]
                assert "settings" in line and after
            received = hub.received()
            finished = client.run(wanted)
            assert finished.code == 0, (rows[-1], finished.err)
            repo = hub.repos[REPO]
            assert on_main(hub) == whole and repo.tags == {"v1": repo.head} and list(repo.branches) == ["main"]
            assert not repo.private
            assert len(repo.lfs) == 3
            # A killed PUT is not carried out; one that ended in parts is begun again. Whole contents never go twice.
            again = hub.received() - (large_bytes(hub, files) - received)
            in_parts = "PUT /lfs/" in line or "/complete" in line
            assert again <= received + (10_240 if in_parts else 0)
        else:
            continue
        break
    if table := os.environ.get("M3QUANT_KILL_TABLE"):
        Path(table).write_text("".join(f"| {' | '.join(row)} |\n" for row in rows))
    verbs = {line.split(REPO)[-1].split("/")[1] if REPO in line else "create" for line, *_ in rows}
    assert {"create", "branch", "commit", "tag", "settings"} <= verbs
    assert len(rows) > 20


def test_killed_while_replacing_main_is_what_it_was_or_whole(hub: Hub, client: Client, files: Path) -> None:
    whole = contents(files)
    former = {"model.safetensors": b"former" * 300, "config.json": b"{}"}
    wanted = job(files, replace=True, group_files=9)
    seen = []
    for number in range(100):
        for after in (False, True):
            hub.repos.clear()
            hub.add(REPO, former | {ATTRIBUTES: b"*"}, large=True, private=True)
            line = kill_at(hub, client, wanted, number, after)
            if line is None:
                assert {"POST", "PUT", "DELETE"} == {line.split()[0] for line in seen}
                return
            seen.append(line)
            merged = "/tag/" in line or "DELETE" in line or ("/commit/main" in line and after)
            assert on_main(hub) == (whole if merged else former), line
            assert client.run(wanted).code == 0
            assert on_main(hub) == whole and list(hub.repos[REPO].branches) == ["main"]
    raise AssertionError("it never came to an end")
