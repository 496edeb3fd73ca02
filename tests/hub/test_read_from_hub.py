"""verify and eval with checkpoints on the Hub on localhost, and sources in NVFP4, whose scales are looked at layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from m3quant.checkpoint import Checkpoint
from m3quant.planning.plan import make_plan
from m3quant.planning.streaming import conversion_shards
from m3quant.recipe.recipe import build_recipe, named_recipe
from tests.support.convert.common import config_of, make_source, rewrite, run_convert, stored
from tests.support.convert.fp4_sources import nvfp4_packed
from tests.support.convert.resharded import as_repo, reshard, watched
from tests.support.convert.sources import both_forms
from tests.support.paths import FIXTURES
from tests.support.publish.client import Client, Done
from tests.support.publish.hub_state import Fault, Hub

IMPORTED_ONCE = (
    "m3quant.cli.eval",
    "m3quant.cli.verify",
    "compressed_tensors.quantization",
    "m3quant.verify.verification",
    "m3quant.evaluate.evaluation",
    "transformers.models.auto.tokenization_auto",
)
SOURCE, OUTPUT = "org/source", "org/output"
SUITE = {
    "name": "mine",
    "tasks": [
        {"task": "perplexity-gptq", "window": 64, "max_windows": 2},
        {"task": "divergence", "window": 64, "max_windows": 2, "noise_windows": 1},
    ],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    return reshard(FIXTURES / "tiny-m3", root / "tiny-m3", 7)


@pytest.fixture(scope="module")
def output(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("output") / "out"
    run_convert(source, out, "int4")
    return out


def refused(done: Done, code: int, *phrases: str) -> None:
    assert done.code == code, (done.code, done.out, done.err)
    for phrase in phrases:
        assert phrase in done.err + done.out, done.err


def test_verify_reads_the_source_shard_by_shard(
    hub: Hub, client: Client, source: Path, output: Path, tmp_path: Path
) -> None:
    hub.add(SOURCE, as_repo(source), large=True)
    need = conversion_shards(make_plan(Checkpoint.open(source), build_recipe(named_recipe("int4"))), None)
    verify = ["verify", str(output), "--json", "--source"]
    with watched(output / ".m3quant-verify") as most:
        remote = client.run({"cli": [*verify, SOURCE, "--cache-disk", str(need.least)]})
    assert remote.code == 0, remote.err
    assert need.least / 2 < most[0] <= need.least + 20_000
    fetched = sum(count for _, file, count in hub.sent if file.endswith(".safetensors"))
    assert fetched <= need.fetch_bytes + 7 * 130 * 1024 + 10_000
    local = client.run({"cli": [*verify, str(source)]}).json
    told = json.loads(remote.out.replace(SOURCE, str(source)))
    assert told == local and told["holds"]
    assert not (output / ".m3quant-verify").exists()
    refused(client.run({"cli": [*verify, SOURCE, "--cache-disk", "1MB"]}), 2, f"at least {need.least:,} bytes")
    refused(client.run({"cli": [*verify, str(source), "--cache-disk", "1GB"]}), 2, "is a folder")
    hub.faults = [Fault("GET .*/model-00004", 403, skip=1, times=100)]
    refused(client.run({"cli": [*verify, SOURCE]}), 2, "not open to you")
    assert not (output / ".m3quant-verify").exists()


def test_verify_finds_that_the_repo_holds_other_weights(
    hub: Hub, client: Client, source: Path, output: Path, tmp_path: Path
) -> None:
    repo = as_repo(source)
    name = "model-00003-of-00007.safetensors"
    repo[name] = repo[name][:-1] + bytes([repo[name][-1] ^ 1])
    hub.add(SOURCE, repo | {"generation_config.json": b"{}"}, large=True)
    done = client.run({"cli": ["verify", str(output), "--source", SOURCE]})
    refused(
        done, 1, f"was made of other tensors than {name} of {SOURCE} holds", "generation_config.json is not the file"
    )


def results(folder: Path) -> Any:
    record = json.loads((folder / "eval.json").read_bytes())
    return [(r["task"], r["metrics"], r["source_metrics"]) for r in record["results"]], record["layers"]


def test_eval_reads_a_checkpoint_and_its_source_layer_by_layer(
    hub: Hub, client: Client, source: Path, output: Path, tmp_path: Path
) -> None:
    """The figures are those of the folders; neither repo is downloaded, and nothing is left."""
    hub.add(SOURCE, as_repo(source), large=True)
    published = {k: v for k, v in as_repo(output).items() if not k.startswith(".") and k != "eval.json"}
    hub.add(OUTPUT, published, large=True)
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump(SUITE))

    def measure(name: str, *cli: object) -> Done:
        given = ("--suite", suite, "--device", "cpu", "--report", tmp_path / name)
        return client.run({"cli": ["eval", *map(str, (*cli, *given))]})

    local = measure("local", output, "--source", source)
    assert local.code == 0, local.err
    with watched(tmp_path / "remote" / ".m3quant-eval" / "shards") as most:
        remote = measure("remote", OUTPUT, "--source", SOURCE, "--cache-disk", "17MB")
    assert remote.code == 0, remote.err
    assert 10_000_000 < most[0] <= 17_000_000
    assert results(tmp_path / "remote") == results(tmp_path / "local")
    record = json.loads((tmp_path / "remote" / "eval.json").read_bytes())
    assert (record["checkpoint"]["name"], record["source"]["name"]) == ("output", "source")
    assert sorted(p.name for p in (tmp_path / "remote").iterdir()) == ["eval.html", "eval.json"]
    cached = sum(p.stat().st_size for p in client.folder.rglob("*.safetensors"))
    assert cached == 0, "shards went into the Hub's cache"
    refused(measure("x", SOURCE, "--cache-disk", "1MB"), 2, "--cache-disk must be at least")
    refused(measure("x", source, "--cache-disk", "1GB"), 2, "is a folder")
    shard = next(name for name in published if name.endswith(".safetensors"))
    hub.add(OUTPUT, published | {shard: published[shard][:-1] + b"\0"}, large=True)
    refused(measure("x", OUTPUT), 2, f"{OUTPUT}/{shard} is not the file that its manifest lists")
    assert not (tmp_path / "x").exists()


PACKED = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "type": "float",
                "symmetric": True,
                "num_bits": 4,
                "strategy": "tensor_group",
                "group_size": 16,
            },
        }
    },
}


def test_global_scales_are_looked_at_when_their_layer_comes(hub: Hub, client: Client, tmp_path: Path) -> None:
    """Not all at once beforehand, which would take a request for each: one that is wrong stops its own layer, before it is written."""
    source, _ = both_forms(make_source(tmp_path / "m2", "m2"), tmp_path, nvfp4_packed, PACKED)
    good = reshard(source, tmp_path / "good", 5)
    run_convert(good, tmp_path / "local", "int4")
    hub.add("org/good", as_repo(good), large=True)
    done = client.run({"cli": ["convert", "org/good", str(tmp_path / "out"), "--to", "int4"]})
    assert done.code == 0, done.err
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert len(hub.log) < 100  # of 24 experts' weights and scales in two layers
    one = "model.layers.1.block_sparse_moe.experts.2.w3"
    tensors = stored(source)
    tensors[f"{one}.weight_global_scale"] = 1 / tensors[f"{one}.weight_global_scale"]
    turned = reshard(rewrite(tmp_path / "turned", tensors, config_of(source)), tmp_path / "resharded", 5)
    hub.add("org/turned", as_repo(turned), large=True)
    refused(
        client.run({"cli": ["convert", "org/turned", str(tmp_path / "bad"), "--to", "int4"]}),
        2, f"the global scale of '{one}.weight_packed' is", "Whoever wrote it meant the other way",
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "bad").glob("*.safetensors")) == [
        "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
    ]  # fmt: skip
