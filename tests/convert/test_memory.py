"""Peak memory is a matter of one layer's size, never of the number of layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.support.calibration.tiny import m2_config, m2_tensors
from tests.support.paths import ROOT

WIDE = {"hidden_size": 1024, "intermediate_size": 1024, "num_local_experts": 10, "num_experts_per_tok": 4}
MANY = 3


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of layers -> a checkpoint of that many layers of 66 MB, the layers alike, one shard each, shards shared."""
    folder = tmp_path_factory.mktemp("wide")
    config = m2_config(**WIDE, num_hidden_layers=1)
    tensors = m2_tensors(config, seed=0)
    layer = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in layer}
    shards = folder / "shards"
    shards.mkdir()
    save_file(rest, shards / "rest.safetensors")
    for number in range(MANY):
        named = {name.replace(".layers.0.", f".layers.{number}."): tensor for name, tensor in layer.items()}
        save_file(named, shards / f"layer{number}.safetensors")
    made = {}
    for count in (2, MANY):
        root = made[count] = folder / f"wide-{count}"
        root.mkdir()
        (root / "config.json").write_text(json.dumps(m2_config(**WIDE, num_hidden_layers=count)))
        for shard in ("rest", *(f"layer{number}" for number in range(count))):
            os.link(shards / f"{shard}.safetensors", root / f"{shard}.safetensors")
    return made


def probe(source: Path, output: Path, recipe: str) -> dict[str, int]:
    # One arena and prompt returns to the system: what the allocator hoards is not what the conversion holds.
    memory = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.convert.memory_probe", str(source), str(output), recipe],
        cwd=ROOT, env={**os.environ, **memory, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, int] = json.loads(done.stdout)
    return result


# Activations of the few windows, buffers of the search, and what an allocator keeps.
CONSTANT = 48e6


@pytest.mark.parametrize("recipe", ["int4", "awq"])
def test_peak_memory_is_bounded_by_layers_not_by_their_number(
    wide: dict[int, Path], tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {count: probe(source, tmp_path / str(count), recipe) for count, source in wide.items()}
    layer = found[2]["layer"]
    grown = {count: result["peak"] - result["imported"] for count, result in found.items()}
    with capsys.disabled():
        print(
            f"\n{recipe}: layers of {layer / 1e6:.0f} MB; resident after imports {found[2]['imported'] / 1e6:.0f} MB; peak above it "
            + ", ".join(f"{grown[c] / 1e6:.0f} MB with {c} layers" for c in grown)
            + f"; predicted {found[MANY]['predicted'] / 1e6:.0f} MB"
        )
    assert grown[MANY] <= grown[2] + 0.25 * layer
    assert grown[MANY] <= found[MANY]["predicted"] + CONSTANT
    if recipe == "int4":
        assert grown[MANY] <= layer  # data-free holds a few tensors at a time, not even a layer
