"""`--to native`: M3.1's own weights under compressed-tensors' names, verified and evaluated as the release itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from compressed_tensors.quantization import QuantizationConfig

from m3quant.checkpoint import Checkpoint
from m3quant.cli import cli
from m3quant.engines.stated import config_schemes
from m3quant.errors import PlanError, RecipeError
from m3quant.planning.headers import from_config
from m3quant.planning.plan import make_plan
from m3quant.planning.source_layouts import MXFP8, NVFP4_PACKED
from m3quant.planning.source_tensors import source_tensors
from m3quant.recipe.recipe import build_recipe, named_recipe
from tests.support.convert import tiny_m31
from tests.support.paths import DATA, FIXTURES

# The release asks for an FP8 cache; the output's config does not.
WEIGHTS_ALONE = ("--activations", "exact", "--kv-dtype", "bf16", "--index-dtype", "bf16")
NATIVE = build_recipe(named_recipe("native"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny release, and what `--to native` makes of it."""
    folder = tmp_path_factory.mktemp("native")
    source, _ = tiny_m31.make(folder / "m31")
    result = run("convert", source, folder / "out", "--to", "native", "--device", "cpu")
    assert result.exit_code == 0, result.output
    return source, folder / "out"


def test_every_tensor_is_the_source_s_byte_for_byte(made: tuple[Path, Path]) -> None:
    source, output = (Checkpoint.open(folder) for folder in made)
    assert source.tensors.keys() == output.tensors.keys()
    names = sorted(source.tensors)
    ours, theirs = output.read_many(names), source.read_many(names)
    for name in names:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].view(torch.uint8).equal(theirs[name].view(torch.uint8)), name
    assert (made[1] / "dspark" / "config.json").read_bytes() == (made[0] / "dspark" / "config.json").read_bytes()
    assert (made[1] / "LICENSE").read_bytes() == (made[0] / "LICENSE").read_bytes()


def test_weights_are_compared_with_weights(made: tuple[Path, Path]) -> None:
    """The output's texts, tokenizer and draft are no part of the share: the same weights are all of the source's."""
    said = run("convert", *made, "--to", "native", "--device", "cpu").output
    assert ", its weights 100.0% of the source's " in said


def test_the_section_says_what_lies_there(made: tuple[Path, Path]) -> None:
    output = Checkpoint.open(made[1])
    section = output.config["quantization_config"]
    kinds = {t.kind for name, t in source_tensors(output).items() if name.endswith("_proj.weight") and ".layers." in name and "vision" not in name}  # fmt: skip
    assert kinds == {MXFP8}
    experts = {t.kind for name, t in source_tensors(output).items() if ".experts." in name and name.endswith(".weight")}
    assert experts == {NVFP4_PACKED}
    read = QuantizationConfig.model_validate(section)
    assert {group.format for group in read.config_groups.values()} == {"nvfp4-pack-quantized", "mxfp8-quantized"}
    assert read.config_groups["group_0"].input_activations is None, "experts are read with activations in BF16"
    assert not config_schemes(output.config), "neither group is FP8 in rows or blocks, or integers"


def test_it_is_verified_and_measures_as_its_source(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = made
    assert run("verify", output, "--source", source).exit_code == 0
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: short\ntasks:\n  - {task: divergence, window: 128, max_windows: 2}\n")
    settings = ("--device", "cpu", "--suite", suite, "--data", FIXTURES / "heldout.txt", *WEIGHTS_ALONE)
    done = run("eval", output, "--source", source, *settings, "--report", tmp_path / "report")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "report" / "eval.json").read_text())
    assert record["results"][0]["metrics"]["kl_mean"] == 0


def test_a_changed_code_is_found(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = made
    copy = tmp_path / "out"
    copy.mkdir()
    for path in output.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(output)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(output)).write_bytes(path.read_bytes())
    name = next(n for n in Checkpoint.open(copy).tensors if n.endswith("experts.0.w1.weight_packed"))

    info = Checkpoint.open(copy).tensors[name]
    with open(copy / info.shard, "r+b") as file:
        file.seek(info.start)
        byte = file.read(1)[0]
        file.seek(info.start)
        file.write(bytes([byte ^ 1]))
    result = run("verify", copy, "--source", source)
    assert result.exit_code == 1 and name.removesuffix("_packed") in result.output


def test_engines_that_refuse_the_release_are_not_refused_it(made: tuple[Path, Path]) -> None:
    source, output = made
    assert "does not load" in run("plan", source, "--on", "1xH200", "--context", 4096).output
    answer = run("plan", output, "--on", "1xH200", "--context", 4096)
    assert answer.exit_code == 0 and "does not load" not in answer.output


@pytest.mark.parametrize("source", ["tiny-m3", "tiny-m2"])
def test_a_source_in_another_layout_is_refused(source: str) -> None:
    with pytest.raises(PlanError, match=r"NVFP4 experts and MXFP8.*routed_experts: unquantized"):
        make_plan(Checkpoint.open(FIXTURES / source), NATIVE)


@pytest.mark.parametrize(
    ("laid_over", "named"),
    [
        ({"settings": ["routed_experts=int4-g32"]}, "schemes"),
        ({"settings": ["attention@0-1=int8-g128"]}, "schemes"),
        ({"format": "autoawq"}, "format autoawq"),
    ],
)
def test_what_it_would_not_do_is_refused(laid_over: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=rf"'native' keeps every weight.*leave {named}"):
        build_recipe(named_recipe("native"), **laid_over)


def test_no_rounding_goes_with_it() -> None:
    with pytest.raises(RecipeError, match="leave rounding: feedback out"):
        build_recipe({**named_recipe("native"), "rounding": "feedback"})


def test_modelopt_s_layout_is_read_as_it_is(tmp_path: Path) -> None:
    source, _ = tiny_m31.make(tmp_path / "nv", "modelopt")
    with pytest.raises(PlanError, match="Serve it as it is"):
        make_plan(Checkpoint.open(source), NATIVE)


def test_the_release_s_own_config_can_be_planned() -> None:
    plan = make_plan(from_config(DATA / "minimax-m3.1-flash" / "config.json"), NATIVE)
    assert plan.quantization and len(plan.quantization["config_groups"]) == 2
    assert 240e9 < plan.output_bytes < 260e9
