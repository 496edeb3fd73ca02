"""One line on a licence before money is spent: from its text, from what is recorded of a repo, and never assumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from m3quant.publish.licence_line import licence_line
from m3quant.publish.licences import data
from tests.support.cli.shell import Shell
from tests.support.paths import DATA, FIXTURES
from tests.support.publish.outputs import TEXTS

M27 = TEXTS["MiniMaxAI/MiniMax-M2.7"]


@pytest.mark.parametrize(
    ("root", "key", "told"),
    [
        ("MiniMaxAI/MiniMax-M2.7", "minimax-m2.7-non-commercial", "a hosted service for a fee among it"),
        ("MiniMaxAI/MiniMax-M3@main", "minimax-community", "US$20 million a year"),
        ("MiniMaxAI/MiniMax-M2.5", None, "by the revision of"),
        ("somebody/MiniMax-M3-mirror", None, "not known of somebody/MiniMax-M3-mirror"),
    ],
)
def test_of_a_repo_what_is_recorded_and_nothing_of_others(root: str, key: str | None, told: str) -> None:
    line = licence_line(root, "minimax_m3_vl")
    assert line.key == key and told in line.text and "\n" not in line.text
    assert line.non_commercial is (None if key is None else True)


def test_a_config_alone_tells_no_licence_but_what_to_look_for() -> None:
    line = licence_line(str(DATA / "minimax-m2.7" / "config.json"), "minimax_m2")
    assert line.key is None and "a config.json does not state it" in line.text
    assert "MiniMaxAI/MiniMax-M2.7 restricts commercial use" in line.text


def test_the_text_in_a_folder_decides(tmp_path: Path) -> None:
    assert "holds no licence file" in licence_line(str(tmp_path), "minimax_m2").text
    (tmp_path / "LICENSE").write_text("Do as you like.")
    assert "does not know" in licence_line(str(tmp_path), "minimax_m2").text
    (tmp_path / "LICENSE").write_text(M27)
    assert licence_line(str(tmp_path), "minimax_m2").non_commercial is True
    (tmp_path / "LICENSE").unlink()
    (tmp_path / "LICENSE").symlink_to("/etc/hostname")
    assert licence_line(str(tmp_path), "minimax_m2").text.startswith("licence: not read")


def test_every_licence_has_its_line() -> None:
    for key, entry in data()["licences"].items():
        assert entry["summary"].format(display="X") and "\n" not in entry["summary"], key
        assert ("commercial" in entry["summary"]) or not entry["non_commercial"]


def test_plan_convert_and_serve_say_it(shell: Shell, tmp_path: Path) -> None:
    source = tmp_path / "m2"
    shutil.copytree(FIXTURES / "tiny-m2", source)
    for file in source.glob("LICEN[CS]E*"):
        file.unlink()
    (source / "LICENSE").write_text(M27)
    told = "licence: MiniMax M2.7 non-commercial licence (LICENSE): non-commercial use only"
    assert told in shell("plan", source, "--to", "int4").out and told in shell("plan", source).out
    done = shell("convert", source, tmp_path / "out", "--to", "int4", "--device", "cpu", "--json", "--quiet")
    assert told in done.err and done.json["licence"]["non_commercial"] is True
    assert told in shell("serve", source, "--on", "1xH200", "--dry-run").err
