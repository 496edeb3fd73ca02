"""Fitting a recipe to a number of bytes: exact, monotone, refused below the least; and files of another source or text."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from m3quant.checkpoint import Checkpoint
from m3quant.errors import OptionError, PlanError, RecipeError
from m3quant.planning.choices import layer_choices, unit_bytes
from m3quant.planning.fit import Fitting, recipe_document
from m3quant.planning.headers import from_config
from m3quant.planning.plan import make_plan
from m3quant.planning.sensitivity import (
    Candidate,
    LayerSensitivity,
    Pilot,
    Probe,
    Sensitivity,
    TextIdentity,
    check_source,
    check_text,
    load_sensitivity,
    source_identity,
)
from m3quant.recipe.recipe import build_recipe
from tests.support.convert.common import make_source
from tests.support.paths import FIXTURES

TINY = {name: FIXTURES / name for name in ("tiny-m2", "tiny-m3")}
FEW = {
    "routed_experts": ("int2-g128-asym", "int3-g128-asym", "int4-g32"),
    "attention": ("int4-g128", "int8-g128"),
    "shared_experts": ("int8-g128",),
    "dense_mlp": ("int4-g128", "int8-g128"),
}


def made_up(fitting: Fitting, seed: int = 0) -> Sensitivity:
    """A sensitivity file for a checkpoint with random estimates, some of which fall as bits rise."""
    draw = random.Random(seed)
    layers = []
    for number, own in enumerate(fitting.choices.candidates):
        weight = 10 ** draw.uniform(-3, 0)
        candidates = {
            role: {s: Candidate(error=0.1, kl=weight * draw.uniform(0.5, 1.5) / 4**n) for n, s in enumerate(names)}
            for role, names in own.items()
        }
        probes = {role: [Probe(scheme=names[0], error=0.1, kl=0.1)] for role, names in own.items()}
        layers.append(LayerSensitivity(layer=number, candidates=candidates, probes=probes))
    return Sensitivity(
        schema_version=1,
        m3quant="0",
        source=source_identity(fitting.checkpoint, fitting.base.family.model_type),
        text=TextIdentity(
            source="made up", sha256="text", tokenizer_sha256="tokens", windows=2, heldout_windows=1, window_length=32
        ),
        rounding="feedback",
        options={},
        device="cpu",
        others_left=1.0,
        layers=layers,
        pilots=[Pilot(layers=[], estimate=x, kl=y) for x, y in ((0.01, 0.02), (1.0, 0.5))],
    )


def of(name: str, sensitivity: bool = True, seed: int = 0) -> Fitting:
    checkpoint = Checkpoint.open(TINY[name])
    plain = Fitting(checkpoint, {}, candidates=FEW)
    return Fitting(checkpoint, {}, made_up(plain, seed), candidates=FEW) if sensitivity else plain


@pytest.mark.parametrize("name", TINY)
def test_bytes_of_every_choice_are_the_plans(name: str) -> None:
    fitting = of(name, sensitivity=False)
    draw = random.Random(name)
    for _ in range(3):
        chosen = [draw.randrange(len(own)) for own in fitting.choices.layers]
        plan = fitting.plan(chosen)
        for unit, choices, i in zip(plan.units[1:], fitting.choices.layers, chosen, strict=True):
            assert unit_bytes(unit) == choices[i].nbytes
        assert abs(plan.output_bytes - fitting.point(chosen).nbytes) < 2048  # config.json and recipe.yaml


@pytest.mark.parametrize("name", TINY)
def test_the_recipe_found_is_the_best_of_all_that_fit(name: str) -> None:
    fitting = of(name)
    assert fitting.losses is not None
    places = [range(len(own)) for own in fitting.choices.layers]
    every = [
        (sum(own[i] for own, i in zip(fitting.losses, chosen, strict=True)), fitting.point(chosen).nbytes, chosen)
        for chosen in itertools.product(*places)
    ]
    sizes = sorted(size for _, size, _ in every)
    for budget in (sizes[len(sizes) // 10], sizes[len(sizes) // 2], sizes[-1] + 5000):
        found = fitting.within_output(budget)
        assert found is not None and found[1].output_bytes <= budget
        loss = sum(own[i] for own, i in zip(fitting.losses, found[0], strict=True))
        better = [chosen for other, size, chosen in sorted(every) if other < loss and size <= budget + 2048]
        assert all(fitting.plan(chosen).output_bytes > budget for chosen in better)


@pytest.mark.parametrize("sensitivity", [True, False])
def test_more_bytes_never_lose_more_and_the_least_is_taken_to_the_byte(sensitivity: bool) -> None:
    fitting = of("tiny-m3", sensitivity)
    least = fitting.plan(fitting.least).output_bytes
    assert fitting.within_output(least - 1) is None
    found = fitting.within_output(least)
    assert found is not None and found[1].output_bytes == least
    most = max(fitting.point(chosen).nbytes for chosen in fitting.frontier())
    before: tuple[float, int] | None = None
    for budget in range(least, most + 3000, (most - least) // 40):
        found = fitting.within_output(budget)
        assert found is not None and found[1].output_bytes <= budget
        kl = fitting.predicted_kl(found[0])
        now = (kl if kl is not None else 0.0, found[1].output_bytes)
        if before is not None:
            assert now[0] <= before[0] if sensitivity else now[1] >= before[1]
        before = now


def test_without_sensitivity_the_rest_comes_first_and_experts_rise_together() -> None:
    fitting = of("tiny-m2", sensitivity=False)
    steps = fitting.frontier()
    schemes = [[dict(own) for own in fitting.schemes(chosen)] for chosen in steps]
    assert all(len({str(own) for own in layers}) == 1 for layers in schemes)
    assert [layers[0] for layers in schemes] == [
        {"attention": "int4-g128", "routed_experts": "int2-g128-asym"},
        {"attention": "int8-g128", "routed_experts": "int2-g128-asym"},
        {"attention": "int8-g128", "routed_experts": "int3-g128-asym"},
        {"attention": "int8-g128", "routed_experts": "int4-g32"},
    ]
    between = (fitting.point(steps[1]).nbytes + fitting.point(steps[2]).nbytes) // 2
    found = fitting.within_output(between)
    assert found is not None
    own = [layer["routed_experts"] for layer in fitting.schemes(found[0])]
    assert own == ["int2-g128-asym", "int3-g128-asym", "int2-g128-asym"]  # one of three: the one in the middle
    assert fitting.predicted_kl(found[0]) is None


def test_the_frontier_rises_in_bytes_and_falls_in_divergence() -> None:
    fitting = of("tiny-m3")
    points = [fitting.point(chosen) for chosen in fitting.frontier()]
    assert [p.nbytes for p in points] == sorted(p.nbytes for p in points)
    kls = [p.kl for p in points if p.kl is not None]
    assert len(kls) == len(points) and kls == sorted(kls, reverse=True)


def test_a_recipe_names_the_most_frequent_schemes_once() -> None:
    layers: list[Mapping[str, str]] = [
        {"attention": "int8-g128", "dense_mlp": "int8-g128"},
        {"attention": "int8-g128", "routed_experts": "int2-g128-asym"},
        {"attention": "int4-g128", "routed_experts": "int3-g128-asym"},
        {"attention": "int8-g128", "routed_experts": "int2-g128-asym"},
    ]
    recipe = build_recipe(recipe_document(layers, {"windows": 7}))
    assert recipe.schemes["routed_experts"] == "int2-g128-asym" and recipe.schemes["attention"] == "int8-g128"
    assert recipe.layers == {"2": {"routed_experts": "int3-g128-asym", "attention": "int4-g128"}}
    assert (
        recipe.scheme("indexer", 2).name == "int4-g128" and recipe.data.windows == 7 and recipe.rounding == "feedback"
    )


def test_schemes_that_do_not_divide_are_left_out_by_name(tmp_path: Path) -> None:
    source = Checkpoint.open(make_source(tmp_path / "m2", "m2", intermediate_size=192))
    base = Fitting(source, {}).base
    found = layer_choices(base, {"routed_experts": ("int2-g128-asym", "int3-g64-asym"), "attention": ("int8-g128",)})
    assert found.by_role["routed_experts"] == ["int3-g64-asym"]
    assert (
        "int2-g128-asym groups 128 input columns, which do not divide the 192"
        in found.refused["routed_experts", "int2-g128-asym"]
    )
    with pytest.raises(PlanError, match=r"routed_experts of layer 0 cannot be int2-g128-asym.*No other candidate"):
        layer_choices(base, {"routed_experts": ("int2-g128-asym",), "attention": ("int8-g128",)})


def test_a_recipe_that_mixes_schemes_among_a_layers_experts_is_refused() -> None:
    with pytest.raises(RecipeError, match="w1, w2 and w3 of all experts of a layer have one scheme"):
        build_recipe({"rounding": "feedback", "layers": {"1": {"w1": "int2-g128-asym"}}})


def written(path: Path, found: Sensitivity, **changes: Any) -> Path:
    path.write_text(json.dumps({**found.model_dump(), **changes}))
    return path


def test_a_file_of_another_source_or_text_is_refused_by_name(tmp_path: Path) -> None:
    fitting, other = of("tiny-m3"), Checkpoint.open(TINY["tiny-m2"])
    assert fitting.sensitivity is not None
    path = written(tmp_path / "s.json", fitting.sensitivity)
    found = load_sensitivity(path)
    check_source(found, path, fitting.checkpoint, "minimax_m3_vl")
    check_source(found, path, from_config(TINY["tiny-m3"] / "config.json"), "minimax_m3_vl")
    with pytest.raises(OptionError, match=r"s\.json was measured on another source than .*tiny-m2"):
        check_source(found, path, other, "minimax_m2")
    check_text(found, path, "text", "tokens", "bundled")
    with pytest.raises(OptionError, match="with another text"):
        check_text(found, path, "other", "tokens", "own.txt")
    with pytest.raises(OptionError, match="with another tokenizer"):
        check_text(found, path, "text", "other", "own.txt")


def test_odd_files_are_refused_with_a_sentence(tmp_path: Path) -> None:
    found = of("tiny-m2").sensitivity
    assert found is not None
    cases: dict[str, tuple[Any, str]] = {
        "missing": (None, "cannot be read"),
        "text": ("no JSON", "not usable JSON"),
        "nan": (json.dumps(found.model_dump()).replace("0.1", "NaN", 1), "NaN is not JSON"),
        "deep": ("[" * 100_000, "nested too deeply|not usable JSON"),
        "list": ("[]", "not an object"),
        "version": ({"schema_version": 7}, "schema_version 7"),
        "negative": ({"pilots": [{"layers": [], "estimate": -1, "kl": 0}]}, r"pilots\.0\.estimate"),
        "order": ({"layers": [found.layers[1].model_dump()]}, "every layer once, in order"),
        "extra": ({"more": 1}, "more is not known"),
        "role": ({"layers": [{"layer": 0, "candidates": {"w1": {}}, "probes": {}}]}, "role 'w1' is none of"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.json"
        if isinstance(content, dict):
            written(path, found, **content)
        elif content is not None:
            path.write_text(content)
        with pytest.raises((OptionError, RecipeError), match=message):
            load_sensitivity(path)


def test_a_file_that_lacks_a_layer_or_a_candidate_is_refused() -> None:
    fitting = of("tiny-m2")
    found = fitting.sensitivity
    assert found is not None
    with pytest.raises(OptionError, match="has 2 layers, the model 3"):
        Fitting(fitting.checkpoint, {}, found.model_copy(update={"layers": found.layers[:2]}))
    lacking = {role: dict(own) for role, own in found.layers[1].candidates.items()}
    del lacking["routed_experts"]["int4-g32"]
    layers = [found.layers[0], found.layers[1].model_copy(update={"candidates": lacking}), found.layers[2]]
    with pytest.raises(OptionError, match="nothing of int4-g32 for routed_experts of layer 1"):
        Fitting(fitting.checkpoint, {}, found.model_copy(update={"layers": layers}))
    assert make_plan(fitting.checkpoint, fitting.recipe(fitting.least)).quantization
