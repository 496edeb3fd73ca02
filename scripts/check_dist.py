"""What a wheel and an sdist hold: check_dist.py TREE DIST. Exit 1 with a sentence for each fault.

The wheel has to hold every module and data file of the packages, the sdist whatever the wheel was built from, and neither
the tests or their fixtures.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

# package -> its folder; the three links in m3quant/ are these folders under another name
ROOTS = {
    "m3quant": "m3quant",
    "m3quant/calibration": "calibration",
    "m3quant/runtime": "runtime",
    "m3quant/recipes": "recipes",
}
LINKS = {name for name in ROOTS if "/" in name}
LARGEST = 8 * 2**20  # bytes; the bundled texts are most of it, a fixture alone is more
# The bundled texts were made from these; their programs run in the repository.
NOT_PACKAGED = (
    "calibration/data/*.py",
    "calibration/data/*.yaml",
    "calibration/data/dialogues/*",
    "evaluate/data/*.py",
    "evaluate/data/*.yaml",
)


def expected(tree: Path) -> set[str]:
    """The files of the packages in `tree`, as a wheel names them."""
    found = set()
    for package, folder in ROOTS.items():
        for path in (tree / folder).rglob("*"):
            name = f"{package}/{path.relative_to(tree / folder).as_posix()}"
            if (
                not path.is_file()
                or "__pycache__" in path.parts
                or (package == "m3quant" and any(name.startswith(f"{link}/") for link in LINKS))
            ):
                continue
            if not any(fnmatch(name, f"m3quant/{pattern}") for pattern in NOT_PACKAGED):
                found.add(name)
    return found


def faults(tree: Path, dist: Path) -> list[str]:
    wheel, sdist = next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        wheel_names = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        sdist_names = {name.partition("/")[2] for name in archive.getnames()}
    said = [
        f"{wheel.name} lacks {name}: name its package or data in pyproject.toml"
        for name in sorted(expected(tree) - wheel_names)
    ]
    said += [
        f"{wheel.name} holds {name}, which is no file of the packages" for name in sorted(wheel_names - expected(tree))
    ]
    for name in sorted(sdist_names):
        if name.startswith(("tests", ".github", ".ci")):
            said.append(f"{sdist.name} holds {name}: prune it in MANIFEST.in")
    for path in (wheel, sdist):
        if path.stat().st_size > LARGEST:
            said.append(f"{path.name} has {path.stat().st_size:,} bytes, more than {LARGEST:,}")
    return said


if __name__ == "__main__":
    found = faults(Path(sys.argv[1]), Path(sys.argv[2]))
    print(
        "\n".join(found) or "wheel and sdist hold the packages, and nothing of the tests",
        file=sys.stderr if found else sys.stdout,
    )
    sys.exit(bool(found))
