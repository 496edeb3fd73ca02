"""Huggingface_hub writes a file so that its digest can be taken while it comes; a server that ends in the middle does no harm to that."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.publish.client import TOKEN
from tests.support.publish.hub_state import Fault, Hub

NAME = "model-00001-of-00001.safetensors"
SCRIPT = f"""
import sys
from pathlib import Path
from m3quant.checkpoint.downloads import downloads
from m3quant.checkpoint.hub import HubStore
with downloads(HubStore("org/source"), 10**12) as download:
    print(download({NAME!r}, Path(sys.argv[1]), lambda count: None, False))
"""


@pytest.mark.parametrize("faults", [[], [Fault("GET .*safetensors", 200, body_fault="cut")]])
def test_digest_as_it_comes(server: Hub, hub: Hub, faults: list[Fault], tmp_path: Path) -> None:
    data = os.urandom(25_000_000)  # of three pieces that the client writes at once
    hub.add("org/source", {NAME: data}, large=True)
    hub.faults.extend(faults)
    environment = {
        **os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    (tmp_path / "to").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "to")], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert done.stdout.strip() == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "to" / NAME).read_bytes() == data
