"""Reproductions of reported faults import the generators and doubles by paths outside the package; those stay."""

import subprocess
import sys

import pytest

from tests.support.paths import TESTS

# (folders on the path, what is run)
USES = {
    "generators": (("", "calibration"), "from calibration.tiny import m2_config, m2_tensors, m3_config, m3_tensors, write_checkpoint\nfrom convert.sources import is_linear, to_fp8_block, to_mxfp8"),
    "guard": (("runtime",), "from guard_app import FakeEngine, make_guard, settle, start"),
    "hub": (("publish", ""), "from hub_state import Fault\nexec(open({folder!r} + '/publish/conftest.py').read())\nexec(open({folder!r} + '/publish/test_upload.py').read().split('def test_everything')[0])\njob, hub"),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_the_paths_of_reproductions_hold(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folders, code = USES[name]
    paths = [str(TESTS / folder) for folder in folders]
    program = f"import sys\nsys.path[:0] = {paths!r}\n" + code.format(folder=str(TESTS))
    empty = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run([sys.executable, "-c", program], cwd=empty, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
