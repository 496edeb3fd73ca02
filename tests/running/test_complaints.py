"""What pydantic refuses is told in plain words: none of its own, and none of Python's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from m3quant.errors import EvaluationError, M3QuantError, RecipeError
from m3quant.evaluate.haystack import parse
from m3quant.evaluate.needle import NeedleParams
from m3quant.evaluate.suites import load_suite
from m3quant.recipe.recipe import build_recipe
from m3quant.runtime.serve_recipe import load_serve_recipe

# Of pydantic's messages and of Python's values and types.
FOREIGN = re.compile(
    r"Input should|valid (string|integer|number|boolean|list|dictionary)|Value error|\bNone\b|\bTrue\b|\bFalse\b|instance of"
)


def told(error: M3QuantError) -> str:
    assert not FOREIGN.search(str(error)), error
    return str(error)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"name": 3}, "recipe key 'name' must be text (got 3)."),
        ({"schemes": {"routed_experts": None}}, "recipe key 'schemes.routed_experts' must be text (got null)."),
        ({"rounding": "x"}, "recipe key 'rounding' must be 'nearest', 'awq' or 'feedback' (got 'x')."),
        ({"data": {"windows": "x"}}, "recipe key 'data.windows' must be a whole number (got 'x')."),
        ({"data": {"windows": 0}}, "recipe key 'data.windows' must be at least 1 (got 0)."),
        ({"data": True}, "recipe key 'data' must be a mapping of keys to values (got true)."),
        ({"native": "q"}, "recipe key 'native' must be true or false (got 'q')."),
    ],
)  # fmt: skip
def test_recipes(document: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        build_recipe(document)
    assert told(refused.value) == words


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"context": "x"}, "'context' must be a whole number (got 'x')."),
        ({"port": 70000}, "'port' must be at most 65,535 (got 70000)."),
        ({"utilization": 0}, "'utilization' must be more than 0 (got 0)."),
        ({"watermark": "x"}, "'watermark' must be a number (got 'x')."),
        ({"host": "a b"}, "'host': write one word, without white space (got 'a b')."),
        ({"kv_offload": "x"}, "'kv_offload': 'x' is no size: write bytes, or for example 8MB, 120GB or 118.4GiB (got 'x')."),
        ({"guard_settings": {"a": [1]}}, "'guard_settings.a' must be text (got [1])."),
        ({"engine": "x"}, "'engine' must be 'vllm' or 'sglang' (got 'x')."),
        ({"extra": ["--api-key=1"]}, "'extra': --api-key would be printed with its secret: name the key's variable with --api-key-env."),
    ],
)  # fmt: skip
def test_serving_recipes(given: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_serve_recipe(None, given)
    assert told(refused.value) == f"serving recipe key {words}"


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"name": "a"}, "key 'tasks' is missing."),
        ({"name": "a", "tasks": []}, "key 'tasks' must not be empty (got [])."),
        ({"name": "a", "tasks": [None]}, "key 'tasks.0' must be a mapping of keys to values (got null)."),
        ({"name": "a", "tasks": [{"task": "position"}], "beyond_context": 3}, "key 'beyond_context' must be 'refuse' or 'leave-out' (got 3)."),
    ],
)  # fmt: skip
def test_suites(tmp_path: Path, document: dict[str, Any], words: str) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump(document))
    with pytest.raises(EvaluationError) as refused:
        load_suite(str(suite))
    assert told(refused.value) == f"suite {suite}: {words}"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lengths": "x"}, "lengths must be a list (got 'x'); it takes text, "),
        ({"lengths": [64], "phrasing": 3}, "phrasing must be 'code' or 'ruler' (got 3); it takes text, "),
        ({"lengths": [64], "phrasing": {"fact": "a", "question": "{key}"}}, "phrasing.fact: the fact must contain {key} and {value} (got 'a'); it "),
        ({"lengths": [64], "depths": [7]}, "depths: depths must be distinct and between 0 (beginning) and 1 (end) (got [7]); it "),
    ],
)  # fmt: skip
def test_tasks(given: dict[str, Any], words: str) -> None:
    with pytest.raises(EvaluationError) as refused:
        parse(NeedleParams, {"text": "a", "text_name": "b", "text_licence": "c", **given}, "needle")
    assert told(refused.value).startswith(f"task needle: {words}")
