"""Opening a Hub repo: headers by range requests through the real huggingface_hub client, against the local server.

One child process per test opens repos, because huggingface_hub reads
HF_ENDPOINT and HF_HOME when it is imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m3quant.checkpoint import Checkpoint
from m3quant.checkpoint.remote import FIRST_BYTES
from tests.support import adversarial
from tests.support.publish.hub_server import running_hub
from tests.support.publish.hub_state import Hub

DRIVER = """
import json, sys
from m3quant.checkpoint import Checkpoint, hub, remote
from m3quant.errors import CheckpointError
hub.RETRY_PAUSES_SECONDS = remote.RETRY_PAUSES_SECONDS = (0.01, 0.01)
results = []
for spec in json.load(sys.stdin):
    try:
        c = Checkpoint.open(spec["repo"], spec.get("revision"))
        result = {
            "tensors": {n: [i.dtype, i.shape, i.shard, i.start, i.end] for n, i in c.tensors.items()},
            "local": c.local, "root": c.root, "revision": c.revision, "fingerprint": c.fingerprint(),
            "other_files": c.other_files, "skipped": c.skipped_files, "config": c.config,
        }
        if "file" in spec:
            result["file"] = c.file_bytes(spec["file"]).decode()
        for read in (c.read, c.read_bytes, lambda name: c.read_many([name])):
            try:
                read(next(iter(c.tensors)))
            except CheckpointError as error:
                result.setdefault("read_errors", []).append(str(error))
    except CheckpointError as error:
        result = {"error": str(error)}
    results.append(result)
print(json.dumps(results))
"""


@pytest.fixture
def server() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def open_on(
    hub_url: str, home: Path, specs: list[dict[str, str]], environment: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """What a process whose Hub is at `hub_url` gets for each spec (repo, revision, file)."""
    settings = {
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(specs),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=home,
        env={**kept, **settings, **(environment or {})},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: list[dict[str, Any]] = json.loads(done.stdout)
    return result


def with_big_shards() -> dict[str, bytes]:
    """A sound repo: a shard of 3 MB with a small header, one with a header that no first request covers."""
    big = {"big": ("U8", [3_000_000], bytes(3_000_000))}
    many = {f"model.layers.{i}.self_attn.q_proj.weight": ("U8", [1], b"x") for i in range(3000)}
    files = {
        "a.safetensors": adversarial.pack(adversarial.table(big), bytes(3_000_000)),
        "b.safetensors": adversarial.pack(adversarial.table(many), b"x" * 3000),
        "config.json": b'{"model_type": "minimax_m2"}',
        "tokenizer.json": b'{"a tokenizer": 1}',
        ".gitattributes": b"*",
        "original/x.safetensors": b"not looked at",
    }
    weight_map = {"big": "a.safetensors"} | dict.fromkeys(many, "b.safetensors")
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files


def test_a_repo_opens_like_its_folder_without_its_weights(server: Hub, tmp_path: Path) -> None:
    files = with_big_shards()
    server.add("org/model", files)
    server.add("org/moved", files, redirects=True)
    folder = tmp_path / "folder"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    local = Checkpoint.open(folder)
    specs = [{"repo": "org/model", "file": "tokenizer.json"}, {"repo": "org/moved@main"}]
    for spec, remote in zip(specs, open_on(server.url, tmp_path, specs), strict=True):
        assert "error" not in remote, remote
        here = {n: [i.dtype, list(i.shape), i.shard, i.start, i.end] for n, i in local.tensors.items()}
        assert remote["tensors"] == here
        assert remote["fingerprint"] == local.fingerprint() and remote["config"] == local.config
        assert (remote["other_files"], remote["skipped"].keys()) == (
            local.other_files,
            {".gitattributes", "original/x.safetensors"},
        )
        assert (remote["local"], remote["root"]) == (False, spec["repo"])
        assert remote["revision"] == server.repos[spec["repo"].split("@")[0]].head
        assert len(remote["read_errors"]) == 3
        assert all(f"m3quant pull {spec['repo'].split('@')[0]}" in text for text in remote["read_errors"])
        headers = sum(shard.header_bytes for shard in local.shards.values())
        assert headers < server.shard_bytes(spec["repo"].split("@")[0]) <= headers + FIRST_BYTES
    assert (
        specs[0]["repo"] == "org/model" and open_on(server.url, tmp_path, specs[:1])[0]["file"] == '{"a tokenizer": 1}'
    )


def test_a_server_that_ignores_ranges_is_not_read_to_the_end(server: Hub, tmp_path: Path) -> None:
    files = with_big_shards()
    del files["b.safetensors"], files["model.safetensors.index.json"]
    server.add("org/norange", files, ignores_range=True)
    opened = open_on(server.url, tmp_path, [{"repo": "org/norange"}])[0]
    assert list(opened["tensors"]) == ["big"], opened


def test_broken_repos_are_refused_as_broken_folders_are(server: Hub, tmp_path: Path) -> None:
    """Every adversarial checkpoint that is a matter of bytes gets the same refusal from a repo as from a folder."""
    cases = {}
    for case in adversarial.CASES:
        folder = tmp_path / case.name / "checkpoint"
        folder.mkdir(parents=True)
        case.build(folder)
        if all(path.is_file() for path in folder.iterdir()):
            server.add(f"org/{case.name}", {path.name: path.read_bytes() for path in folder.iterdir()})
            cases[case.name] = case
    assert len(cases) > 50
    results = open_on(server.url, tmp_path, [{"repo": f"org/{name}"} for name in cases])
    for (name, case), result in zip(cases.items(), results, strict=True):
        text = result.get("error", "was accepted")
        assert [phrase for phrase in case.phrases if phrase not in text] == [], f"{name}: {text}"


def test_refusals_and_failures_of_the_hub_are_one_sentence(server: Hub, tmp_path: Path) -> None:
    good = adversarial.good_files()
    first = adversarial.FIRST
    server.add("org/gated", good, status=403, error_code="GatedRepo")
    server.add("org/gatedfiles", good, files_status=403, error_code="GatedRepo")
    server.add("org/private", good, status=401)
    server.add("org/forbidden", good, status=403)
    server.add("org/busy", good, failures=[503] * 99)
    server.add("org/recovers", good, failures=[503, 429])
    server.add("org/cut", good, cuts=20)
    server.add("org/nosize", good, sizes={first: None})
    server.add("org/liar", good, sizes={first: 10_000})
    server.add("org/escape", {**good, "../../x.json": b"{}"})
    server.add("org/good", good)
    wanted = [
        ({"repo": "org/absent"}, ["org/absent", "no folder here", "does not exist", "401", "hf auth login"]),
        ({"repo": "org/gated"}, ["org/gated", "gated", "accept its terms"]),
        ({"repo": "org/gatedfiles"}, ["org/gatedfiles", "gated", "accept its terms"]),
        ({"repo": "org/private"}, ["org/private", "not open to you", "401", "hf auth login"]),
        ({"repo": "org/forbidden"}, ["org/forbidden", "403", "hf auth login"]),
        ({"repo": "org/good", "revision": "v9"}, ["org/good@v9", "no revision of that name"]),
        ({"repo": "org/busy"}, ["org/busy", "503", "try again later"]),
        ({"repo": "org/cut"}, [first, "sent 20 of", "Try again"]),
        ({"repo": "org/nosize"}, [first, "no size", "Download it"]),
        ({"repo": "org/liar"}, [first, "/10000", "download the checkpoint"]),
        ({"repo": "org/escape"}, ["org/escape", "'../../x.json'", "no usable name"]),
    ]
    results = open_on(server.url, tmp_path, [spec for spec, _ in wanted] + [{"repo": "org/recovers"}])
    for (spec, phrases), result in zip(wanted, results, strict=False):
        text = result.get("error", f"accepted: {result}")
        assert [phrase for phrase in phrases if phrase not in text] == [], f"{spec}: {text}"
        assert "\n" not in text and len(text) < 400
    assert "tensors" in results[-1], results[-1]


@pytest.mark.parametrize(
    ("environment", "phrase"),
    [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids asking the Hub"), ({}, "check the path, or the network")],
)
def test_without_a_network_the_refusal_says_so(tmp_path: Path, environment: dict[str, str], phrase: str) -> None:
    # Port 9 (discard) is closed on any ordinary machine.
    text = open_on("http://127.0.0.1:9", tmp_path, [{"repo": "org/model"}], environment)[0]["error"]
    assert "org/model" in text and phrase in text and "\n" not in text
