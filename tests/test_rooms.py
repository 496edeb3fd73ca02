"""How the packages depend on one another: no circle, no torch below the numbers, and an engine's name only where it belongs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from m3quant.engines import DEFAULT, ENGINES

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "m3quant": ROOT / "m3quant",
    "m3quant.calibration": ROOT / "calibration",
    "m3quant.runtime": ROOT / "runtime",
}
TORCH_FREE = ("checkpoint", "engines", "families", "planning", "recipe", "runtime")
NAMES = {word for engine in ENGINES for word in (engine.name, engine.title)}


@cache
def sources() -> dict[str, tuple[Path, bool]]:
    """Module -> its file, and whether it is a package."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            found[".".join((package, *(parts[:-1] if is_package else parts)))] = (path, is_package)
    return found


def imports(module: str, tree: ast.AST, is_package: bool, known: Mapping[str, object]) -> Iterator[str]:
    """The modules of `known` that `module` imports, at its top or inside a function."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".") if is_package else module.split(".")[:-1]
            base = above[: len(above) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name:
                yield name


def room(module: str) -> str:
    """The package under m3quant that a module lies in, or the loose module itself."""
    return ".".join(module.split(".")[:2])


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def engine_words(tree: ast.AST) -> Iterator[int]:
    """Lines of string literals that are the name of an engine: what a comparison, a choice or a dictionary by engine needs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in NAMES:
            yield node.lineno


@cache
def package_imports() -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for module, (path, is_package) in sources().items():
        for name in imports(module, ast.parse(path.read_text(encoding="utf-8")), is_package, sources()):
            if room(name) != room(module):
                edges.setdefault(room(module), set()).add(room(name))
    return edges


def test_no_import_circle_between_packages() -> None:
    edges = package_imports()
    assert len(edges) > 10
    assert circle(edges) == []
    below = TopologicalSorter({name: edges.get(name, set()) for name in edges}).static_order()
    order = list(below)
    assert order.index("m3quant.engines") < order.index("m3quant.planning") < order.index("m3quant.runtime")


def test_the_picture_of_the_packages_is_right() -> None:
    """ARCHITECTURE.md draws every import between packages that no chain of others implies."""
    packages = {room(module) for module, (_, is_package) in sources().items() if is_package} - {"m3quant"}
    edges = {name: package_imports().get(name, set()) & packages for name in packages}
    below: dict[str, set[str]] = {}
    for name in TopologicalSorter(edges).static_order():
        below[name] = edges[name].union(*(below[other] for other in edges[name]))
    needed = {
        (name, other)
        for name, others in edges.items()
        for other in others
        if not any(other in below[between] for between in others - {other})
    }
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    picture = page.partition("flowchart TD")[2].partition("```")[0]
    arrows = re.findall(r"^ +(\w+)(?:\[[^\]]*\])? --> ([\w &]+)", picture, re.M)
    drawn = {(f"m3quant.{name}", f"m3quant.{other}") for name, others in arrows for other in others.split(" & ")}
    assert not needed - drawn, f"ARCHITECTURE.md lacks {sorted(needed - drawn)}"
    assert not drawn - needed, (
        f"ARCHITECTURE.md draws what no import, or a chain of others, says: {sorted(drawn - needed)}"
    )


def test_a_circle_is_found() -> None:
    known = dict.fromkeys(["m3quant.a.x", "m3quant.b", "m3quant.b.y"])
    lazy = "def f():\n    from ..b import y\n"
    assert list(imports("m3quant.a.x", ast.parse(lazy), False, known)) == ["m3quant.b.y"]
    assert list(imports("m3quant.b", ast.parse("from .y import name\nimport os"), True, known)) == ["m3quant.b.y"]
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


def test_no_module_outside_the_engines_names_one() -> None:
    """Families say what is particular to them in an engine; the guard runs inside vLLM and reads vLLM's own settings."""
    named = [
        f"{path.relative_to(ROOT)}:{line}"
        for module, (path, _) in sources().items()
        if room(module) not in ("m3quant.engines", "m3quant.families")
        and not module.startswith("m3quant.runtime.guard")
        for line in engine_words(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert named == []


def test_families_name_engines_as_keys_alone() -> None:
    for module, (path, _) in sources().items():
        if room(module) == "m3quant.families":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            keys = {key.lineno for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys if key}
            assert set(engine_words(tree)) <= keys, path


def test_only_the_registry_imports_an_engine() -> None:
    own = tuple(f"m3quant.engines.{engine.name}" for engine in ENGINES)
    for module, (path, is_package) in sources().items():
        found = set(imports(module, ast.parse(path.read_text(encoding="utf-8")), is_package, sources()))
        if room(module) != "m3quant.engines":
            assert not [name for name in found if name.startswith(own)], module


@pytest.mark.parametrize(
    "text",
    ['engine == "vllm"', 'engine.name in ("sglang",)', 'FLAGS = {"vllm": 1}', 'flags.get("sglang")', 'Literal["vllm"]',
     'match engine:\n    case "vllm":\n        pass', 'title != "SGLang"'],
)  # fmt: skip
def test_every_way_to_ask_for_an_engine_by_name_is_found(text: str) -> None:
    assert list(engine_words(ast.parse(text)))
    assert not list(engine_words(ast.parse('raise ValueError("vLLM has no such flag")')))


def test_what_plans_and_serves_imports_no_torch() -> None:
    modules = [name for name in sources() if room(name).removeprefix("m3quant.") in TORCH_FREE]
    assert len(modules) > 60
    code = (
        "import importlib, sys\n"
        "for name in ('torch', 'transformers', 'vllm', 'sglang'): sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_engine_is_whole() -> None:
    for engine in ENGINES:
        assert engine.plain_command("org/model")[-1] == "org/model"
        assert engine.command_for([*engine.plain_command("folder"), "--flag"], "org/model")[-2:] == [
            "org/model",
            "--flag",
        ]
        with pytest.raises(ValueError, match=r"no .* command"):
            engine.command_for(["python", "-c", "pass"], "org/model")
        assert engine.reason("hello\nValueError: the reason") == "its last word was: ValueError: the reason"
        assert engine.reason("OSError: [Errno 98] Address already in use").startswith("the port is in use")
        assert engine.probe is None or engine.probe.script.is_file()
    assert (
        DEFAULT.log is not None and DEFAULT.probe is not None and DEFAULT.has_guard
    )  # what plan, verify and serve count on
