from pathlib import Path

import pytest

from tests.support.cli.shell import Shell
from tests.support.convert.common import run_convert
from tests.support.paths import FIXTURES


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.delenv("M3QUANT_ENGINE_PYTHON", raising=False)
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An INT4 output of each trained fixture. Not to be written to."""
    folder = tmp_path_factory.mktemp("outputs")
    for family in ("m2", "m3"):
        run_convert(FIXTURES / f"tiny-{family}", folder / family, "int4")
    return {family: folder / family for family in ("m2", "m3")}
