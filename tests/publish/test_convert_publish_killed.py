"""kill -9 while shards are converted, uploaded and dropped: a sample; `python -m tests.support.publish.kill_convert` has fifty."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.publish.client import Client
from tests.support.publish.converting import IMPORTED, hub_with, small_source
from tests.support.publish.hub_state import Hub
from tests.support.publish.kill_convert import Killer, Point, spread

IMPORTED_ONCE = IMPORTED


@pytest.fixture
def killer(hub: Hub, client: Client, tmp_path: Path) -> Iterator[Killer]:
    source = small_source(tmp_path / "source", layers=3)
    with hub_with(hub, source):
        yield Killer(hub, client, source, tmp_path, "awq")


def test_killed_anywhere_both_sides_continue_to_the_same_bytes(killer: Killer) -> None:
    """While the last record of what was dropped is written, after a shard's commit on the branch, before the commit on main."""
    commits = [n for n, line in enumerate(killer.changes) if "/commit/" in line]
    last = max(n for n, name in enumerate(killer.operations) if name == "replace")
    points = [
        Point(operation=last + 1),
        Point(change=commits[1], after=True),
        Point(change=commits[-1]),
    ]
    found = [killer.at(point) for point in points]
    assert [seen.problems for seen in found] == [[], [], []], found
    assert not [seen for seen in found if "not reached" in seen.where]
    assert {seen.stranger for seen in found} == {"nothing"}
    assert "main empty, 2 files on the branch" in found[1].owner and "commit/main" in found[2].where


def test_points_lie_over_the_whole_run() -> None:
    assert list(spread(100, 4)) == [12, 37, 62, 87] and list(spread(2, 5)) == [0, 1]
