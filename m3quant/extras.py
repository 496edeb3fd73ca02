"""What of m3quant needs packages beyond its core, and the sentence that says how to get them. Imports none of them.

The core plans, writes cards, publishes, pulls and starts servers. Everything that touches a weight needs torch.
The packages of each extra stand in pyproject.toml; tests/test_extras.py holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from .errors import PackageMissing

# extra -> the modules that must be importable; Ray, pyarrow and datasets are asked for where a run first names them
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "convert": ("torch", "transformers"),
    "eval": ("torch", "transformers"),
    "gs": ("gcsfs",),
    "s3": ("s3fs",),
}


def installed(module: str) -> bool:
    """Whether `module` can be imported, without importing it."""
    return find_spec(module) is not None


def need(extra: str, what: str) -> None:
    """Raise PackageMissing, with the command that installs the extra, unless all its modules are there.

    what: the command or function that needs it, as the subject of the sentence.
    """
    missing = [module for module in EXTRAS[extra] if not installed(module)]
    if missing:
        hint = " (for a GPU, install torch for its CUDA version first)" if "torch" in missing else ""
        raise PackageMissing(
            f"{what} needs {' and '.join(missing)}, which this Python does not have: pip install 'm3quant[{extra}]'{hint}."
        )
