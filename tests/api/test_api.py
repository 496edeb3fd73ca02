"""The Python API: the notebook runs, nothing is loaded before it is used, and wrong options are refused before work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import m3quant.api
from m3quant.api import convert, evaluate, fit, plan, verify
from m3quant.errors import CheckpointError, EvaluationError, M3QuantError, OptionError, PlanError, RecipeError
from m3quant.running.progress import Silent, quietly
from tests.support.convert.common import add_tokenizer, make_source
from tests.support.paths import DATA, FIXTURES, ROOT

TINY_M2 = FIXTURES / "tiny-m2"


def test_a_place_that_is_none_is_refused_in_words(tmp_path: Path) -> None:
    nowhere: Any = None
    for call in (
        lambda: plan(nowhere),
        lambda: fit(nowhere),
        lambda: convert(nowhere, tmp_path / "out"),
        lambda: convert(TINY_M2, nowhere),
        lambda: verify(nowhere),
        lambda: evaluate(nowhere),
        lambda: evaluate(""),
    ):
        with pytest.raises(OptionError, match="names no checkpoint: give a folder"):
            call()
    with pytest.raises(OptionError, match="--spill keeps the hidden states of a calibration on the disk, and int4"):
        convert(TINY_M2, tmp_path / "out", "int4", spill=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ("windows must be a whole number of at least 1 (got 'x').", {"windows": "x"}),
        ("calibration_tokens must be a whole number of at least 1 (got true).", {"calibration_tokens": True}),
        ("calibration must be a list of texts (got [3]).", {"calibration": [3]}),
        ("settings must be a list of texts (got 'a=b').", {"settings": "a=b"}),
        ("to must be text (got 3).", {"to": 3}),
        ("recipe must be a file or folder, as text or Path (got 3).", {"recipe": 3}),
        ('budget must be bytes, or a size as text ("60GB") (got []).', {"budget": []}),
        ("serving has an unknown key 'x': known are context, ", {"node": "1xH200", "serving": {"x": 1}}),
        (
            "serving key 'release' must be a version (\"0.33.0\") (got 'newest').",
            {"node": "1xH200", "serving": {"release": "newest"}},
        ),
        ("serving key 'context' must be a whole number (got 'x').", {"node": "1xH200", "serving": {"context": "x"}}),
        ("serving must be a mapping of names to values (got [1]).", {"node": "1xH200", "serving": [1]}),
    ],
)
def test_an_argument_of_the_wrong_kind_is_refused_in_words(tmp_path: Path, told: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as refused:
        convert(TINY_M2, tmp_path / "out", **wrong)
    assert str(refused.value).startswith(told)
    assert not (tmp_path / "out").exists()


def test_the_notebook_runs_from_the_first_cell_to_the_last(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = ROOT / "examples" / "python_api.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "clear the outputs before committing it"
    monkeypatch.chdir(path.parent)
    names: dict[str, Any] = {}
    for number, text in enumerate(code):
        exec(compile(text, f"{path.name}, code cell {number}", "exec"), names)
    assert {name for name in m3quant.api.__all__ if callable(names.get(name))} >= {
        "plan",
        "convert",
        "verify",
        "evaluate",
        "fit",
    }
    planned, done, found = names["plans"]["int4"], names["done"], names["found"]
    assert planned.output_bytes == done.manifest["output_bytes"] and names["checked"].holds
    kl = {r.convention: r.metrics["kl_mean"] for r in found.record.results if "kl_mean" in r.metrics}
    floor = kl.pop(next(name for name in kl if name.startswith("noise")))
    assert 0 < floor < 0.1 * next(iter(kl.values())) and found.broken == []
    assert names["fitted"].chosen.nbytes <= 9_000_000
    said = capsys.readouterr().out
    assert "ok   against the source" in said and "bytes are missing" in said


def test_planning_loads_no_torch_and_shows_nothing() -> None:
    config = DATA / "minimax-m2.7" / "config.json"
    code = (
        "import sys, m3quant, m3quant.api\n"
        "assert not {'m3quant.planning', 'numpy', 'pydantic', 'torch'} & set(sys.modules)\n"
        f"assert m3quant.api.plan({str(config)!r}, 'fp8').output_bytes > 2e11\n"
        "assert not {'torch', 'transformers', 'click'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_name_is_there_and_documented() -> None:
    assert dir(m3quant.api) == m3quant.api.__all__ == sorted(m3quant.api.__all__)
    for name in m3quant.api.__all__:
        assert getattr(m3quant.api, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        m3quant.api.convrt  # noqa: B018


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make_source(tmp_path_factory.mktemp("api") / "m2", "m2"))


def test_wrong_options_are_refused_before_a_folder_is_made(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrong: list[tuple[type[M3QuantError], str, dict[str, Any]]] = [
        (RecipeError, "uses no calibration data", {"to": "int4", "windows": 8}),
        (RecipeError, "both say how much text", {"windows": 8, "calibration_tokens": 4096}),
        (RecipeError, "routed_experts=int5-g128-asym", {"to": "int5"}),
        (PlanError, "names a Ray cluster", {"to": "int4", "address": "localhost:1"}),
        (OptionError, "a node is a budget worked out", {"budget": "8MB", "node": "1xH200"}),
        (OptionError, "make the recipe", {"to": "int4", "budget": 8_000_000}),
        (OptionError, "is no size", {"budget": "8 apples"}),
        (RecipeError, "unquantized weights", {"budget": "8MB", "requantize": True}),
    ]
    for kind, words, options in wrong:
        with pytest.raises(kind, match=words):
            convert(source, out, **options)
    assert not out.exists()
    for more, words in (({"windows": 4}, "add --measure"), ({"serving": {"context": 4096}}, "add --on NODE")):
        with pytest.raises(OptionError, match=words):
            fit(source, budget="1GB", **more)
    with pytest.raises(EvaluationError, match="did you mean 'kld'"):
        evaluate(source, limits="kdl=0.1")
    with pytest.raises(CheckpointError, match=r"m3quant\.json"):
        verify(source)


def test_progress_is_shown_where_it_is_asked_for(source: Path, tmp_path: Path) -> None:
    shown: dict[str, Silent] = {}

    class Bar(Silent):
        def __init__(self, label: str) -> None:
            super().__init__()
            shown[label] = self

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

    with quietly("nothing") as nobody:
        nobody.say("a line that nobody sees")
    done = convert(source, tmp_path / "out", "int4", settings=["attention=keep"], device="cpu", progress=Bar)
    assert set(shown) == {"int4"} and shown["int4"].done == shown["int4"].total > 0
    assert done.plan.output_bytes == done.manifest["output_bytes"]
    again = plan(source, "int4", settings=["attention=keep"])
    assert again.output_bytes == done.plan.output_bytes < plan(source, "fp8").output_bytes
    said: list[str] = []
    assert verify(tmp_path / "out", say=said.append).holds and "hashes ..." in said
