"""The command line in this process: exit code and both streams, as a shell sees them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest

from m3quant.cli import main


@dataclass(frozen=True)
class Ran:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as strict JSON: NaN and Infinity, which Python writes and other programs cannot read, are refused."""
        return json.loads(self.out, parse_constant=_refuse)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


@dataclass(frozen=True)
class Shell:
    """Runs m3quant. Anything but an orderly exit, such as a traceback, passes through and fails the test."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object) -> Ran:
        self.monkeypatch.setattr(sys, "argv", ["m3quant", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        read = self.capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Ran(code, read.out, read.err)

    def refuses(self, *arguments: object, code: int = 2) -> str:
        """Runs a command that must end with `code` and one sentence of m3quant, or click's usage lines. Returns what it said."""
        done = self(*arguments)
        assert done.code == code, (arguments, done)
        assert done.out == "" or done.json is not None
        lines = done.err.strip().splitlines()
        assert lines and (lines[-1].startswith(("m3quant: ", "Error: "))), done.err
        assert "[Errno" not in done.err and "codec" not in done.err, done.err
        return lines[-1]
