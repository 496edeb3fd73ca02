"""This package under its own name for programs that put the folder itself on their path; see test_outside_paths.py."""

from pathlib import Path

__path__ = [str(Path(__file__).parent)]
