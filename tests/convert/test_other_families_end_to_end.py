"""Dense decoders and Qwen3-MoE from plan to eval: every recipe, calibrated conversion, verify, and a node to serve on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors import safe_open

from m3quant.cli import cli
from m3quant.engines.vllm.lookup import Lookup
from m3quant.recipe.recipe import recipe_names
from tests.support.calibration.tiny_family import make_tiny
from tests.support.paths import ROOT

SMALL = ("--windows", 6, "--window-length", 96, "--min-expert-tokens", 4)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def done(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return str(result.stdout)


def stored(folder: Path) -> set[str]:
    names: set[str] = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            names |= set(file.keys())
    return names


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {name: make_tiny(root / name, name, seed=7) for name in ("llama", "qwen2", "qwen3_moe")}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe"])
def test_every_recipe_plans_these_families(name: str, sources: dict[str, Path]) -> None:
    for recipe in recipe_names():
        plan = json.loads(done("plan", sources[name], "--to", recipe, "--json"))
        roles = {row["role"]: row["scheme"] for row in plan["roles"]}
        wanted = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())["schemes"]
        assert roles["attention"] == wanted.get("attention", "keep"), recipe
        if name == "qwen3_moe":
            assert roles["routed_experts"] == wanted["routed_experts"], recipe
            continue
        assert roles["dense_mlp"] == wanted["routed_experts"], recipe
        stated = any("its dense MLPs take their scheme" in note for note in plan["notes"])
        assert stated == (wanted.get("dense_mlp") != wanted["routed_experts"]), recipe


def test_a_scheme_that_a_person_gives_the_dense_mlps_stays(sources: dict[str, Path]) -> None:
    plan = json.loads(done("convert", sources["llama"], "x", "--to", "awq-all-int4", "--dry-run", "--json",
                           "--set", "dense_mlp=int8-g128", *SMALL))  # fmt: skip
    assert {row["role"]: row["scheme"] for row in plan["roles"]}["dense_mlp"] == "int8-g128"


@pytest.mark.parametrize(("name", "recipe"), [("qwen2", "awq"), ("qwen3_moe", "awq"), ("llama", "int4")])
def test_convert_verify_and_evaluate(name: str, recipe: str, sources: dict[str, Path], tmp_path: Path) -> None:
    out, source = tmp_path / "out", sources[name]
    done("convert", source, out, "--to", recipe, "--device", "cpu", *(SMALL if recipe == "awq" else ()))
    names, config = stored(out), json.loads((out / "config.json").read_text())
    experts = "mlp.experts.5.down_proj" if name == "qwen3_moe" else "mlp.down_proj"
    assert f"model.layers.1.{experts}.weight_packed" in names
    assert "model.layers.1.self_attn.o_proj.weight_scale" in names
    assert ("model.layers.1.self_attn.q_proj.bias" in names) == (name == "qwen2")
    lookup = Lookup(config["quantization_config"])
    assert lookup.scheme(f"model.layers.1.{experts}").name == "int4-g128"
    assert not lookup.scheme("model.layers.1.mlp.gate").quantizes and not lookup.scheme("lm_head").quantizes
    done("verify", out, "--source", source)
    suite = tmp_path / "suite.yaml"
    task = {"task": "perplexity-gptq", "name": "main", "window": 64, "max_windows": 2}
    suite.write_text(yaml.safe_dump({"name": "short", "tasks": [task]}))
    report = json.loads(
        done("eval", out, "--source", source, "--suite", suite, "--device", "cpu", "--report", tmp_path / "r", "--json")
    )
    assert "main" in json.dumps(report)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_node_is_planned(name: str, sources: dict[str, Path]) -> None:
    shown = done("plan", sources[name], "--on", "1xH100", "--to", "awq")
    assert "KV pool" in shown or "tokens" in shown


def test_a_bias_that_config_does_not_promise_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for file in sources["llama"].iterdir():
        if file.name != "model.safetensors.index.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    with safe_open(last, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | {"model.layers.1.self_attn.q_proj.bias": torch.zeros(256)}, last, {"format": "pt"})
    refused = invoke("plan", tmp_path, "--to", "int4")
    assert refused.exit_code != 0 and "config.json says nothing of a bias there" in str(refused.exception)
