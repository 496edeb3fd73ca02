"""Plans of the full-size models, for tests of how fast they are served."""

from __future__ import annotations

from functools import cache

from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.fit import Ask, Fit, assess
from m3quant.runtime.hardware import parse_node
from m3quant.runtime.model import Subject, open_subject
from tests.support.paths import DATA

CONFIGS = {
    "minimax_m2": DATA / "minimax-m2.7" / "config.json",
    "minimax_m3_vl": DATA / "minimax-m3" / "config.json",
}


@cache
def subject(model_type: str) -> Subject:
    return open_subject(str(CONFIGS[model_type]))


def fit_of(model_type: str, recipe: str, node: str = "1xH200") -> Fit:
    """A recipe's output on a node, with an FP8 cache."""
    model = subject(model_type).converted(build_recipe(named_recipe(recipe)))
    return assess(model, parse_node(node), Ask(kv_dtype="fp8"))
