"""What pyproject.toml packages, and the hook that checks commit subjects."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

from .support.paths import ROOT

SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
FOLDERS = SETUPTOOLS["package-dir"]


def folder(package: str) -> Path:
    """Where a package's files are: the longest name that package-dir maps, and the rest as folders."""
    name = max((known for known in FOLDERS if f"{package}.".startswith(f"{known}.")), key=len)
    return ROOT.joinpath(FOLDERS[name], *package.removeprefix(name).strip(".").split("."))


def test_every_folder_of_modules_is_packaged() -> None:
    there = {
        path.parent
        for top in ("m3quant", "calibration", "runtime", "recipes")
        for path in (ROOT / top).rglob("__init__.py")
    }
    links = {ROOT / "m3quant" / name for name in ("calibration", "runtime", "recipes")}
    there = {path for path in there if not links & {path, *path.parents}}
    assert {folder(name) for name in SETUPTOOLS["packages"]} == there


def test_every_pattern_of_package_data_finds_a_file() -> None:
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            assert list(folder(package).glob(pattern)), f"{package}: {pattern}"


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ("Plan: a subject\n\nAnd a body.\n", ""),
        ("# a comment of git\nPlan: a subject\n", ""),
        ("x" * 72, ""),
        ("x" * 73, "73 characters"),
        ("\n\nbody", "0 characters"),
        ("Ends with a stop.", "full stop"),
        ("Subject\nbody", "second line empty"),
    ],
)
def test_the_commit_hook_checks_the_subject(message: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "message").write_text(message, encoding="utf-8")
    done = subprocess.run(
        [ROOT / "scripts" / "check_commit_subject.sh", tmp_path / "message"], capture_output=True, text=True
    )
    assert done.returncode == bool(complaint) and complaint in done.stderr
