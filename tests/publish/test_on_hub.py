"""An output against its base on the Hub: the real huggingface_hub client asks a server here for the file list and its hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from m3quant.cli import cli
from m3quant.errors import CheckpointError, PublishError
from m3quant.publish.base import Base
from m3quant.publish.gates import Asked, prepare
from m3quant.publish.on_hub import base_problems
from tests.support.publish.outputs import COMMIT, converted, manifest_of, source_like

NAME = "MiniMaxAI/MiniMax-M3"
DATASETS = {"a/benchmark": ["README.md", "eval.yaml"], "a/plain": ["README.md"]}


class Repos(BaseHTTPRequestHandler):
    """GET /api/models/ORG/NAME/revision/COMMIT, and datasets likewise."""

    repos: dict[str, dict[str, bytes]] = {}  # noqa: RUF012 - emptied by the fixture

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[1] == "datasets":
            self.dataset("/".join(parts[2:4]))
            return
        files = self.repos.get("/".join(parts[2:4]))
        if files is None or parts[5] != COMMIT:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if files is None else "RevisionNotFound")
            self.end_headers()
            return
        siblings = [sibling(name, data) for name, data in files.items()]
        self.answer({"_id": "1", "id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings})

    def dataset(self, name: str) -> None:
        if name not in DATASETS:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            return
        self.answer({"_id": "1", "id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in DATASETS[name]]})

    def answer(self, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def sibling(name: str, data: bytes) -> dict[str, Any]:
    """A file as the Hub lists it: a large one with its sha256, a small one with git's hash of it."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    large = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    entry = {"rfilename": name, "size": len(data), "blobId": blob}
    return {**entry, "lfs": large} if len(data) > 100_000 else entry


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, bytes]]:
    """The base on the Hub: a server that has the files of `source_like`."""
    source = source_like(tmp_path / "hub")
    files = {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}
    Repos.repos = {NAME: files}
    server = HTTPServer(("127.0.0.1", 0), Repos)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield files
    server.shutdown()
    server.server_close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return converted(source_like(tmp_path / "m3"), tmp_path / "out")


def ask(**changes: Any) -> Asked:
    return Asked(**{"base_repo": NAME, "serving": [], "online": True, **changes})


def test_the_base_itself_passes(hub: dict[str, bytes], out: Path) -> None:
    hub["SHA256SUMS"] = b"of the base's own files"
    hub[".gitattributes"] = b"*.safetensors filter=lfs"
    assert prepare(out, ask()).base.revision == COMMIT


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "LICENSE"])
def test_a_file_that_the_hub_has_otherwise_is_refused(name: str, hub: dict[str, bytes], out: Path) -> None:
    hub[name] += b" "
    with pytest.raises(PublishError, match=f"{name} is not the file that {NAME} has at 0123456789ab"):
        prepare(out, ask())


def test_a_file_that_was_never_downloaded_is_refused(hub: dict[str, bytes], out: Path) -> None:
    hub["preprocessor_config.json"] = b"{}"
    with pytest.raises(PublishError, match=r"has preprocessor_config.json, which .* lacks: download the base whole"):
        prepare(out, ask())


def test_files_that_the_base_never_had_are_refused(hub: dict[str, bytes], out: Path) -> None:
    del hub["figures.json"]
    with pytest.raises(PublishError, match=r"figures.json was carried over, but"):
        prepare(out, ask())


def test_a_licence_supplied_by_hand_is_refused_where_the_base_has_one(hub: dict[str, bytes], tmp_path: Path) -> None:
    source = source_like(tmp_path / "partial")
    (source / "LICENSE").unlink()
    out = converted(source, tmp_path / "partial-int4")
    (out / "LICENSE").write_bytes(hub["LICENSE"])
    with pytest.raises(PublishError, match="carries LICENSE, but LICENSE was supplied by hand"):
        prepare(out, ask())


def test_a_base_or_commit_that_the_hub_lacks_is_one_sentence(hub: dict[str, bytes], out: Path) -> None:
    licence = prepare(out, ask()).licence
    for base in (Base("MiniMaxAI/MiniMax-M2", COMMIT, True), Base(NAME, "f" * 40, True)):
        with pytest.raises(CheckpointError, match="on the Hub"):
            base_problems(out, manifest_of(out), base, licence)
    Repos.repos = {}
    run = CliRunner().invoke(cli, ["card", str(out), "--check", "--online", "--base-repo", NAME])
    assert run.exit_code != 0 and isinstance(run.exception, CheckpointError)


def report(out: Path, dataset: str) -> None:
    """A figure of one benchmark in the Hub's own format."""
    (out / ".eval_results").mkdir(exist_ok=True)
    entry = {"dataset": {"id": dataset, "task_id": "diamond"}, "value": 41.2, "notes": "temperature 0"}
    (out / ".eval_results" / "mine.yaml").write_text(yaml.safe_dump([entry]), encoding="utf-8")


def test_a_registered_benchmark_is_shown_and_sent(hub: dict[str, bytes], out: Path) -> None:
    report(out, "a/benchmark")
    prepared = prepare(out, ask())
    assert "| diamond | 41.2 |  | temperature 0 |" in prepared.card_path.read_text(encoding="utf-8")
    assert ".eval_results/mine.yaml" in {f.path_in_repo for f in prepared.files}


@pytest.mark.parametrize(("dataset", "refusal"), [("a/plain", "is no benchmark"), ("a/none", "the Hub does not have")])
def test_a_dataset_that_is_no_benchmark_is_refused(
    dataset: str, refusal: str, hub: dict[str, bytes], out: Path
) -> None:
    report(out, dataset)
    with pytest.raises(PublishError, match=refusal):
        prepare(out, ask())


@pytest.mark.parametrize("text", ["value: 3", "- {value: 3}", "- [", "[]", "- {dataset: {id: a/b}, value: 1}"])
def test_eval_results_in_another_format_are_refused(text: str, out: Path) -> None:
    report(out, "a/benchmark")
    (out / ".eval_results" / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(PublishError, match=r"mine.yaml") as caught:
        prepare(out, ask(online=False))
    assert "\n" not in str(caught.value)
