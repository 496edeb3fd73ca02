"""Where the repository and what tests read of it lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
FIXTURES = TESTS / "fixtures"  # the two trained models and their texts
DATA = TESTS / "data"  # released configs and public logs
