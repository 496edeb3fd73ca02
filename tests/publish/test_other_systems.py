"""On a Mac, and on Windows, which lack some of Linux's calls: planning, cards, publishing and pulling work as here."""

from pathlib import Path
from typing import Any

import pytest

from tests.publish.test_publish_cli import BASE, IMPORTED_ONCE, REPO, hub_with_base, out
from tests.publish.test_pull import NEEDED, checkpoint, pull, pulled
from tests.support.other_system import LACKS
from tests.support.paths import DATA, FIXTURES
from tests.support.publish.client import Client
from tests.support.publish.hub_state import Hub

__all__ = ["IMPORTED_ONCE", "hub_with_base", "out"]


@pytest.fixture(params=LACKS)
def system(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def on(system: str, *arguments: object) -> dict[str, Any]:
    return {"cli": [str(argument) for argument in arguments], "system": system}


def test_plans(client: Client, system: str) -> None:
    for source in (DATA / "minimax-m3" / "config.json", FIXTURES / "tiny-m2"):
        done = client.run(on(system, "plan", source, "--to", "awq"))
        assert done.code == 0 and "output: " in done.out, done.err


def test_cards_and_publishes(hub_with_base: Hub, client: Client, out: Path, system: str) -> None:
    for arguments in (
        ["card", out, "--base-repo", BASE, "--check"],
        ["publish", out, REPO, "--base-repo", BASE, "--yes"],
    ):
        done = client.run(on(system, *arguments))
        assert done.code == 0, done.err
    assert set(hub_with_base.repos) == {BASE, REPO}


def test_pulls(hub: Hub, client: Client, tmp_path: Path, system: str) -> None:
    files = checkpoint()
    hub.add("org/some", files, large=True)
    done = client.run(pull("org/some", tmp_path / "here") | {"system": system}, token=None)
    assert done.code == 0, done.err
    assert pulled(tmp_path / "here") == {name: files[name] for name in NEEDED}


def test_converts_on_a_mac_and_says_on_windows_why_not(client: Client, tmp_path: Path, system: str) -> None:
    done = client.run(on(system, "convert", FIXTURES / "tiny-m2", tmp_path / "out", "--to", "int4", "--device", "cpu"))
    if system == "macos":
        assert done.code == 0 and (tmp_path / "out" / "m3quant.json").exists(), done.err
    else:
        assert done.code == 2 and "no file locks" in done.err and "WSL" in done.err
