"""Which tests run on one worker, one after the other: those of a file, so that what they share is made once."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

# Files that share more than a module's fixtures: one Ray cluster, or one engine at a time whose load is measured.
TOGETHER = {"*/test_ray*.py": "ray", "tests/engine/test_guard*.py": "guard"}
# Long tests that share next to nothing: each goes where there is room.
APART = (
    "tests/engine/test_[!g]*.py",
    "tests/convert/test_kill.py",
    "tests/convert/test_disk_full.py",
    "tests/hub/test_paths_from_hub.py",
)


# Begun first, the longest first, so that no worker ends long before the other.
FIRST = (
    "ray",
    "guard",
    "tests/hub/test_convert_from_hub.py",
    "tests/publish/test_convert_publish.py",
    "tests/hub/test_read_from_hub.py",
    "tests/calibration/test_kernels.py",
    "tests/calibration/test_joined_windows.py",
    "tests/convert/test_fixture_quality.py",
    "tests/runtime/test_guard_ledger.py",
    "tests/convert/test_kill.py::*killed*",
)


class Files(LoadScopeScheduling):
    """As `--dist loadfile` but for what is said above. Marks (xdist_group) are no way: xdist 3.8 loses them from pytest 9.2 on."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if any(fnmatch(file, pattern) for pattern in APART):
            return nodeid
        return next((group for pattern, group in TOGETHER.items() if fnmatch(file, pattern)), file)

    def _assign_work_unit(self, node: WorkerController) -> None:
        first = [scope for pattern in FIRST for scope in self.workqueue if fnmatch(scope, pattern)]
        if first:
            self.workqueue.move_to_end(first[0], last=False)
        super()._assign_work_unit(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Files | None:
    return Files(config, log) if config.getvalue("dist") == "loadgroup" else None
