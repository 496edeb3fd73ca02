"""Checks the settings in the environment before an engine is loaded: `python -m m3quant.runtime.guard`."""

from __future__ import annotations

import sys

from m3quant.errors import GuardError

from .settings import read_settings


def main() -> int:
    try:
        print(read_settings().model_dump_json(indent=1))
    except GuardError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
