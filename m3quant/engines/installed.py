"""The installed engine: its place, version and flags.

Nothing of the engine is imported, neither here nor in its own Python: flags are read from its argument files, because importing
vLLM takes ten seconds and touches the GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import EngineMissing

ENGINE_PYTHON = "M3QUANT_ENGINE_PYTHON"
# A folder called vllm or m3quant in the working directory must not be imported in place of the installed one.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
PROBE = r"""
import importlib.metadata, importlib.util, json, pathlib, re, sys
package, globs = sys.argv[1], sys.argv[2:]
spec = importlib.util.find_spec(package)
if spec is None:
    print(json.dumps({"found": False})); sys.exit(0)
root = pathlib.Path(spec.origin).parent
names = set()
for file in [file for glob in globs for file in root.glob(glob)]:
    if file.is_file():
        text = file.read_text(encoding="utf-8", errors="replace")
        names |= set(re.findall(r'"--([a-z][a-z0-9-]+)"', text))
        names |= {n.replace("_", "-") for n in re.findall(r"^    ([a-z][a-z0-9_]+)\s*:", text, re.M)}
guard = importlib.util.find_spec("m3quant") is not None and importlib.util.find_spec("m3quant.runtime") is not None
versions = []
for dist in importlib.metadata.distributions():
    if (dist.metadata["Name"] or "").lower() in (package, package + "-cpu"):
        versions.append(dist.version)
print(json.dumps({"found": True, "versions": versions, "flags": sorted(names), "m3quant": guard}))
"""


@dataclass(frozen=True)
class Installed:
    """An engine that is installed. flags: names without the dashes; has_m3quant: its Python can import m3quant.runtime."""

    name: str
    python: str
    version: str
    flags: frozenset[str]
    has_m3quant: bool

    @property
    def is_cpu(self) -> bool:
        return "cpu" in self.version

    def takes(self, flag: str) -> bool:
        return flag.removeprefix("--") in self.flags


def how_to_get(package: str) -> str:
    return f"install {package} in m3quant's environment, or name the Python of an environment that has it with --engine-python or {ENGINE_PYTHON}"


def find_python(package: str, title: str, explicit: str | None = None) -> str:
    """The Python that has the engine's package: `explicit`, else the variable M3QUANT_ENGINE_PYTHON, else this one. Raises EngineMissing."""
    asked = explicit or os.environ.get(ENGINE_PYTHON)
    if not asked:
        if importlib.util.find_spec(package) is None:
            raise EngineMissing(f"{title} is not installed for {sys.executable}: {how_to_get(package)}.")
        return sys.executable
    where = "--engine-python" if explicit else ENGINE_PYTHON
    check = "import importlib.util, sys; sys.exit(0 if importlib.util.find_spec(sys.argv[1]) else 3)"
    try:
        code = subprocess.run([asked, "-c", check, package], capture_output=True, timeout=120).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        why = error.strerror if isinstance(error, OSError) else "it did not answer within 120 s"
        raise EngineMissing(f"{where} names {asked}, which does not run ({why}): {how_to_get(package)}.") from None
    if code != 0:
        raise EngineMissing(f"{where} names {asked}, which has no {package}: {how_to_get(package)}.")
    return asked


def read_installed(package: str, argument_files: Sequence[str], python: str) -> Installed:
    """The engine's package in that Python. argument_files: globs of the files of it that hold flags. Raises EngineMissing."""
    try:
        done = subprocess.run(
            [python, "-c", PROBE, package, *argument_files],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **SAFE_PATH},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineMissing(f"the Python {python} does not run ({error}): name another with --engine-python.") from None
    if done.returncode != 0:
        raise EngineMissing(f"the Python {python} cannot say what it has installed: {last_line(done.stderr)}")
    found = json.loads(done.stdout)
    if not found["found"]:
        raise EngineMissing(
            f"{python} has no {package}: install it there, or name the Python that has it with --engine-python."
        )
    versions: list[str] = sorted(found["versions"], key=lambda v: "cpu" not in v)
    return Installed(
        package, python, versions[0] if versions else "unknown", frozenset(found["flags"]), found["m3quant"]
    )


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
