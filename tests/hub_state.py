"""The Hub on localhost, by the path at which scripts that reproduce a reported fault import them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.publish.hub_state import *  # noqa: F403
