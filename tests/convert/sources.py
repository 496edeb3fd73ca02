"""Stored forms of a source, by the path at which scripts that reproduce a reported fault import them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.convert.sources import *  # noqa: F403
