"""What conftest.py says of the order and the place of tests is of tests that there are, and the workers keep to it."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest

from tests.conftest import APART, FIRST, TOGETHER
from tests.support.paths import ROOT

SEEN: list[int] = []


@pytest.mark.parametrize("pattern", [*TOGETHER, *APART, *FIRST])
def test_every_pattern_is_of_a_file_or_a_group(pattern: str) -> None:
    files = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")]
    assert pattern in TOGETHER.values() or any(fnmatch(file, pattern.partition("::")[0]) for file in files)


@pytest.mark.parametrize("number", range(4))
def test_the_tests_of_a_file_run_in_one_process(number: int, pytestconfig: pytest.Config) -> None:
    if hasattr(pytestconfig, "workerinput") and not pytestconfig.getoption("loadgroup"):
        pytest.skip("several workers and another --dist than the Makefile's")
    SEEN.append(number)
    assert list(range(number + 1)) == SEEN
