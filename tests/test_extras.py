"""The core without torch, and the extras of pyproject.toml: what each brings, and what m3quant says where one is missing."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from m3quant.engines import ENGINES
from m3quant.errors import PackageMissing
from m3quant.extras import EXTRAS, need
from tests.support.paths import FIXTURES, ROOT
from tests.support.publish.outputs import converted, source_like

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = PROJECT["optional-dependencies"]
BASE = ("--base-repo", "MiniMaxAI/MiniMax-M3")
# Nothing of these is in the core.
NOT_CORE = (
    "torch", "transformers", "tokenizers", "safetensors", "compressed_tensors", "datasets", "pyarrow", "ray", "s3fs", "gcsfs", "triton", "vllm",
)  # fmt: skip
# Each line of stdin is a command; each line of stdout what became of it.
DRIVER = f"""
import contextlib, io, json, sys

sys.modules.update(dict.fromkeys({NOT_CORE!r}))  # None: importing it raises ModuleNotFoundError
from m3quant.cli import main
for line in sys.stdin:
    sys.argv = ["m3quant", *json.loads(line)]
    code, out, err = None, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    return converted(source_like(folder / "m3"), folder / "out")


@pytest.fixture(scope="module")
def ran(out: Path) -> dict[str, tuple[int, str, str]]:
    """Commands in one Python without torch: exit code, stdout, stderr of each."""
    m2 = str(FIXTURES / "tiny-m2")
    commands = {
        "plan": ["plan", m2],
        "plan --to": ["plan", m2, "--to", "awq", "--json"],
        "plan --on": ["plan", m2, "--to", "awq", "--on", "2xH200", "--json"],
        "fit": ["fit", m2, "--budget", "9MB", "--json"],
        "card": ["card", str(out), *BASE, "--check"],
        "publish": ["publish", str(out), "org/name", *BASE, "--dry-run", "--json"],
        "serve": ["serve", m2, "--on", "1xH200", "--dry-run", "--no-guard"],
        "verify": ["verify", str(out), "--json"],
        "verify --source": ["verify", str(out), "--source", m2],
        "convert": ["convert", m2, str(out.parent / "never"), "--to", "int4"],
        "eval": ["eval", str(out)],
        "measure": ["fit", m2, "--measure"],
        "s3": ["plan", "s3://models/m2"],
        "gs": ["plan", "gs://models/m2"],
        **{
            f"{name} --help": [name, "--help"] for name in ("plan", "fit", "convert", "verify", "eval", "serve", "pull")
        },
    }
    lines = "".join(json.dumps(command) + "\n" for command in commands.values())
    done = subprocess.run([sys.executable, "-c", DRIVER], input=lines, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, map(tuple, map(json.loads, done.stdout.splitlines())), strict=True))


@pytest.mark.parametrize("name", ["plan", "plan --to", "plan --on", "fit", "card", "publish", "serve", "verify"])
def test_the_core_does_without_torch(name: str, ran: dict[str, tuple[int, str, str]]) -> None:
    code, said, err = ran[name]
    assert code == 0 and said, err
    if name == "verify":
        assert [check["name"] for check in json.loads(said)["checks"]] == ["structure", "hashes", "values"]
        assert "compressed-tensors is not installed" in err
    if name == "publish":
        assert json.loads(said)["bytes"] > 1e6


@pytest.mark.parametrize(
    ("name", "extra"),
    [("convert", "convert"), ("eval", "eval"), ("measure", "convert"), ("verify --source", "convert")],
)
def test_what_needs_torch_says_what_to_install(
    name: str, extra: str, ran: dict[str, tuple[int, str, str]], out: Path
) -> None:
    code, said, err = ran[name]
    assert (code, said) == (2, "") and err.count("\n") == 1
    assert f"pip install 'm3quant[{extra}]'" in err and "torch and transformers" in err
    assert not (out.parent / "never").exists()


@pytest.mark.parametrize(("scheme", "driver"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_an_object_store_says_which_driver_to_install(
    scheme: str, driver: str, ran: dict[str, tuple[int, str, str]]
) -> None:
    code, said, err = ran[scheme]
    assert (code, said) == (2, "") and err.count("\n") == 1
    assert err.endswith(f"{driver}, which this Python does not have: pip install 'm3quant[{scheme}]'.\n"), err


def test_every_help_text_is_to_be_had_without_torch(ran: dict[str, tuple[int, str, str]]) -> None:
    assert [
        name for name, (code, said, _) in ran.items() if "--help" in name and not (code == 0 and "Usage" in said)
    ] == []


def packages(extra: str) -> dict[str, Requirement]:
    """What an extra brings, those that it includes followed."""
    found = {}
    for requirement in map(Requirement, OPTIONAL[extra]):
        if requirement.name == PROJECT["name"]:
            for name in requirement.extras:
                found |= packages(name)
        else:
            found[requirement.name] = requirement
    return found


def test_the_extras_are_what_the_messages_promise() -> None:
    core = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert not core & {"torch", "transformers", "safetensors", "compressed-tensors", "ray", "pyarrow", "datasets"}
    for extra, modules in EXTRAS.items():
        assert set(modules) <= packages(extra).keys(), extra
    everything = set(OPTIONAL) - {"dev", "docs", "all", "serve", "llm-compressor"}
    assert packages("all").keys() == {name for extra in everything for name in packages(extra)}
    assert not {"vllm", "llmcompressor"} & packages("all").keys()
    assert packages("all").keys() <= packages("dev").keys()


def test_the_wheel_has_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    roots = {"m3quant": ROOT / "m3quant"} | {
        f"m3quant.{name}": ROOT / name for name in ("calibration", "runtime", "recipes")
    }
    found = {
        ".".join((package, *path.parent.relative_to(root).parts))
        for package, root in roots.items()
        for path in root.rglob("__init__.py")
    }
    assert found == set(listed)


def test_the_serve_extra_is_the_range_that_the_engine_states() -> None:
    (requirement,) = packages("serve").values()
    (engine,) = [engine for engine in ENGINES if engine.name == requirement.name]
    first, before = engine.can.read
    assert {str(part) for part in requirement.specifier} == {f">={first}", f"<{before}"}


def test_a_package_that_is_there_is_not_asked_for() -> None:
    for extra in EXTRAS:
        need(extra, "this test")
    with pytest.raises(KeyError):
        need("no-such-extra", "this test")


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PackageMissing, match=r"^Reading it needs transformers, which .*m3quant\[eval\]") as refused:
        need("eval", "Reading it")
    assert refused.value.exit_code == 2 and "torch and" not in str(refused.value)
