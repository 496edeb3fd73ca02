"""The Dockerfile, the compose file and the systemd unit, read as those who run them read them. Nothing here is built or started."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from m3quant.engines import DEFAULT as VLLM
from m3quant.engines.vllm import NEWEST_READ
from m3quant.runtime import compose
from m3quant.runtime.compose import IN_IMAGE, compose_file
from m3quant.runtime.draft import open_draft
from m3quant.runtime.fit import Ask, Fit, assess
from m3quant.runtime.hardware import parse_node
from m3quant.runtime.model import open_subject
from m3quant.runtime.serve_recipe import ServeRecipe
from m3quant.runtime.units import systemd_unit
from tests.support.dockerfile import IMAGE, copied, in_context, stages
from tests.support.paths import FIXTURES, ROOT
from tests.support.tiny_draft import write_eagle3

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
# Keys of a service that compose's specification has, in so far as ours may use them, with the type of their values.
SERVICE: dict[str, type | tuple[type, ...]] = {
    "build": dict, "image": str, "command": list, "environment": dict, "volumes": list, "ports": list, "ipc": str,
    "stop_grace_period": str, "restart": str, "deploy": dict, "healthcheck": dict,
}  # fmt: skip
DURATION = re.compile(r"\d+(ms|s|m|h)")


@pytest.fixture(scope="module")
def fit() -> Fit:
    return assess(open_subject(str(FIXTURES / "tiny-m2")).stored, parse_node("2xH100"), Ask())


# --- the Dockerfile ---


def test_the_base_is_the_newest_vllm_that_was_read() -> None:
    *_, last = stages(DOCKERFILE).values()
    assert last[0] == ("FROM", VLLM.image(None)) and f":v{NEWEST_READ}" in last[0][1]
    assert last[-1] == ("ENTRYPOINT", '["vllm", "serve"]')  # what the arguments of a compose file follow
    assert ("ENV", f"PYTHONPATH={IN_IMAGE}") in last
    with pytest.raises(ValueError, match="no image with a tag"):
        stages(DOCKERFILE, {"BASE": "vllm/vllm-openai:v0.32.0+cpu"})


def test_what_is_copied_is_enough_for_the_package(tmp_path: Path) -> None:
    """The build runs pip on the copy; here it is imported from there, and every packaged folder is looked for."""
    found = stages(DOCKERFILE)
    allowed = in_context(ROOT / ".dockerignore")
    for origin, sources, target in [part for stage in found.values() for part in copied(stage)]:
        if origin is not None:
            assert f"--target {sources[0]} ." in dict(found[origin])["RUN"]
            continue
        for source in sources:
            assert source in allowed and (ROOT / source).exists(), source
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            there = tmp_path / (source if target == "./" else target)
            extra: dict[str, Any] = {"symlinks": True, "ignore": shutil.ignore_patterns("__pycache__")} if copy is shutil.copytree else {}  # fmt: skip
            copy(ROOT / source, there, **extra)
    code = (
        "import tomllib, m3quant, m3quant.runtime.guard, pathlib\n"
        "tools = tomllib.loads(pathlib.Path('pyproject.toml').read_text())['tool']['setuptools']\n"
        "for name in tools['packages']:\n"
        "    top = max((known for known in tools['package-dir'] if f'{name}.'.startswith(f'{known}.')), key=len)\n"
        "    rest = name.removeprefix(top).strip('.').replace('.', '/')\n"
        "    assert (pathlib.Path(tools['package-dir'][top]) / rest / '__init__.py').is_file(), name\n"
        "print(m3quant.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(str(tmp_path)), done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "COPY a b",
        "FROM x:1\nCOYP a b",
        "FROM x",
        "FROM x:1+cpu",
        "FROM ${A}",
        "FROM x:1\nENTRYPOINT [1]",
        "FROM x:1\nRUN",
    ],
)
def test_a_file_that_does_not_build_is_found(text: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        stages(text)


# --- compose ---


def service_of(text: str) -> dict[str, Any]:
    """The one service, checked against the specification's types."""
    document = yaml.safe_load(text)
    assert document.keys() == {"services"}
    (service,) = document["services"].values()
    for key, value in service.items():
        assert isinstance(value, SERVICE[key]), key
    assert ("build" in service) != ("image" in service)
    if "build" in service:
        assert (
            service["build"].keys() == {"context", "args"}
            and (Path(service["build"]["context"]) / "Dockerfile").is_file()
        )
    assert IMAGE.fullmatch(service.get("image") or service["build"]["args"]["BASE"])
    for volume in service["volumes"]:
        if isinstance(volume, dict):
            assert volume.keys() == {"type", "source", "target", "read_only"} and volume["type"] == "bind"
            assert volume["read_only"] is True and volume["target"].startswith("/") and volume["source"].startswith("/")
        else:
            assert re.fullmatch(r"\$\{HF_HOME:-~/\.cache/huggingface\}:/root/\.cache/huggingface", volume)
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in service["ports"])
    assert all(isinstance(value, str) for value in service["environment"].values())
    assert all(isinstance(part, str) for part in service["command"])
    checks = service["healthcheck"]
    assert checks.keys() == {"test", "interval", "timeout", "start_period"}
    for duration in (service["stop_grace_period"], *(checks[key] for key in checks if key != "test")):
        assert DURATION.fullmatch(duration)
    return dict(service)


def write(fit: Fit, image: str = "vllm/vllm-openai:v0.33.0", env: dict[str, str] | None = None) -> dict[str, Any]:
    command = [fit.model.where, "--host", "0.0.0.0", "--port", "8000"]
    return service_of(compose_file(command, env or {}, frozenset({"KEY"}), fit, ServeRecipe(), image, "MY_KEY"))


def test_a_compose_file_builds_from_the_checkout(fit: Fit) -> None:
    service = write(fit, env={"KEY": "secret", "V": "1$2"})
    assert service["build"] == {"context": str(ROOT), "args": {"BASE": "vllm/vllm-openai:v0.33.0"}}
    assert service["environment"] == {"PYTHONPATH": IN_IMAGE, "KEY": "${MY_KEY:?}", "V": "1$$2"}
    (volume,) = service["volumes"]
    assert volume["source"] == volume["target"] == service["command"][0] == fit.model.where
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 2


def test_without_a_checkout_the_installed_package_is_mounted(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose.m3quant, "__path__", [str(tmp_path / "m3quant")])
    service = write(fit)
    assert service["image"] == "vllm/vllm-openai:v0.33.0"
    assert service["volumes"][0]["source"] == str(tmp_path / "m3quant")
    assert service["volumes"][0]["target"] == f"{IN_IMAGE}/m3quant"


def test_a_model_on_the_hub_mounts_its_cache(fit: Fit) -> None:
    service = write(replace(fit, model=replace(fit.model, where="org/name")))
    assert service["command"][0] == "org/name" and [type(volume) for volume in service["volumes"]] == [str]


def test_a_drafts_folder_is_mounted_too(fit: Fit, tmp_path: Path) -> None:
    draft = open_draft(str(write_eagle3(tmp_path / "draft")), fit.model.family)
    volumes = write(replace(fit, setup=replace(fit.setup, draft=draft)))["volumes"]
    assert [volume["target"] for volume in volumes] == [fit.model.where, draft.where]
    online = replace(draft, where="org/draft", revision="a" * 40)
    assert isinstance(write(replace(fit, setup=replace(fit.setup, draft=online)))["volumes"][-1], str)


@pytest.mark.parametrize(
    ("release", "image"),
    [
        (None, f"vllm/vllm-openai:v{NEWEST_READ}"), ("0.32.0+cpu", "vllm/vllm-openai:v0.32.0"), ("0.33.0+cu130", "vllm/vllm-openai:v0.33.0"),
        ("0.33.1rc1", "vllm/vllm-openai:v0.33.1rc1"), ("0.33.1.dev12+gabc", None), ("unknown", None),
    ],
)  # fmt: skip
def test_a_tag_is_one_that_a_registry_takes(release: str | None, image: str | None) -> None:
    assert VLLM.image(release) == image and (image is None or IMAGE.fullmatch(image))


# --- systemd ---


def unit_of(text: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(
        strict=True, delimiters="=", comment_prefixes="#", empty_lines_in_values=False
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # directives are case-sensitive
    parser.read_string(text)
    return parser


def test_a_unit_is_what_systemd_reads(fit: Fit, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "m3quant", "serve", "/models/a b$c%d", "--served-name", 'it\'s "x"\\y']
    text = systemd_unit(
        program, fit, ServeRecipe(shutdown_timeout=30), "KEY", {"M3QUANT_ENGINE_PYTHON": "/opt/an engine/python"}
    )
    unit = unit_of(text)
    assert unit.sections() == ["Unit", "Service", "Install"]
    service = unit["Service"]
    quoted = '"/models/a b$$c%%d" --served-name "it\'s \\"x\\"\\\\y"'
    assert service["ExecStart"] == f"{sys.executable} -m m3quant serve {quoted}"
    assert service["Environment"] == '"M3QUANT_ENGINE_PYTHON=/opt/an engine/python"'
    assert service["EnvironmentFile"] == "/etc/m3quant/serve.env" and Path(service["WorkingDirectory"]).is_absolute()
    assert int(service["TimeoutStopSec"]) > 30 and service["RestartPreventExitStatus"] == "2 3"
    if shutil.which("systemd-analyze"):
        path = tmp_path / "m3quant.service"
        path.write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", "--recursive-errors=no", str(path)], capture_output=True, text=True, timeout=60)  # fmt: skip
        assert "m3quant.service" not in done.stderr, done.stderr
