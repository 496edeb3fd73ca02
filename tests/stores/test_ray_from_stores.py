"""A Ray cluster converts what lies in an object store: the driver fetches, and the bytes are a local run's."""

from __future__ import annotations

from pathlib import Path

from tests.hub.test_convert_from_hub import made
from tests.hub.test_ray_from_hub import address, folder
from tests.support.convert.common import run_convert
from tests.support.convert.resharded import as_repo
from tests.support.publish.client import Client
from tests.support.stores.objects import Objects

__all__ = ["address", "folder"]

IMPORTED_ONCE = ("m3quant.convert.conversion", "m3quant.convert.ray.units")


def test_two_nodes_give_the_bytes_of_one_process(
    address: str,
    folder: Path,
    store: Objects,
    client: Client,
    tmp_path: Path,
) -> None:
    where, output = store.add("ray/tiny-m2", as_repo(folder)), tmp_path / "out"
    words = ["convert", where, str(output), "--to", "int4", "--device", "cpu", "--ray", "--address", address]
    done = client.run({"cli": words})
    assert done.code == 0, done.err
    assert "over 2 nodes" in done.err and not (output / ".m3quant").exists()
    run_convert(folder, tmp_path / "local", "int4")
    shards = [name for name in made(output) if name.endswith(".safetensors")]
    assert shards and all(made(output)[name] == made(tmp_path / "local")[name] for name in shards)
