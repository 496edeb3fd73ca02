"""The Hub that synthesizes: shards that our strict reader takes, the same by range as whole, with the checksums that it states; and its faults."""

import hashlib
import json
import random
import urllib.error
import urllib.request
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest

from m3quant.checkpoint import Checkpoint
from tests.publish.test_upload import contents, job, on_main
from tests.support.calibration.tiny import m2_config, m3_config
from tests.support.convert.common import run_convert
from tests.support.convert.tiny_m31 import native_section
from tests.support.publish.client import Client
from tests.support.publish.hub_state import Discarded, Fault, Hub
from tests.support.publish.synthetic import SyntheticModel

REPO = "org/synthetic"


def fp8_m2() -> dict[str, Any]:
    section = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return {**m2_config(num_local_experts=2, num_experts_per_tok=1), "quantization_config": section}


def native_m31() -> dict[str, Any]:
    config = m3_config()
    return {**config, "quantization_config": native_section(config)}


CONFIGS = {"fp8 blocks": fp8_m2, "bf16": m3_config, "nvfp4 packed": native_m31}


def model(folder: Path, config: dict[str, Any], **how: Any) -> SyntheticModel:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return SyntheticModel(path, shard_bytes=400_000, pool_bytes=2**16, **how)


@pytest.mark.parametrize("name", CONFIGS)
def test_shards_are_checkpoints_that_convert(tmp_path: Path, name: str) -> None:
    made = model(tmp_path, CONFIGS[name]())
    assert len(made.shards) > 2 and max(shard.size for shard in made.shards.values()) < 900_000
    folder = made.write(tmp_path / "written")
    opened = Checkpoint.open(folder)
    assert {n: shard.size for n, shard in opened.shards.items()} == {n: shard.size for n, shard in made.shards.items()}
    leaf, dtype = {
        "fp8 blocks": ("weight_scale_inv", "F32"),
        "bf16": ("weight", "BF16"),
        "nvfp4 packed": ("weight_packed", "U8"),
    }[name]
    assert {info.dtype for n, info in opened.tensors.items() if ".experts.0." in n and n.endswith(f".{leaf}")} == {
        dtype
    }
    rng = random.Random(name)
    for shard_name, shard in made.shards.items():
        whole = (folder / shard_name).read_bytes()
        assert hashlib.sha256(whole).hexdigest() == shard.sha256
        ends = [0, 1, len(shard.data), shard.starts[-1], shard.size, *(rng.randrange(shard.size) for _ in range(20))]
        for first, end in ((a, b) for a in ends for b in ends if a < b):
            assert b"".join(shard.pieces(first, end)) == whole[first:end], (shard_name, first, end)
    again = model(tmp_path, CONFIGS[name]())
    assert [s.sha256 for s in again.shards.values()] == [s.sha256 for s in made.shards.values()]
    other = model(tmp_path, CONFIGS[name](), seed=1)
    assert not {s.sha256 for s in other.shards.values()} & {s.sha256 for s in made.shards.values()}
    run_convert(folder, tmp_path / "out", "int4")  # refuses NaN, and global scales of the wrong direction


def get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        data: bytes = answer.read()
        return data


def test_the_server_states_and_sends_what_it_synthesizes(hub: Hub, client: Client, tmp_path: Path) -> None:
    made = model(tmp_path, fp8_m2(), beside={"tokenizer.json": b"{}"})
    made.add_to(hub, REPO, threads=2)
    hub.down.bytes_per_second = 50e6
    pulled = client.run({"cli": ["pull", REPO, str(tmp_path / "pulled")]})
    assert pulled.code == 0, pulled.err
    made.write(tmp_path / "written")
    for name in [*made.shards, *made.files]:
        assert (tmp_path / "pulled" / name).read_bytes() == (tmp_path / "written" / name).read_bytes(), name
    assert hub.shard_bytes(REPO) == sum(shard.size for shard in made.shards.values())
    name, shard = next(iter(made.shards.items()))
    url = f"{hub.url}/{REPO}/resolve/main/{name}"
    assert get(url, Range="bytes=1000-250000") == b"".join(shard.pieces(1000, 250_001))
    hub.down.bytes_per_second = None
    # Faults of the body: the status says that all is well.
    hub.faults = [Fault(name, 200, body_fault="cut")]
    with pytest.raises((IncompleteRead, ConnectionError)):
        get(url)
    hub.faults = [Fault(name, 200, body_fault="wrong")]
    whole = b"".join(shard.pieces(0, shard.size))
    assert get(url) == whole[:-1] + bytes([whole[-1] ^ 1])
    hub.faults = [Fault(name, 200, body_fault="stall", seconds=0.01)]
    assert get(url) == whole


def test_a_sink_checks_what_it_throws_away(hub: Hub, client: Client, files: Path) -> None:
    hub.discards = True
    done = client.run(job(files))
    assert done.code == 0, done.err
    tree = hub.repos["org/model"].tree()
    large = {name: entry for name, entry in tree.items() if isinstance(entry, Discarded)}
    assert {n: (e.sha256, e.size) for n, e in large.items()} == {
        n: (hashlib.sha256(d).hexdigest(), len(d)) for n, d in contents(files).items() if n in large
    }
    assert any(name.endswith(".safetensors") for name in large)
    assert {n: d for n, d in on_main(hub, "org/model").items() if d} == {
        n: d for n, d in contents(files).items() if n not in large and d
    }
    wrong = urllib.request.Request(f"{hub.url}/lfs/org/model/{'0' * 64}", data=b"other bytes", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(wrong, timeout=20)
