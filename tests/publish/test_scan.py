"""Planted secrets and paths are found in every kind of file that is published; text that only looks like them is not."""

from __future__ import annotations

import hashlib
import json
import random
import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from m3quant.publish.files import PublishFile
from m3quant.publish.scan import scan
from tests.support.publish.outputs import FIXTURES

# Made when the test runs, so that no scanner of this repository takes them for real.
_RANDOM = random.Random(7)


def _letters(count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    return "".join(_RANDOM.choice(alphabet) for _ in range(count))


SECRETS = {
    "Hugging Face token": "hf_" + _letters(34),
    "API key": "sk-proj-" + _letters(30) + "7a",
    "AWS access key": "AKIA" + _letters(16, string.ascii_uppercase + string.digits),
    "AWS secret key": "aws_secret_access_key = " + _letters(40),
    "GitHub token": "ghp_" + _letters(36),
    "Slack token": "xoxb-" + _letters(30),
    "Google API key": "AIza" + _letters(35),
    "private key": "-----BEGIN RSA PRIVATE KEY-----\n" + _letters(64) + "\n-----END RSA PRIVATE KEY-----",
    "JSON web token": f"eyJ{_letters(20)}.eyJ{_letters(30)}.{_letters(30)}",
    "password in a URL": "https://someone:" + _letters(12) + "@host.example/path",
}
PATHS = [
    "/home/someone/models/m3",
    "/root/m3/weights",
    "file:///home/someone/m3",
    "/mnt/disk1/m3",
    "/Users/someone/m3",
    "/tmp/run-1/out",
    "C:\\Users\\someone\\m3",
]
KINDS = ["json", "md", "html", "yaml", "txt", "py", "jinja", "safetensors"]


def planted(folder: Path, kind: str, text: str) -> PublishFile:
    """A file of this kind with `text` somewhere inside."""
    path = folder / f"file.{kind}"
    if kind == "safetensors":
        save_file({"w": torch.zeros(4)}, path, metadata={"note": text})
    elif kind == "json":
        path.write_text(json.dumps({"a": [1, {"note": text}]}, indent=1), encoding="utf-8")
    elif kind == "html":
        path.write_text(f"<html><body><p title='x'>\n{text}</p></body></html>", encoding="utf-8")
    else:
        path.write_text(f"first line\nsecond: {text}\nthird\n", encoding="utf-8")
    return as_file(path)


def as_file(path: Path, name: str | None = None) -> PublishFile:
    data = path.read_bytes()
    return PublishFile(name or path.name, path, len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("secret", sorted(SECRETS))
def test_a_planted_secret_is_found_and_not_repeated(secret: str, kind: str, tmp_path: Path) -> None:
    found = scan([planted(tmp_path, kind, SECRETS[secret])])
    assert secret in {f.kind for f in found}
    assert all(SECRETS[secret] not in str(f) for f in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_a_planted_machine_path_is_found(path: str, kind: str, tmp_path: Path) -> None:
    assert [f.kind for f in scan([planted(tmp_path, kind, f"from {path} on")])] == ["machine path"]


def test_a_key_with_hyphens_in_it_is_found(tmp_path: Path) -> None:
    key = "sk-ant-api03-" + "-".join(_letters(9) for _ in range(9))
    found = scan([planted(tmp_path, "txt", key)])
    assert [f.kind for f in found] == ["API key"] and key not in str(found[0])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_other_encodings_hide_nothing(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(f"{SECRETS['Hugging Face token']} in /home/someone/m3", encoding=encoding)
    assert {f.kind for f in scan([as_file(path)])} == {"Hugging Face token", "machine path"}


def test_slashes_that_json_escapes_hide_nothing(tmp_path: Path) -> None:
    file = planted(tmp_path, "txt", '{"made in": "\\/home\\/someone\\/m3", "from": "\\/opt\\/mine"}')
    assert {f.kind for f in scan([file], ["/opt/mine"])} == {"machine path", "text of this machine"}


INNOCENT = [
    "hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "hf download org/name --local-dir m3",
    "risk-assessment-of-a-very-long-hyphenated-word",
    "sk-learn-style-estimators-with-a-long-name",
    "AKIAIOSFODNN7EXAMPLE",
    "-----BEGIN PRIVATE KEY----- begins such a file",
    "https://huggingface.co/org/name/tree/main?a=b@c",
    "~/home/x and $HOME/home/x and ./home/someone/x",
    "GET /home and https://host.example/home/page and https://host/root/x",
    "the /usr/lib/x86 and /etc/hosts files, s/tmp/x/, and/or root/tmp",
    "sha256 " + "0123456789abcdef" * 4,
]


@pytest.mark.parametrize("text", INNOCENT)
def test_text_that_only_looks_like_one_passes(text: str, tmp_path: Path) -> None:
    assert scan([planted(tmp_path, "txt", text)]) == []


def test_strings_of_this_machine_are_found_and_short_ones_ignored(tmp_path: Path) -> None:
    file = planted(tmp_path, "md", "made in opt-models-of-mine by me")
    assert [f.kind for f in scan([file], ["opt-models-of-mine", "me"])] == ["text of this machine"]


def test_a_vocabulary_may_hold_paths_but_no_keys(tmp_path: Path) -> None:
    parsed = json.loads((FIXTURES / "tiny-m3" / "tokenizer.json").read_text(encoding="utf-8"))
    parsed["model"]["vocab"]["/home/someone/models"] = 5000
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(parsed), encoding="utf-8")
    assert scan([as_file(path)]) == []
    parsed["note"] = "/home/someone/models"
    path.write_text(json.dumps(parsed), encoding="utf-8")
    assert [f.kind for f in scan([as_file(path)])] == ["machine path"]
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text(json.dumps({"/root/x/y": 1, SECRETS["Hugging Face token"]: 2}), encoding="utf-8")
        assert [f.kind for f in scan([as_file(tmp_path / name)])] == ["Hugging Face token"]


def test_both_fixtures_are_clean() -> None:
    files = [as_file(p, p.name) for family in ("tiny-m2", "tiny-m3") for p in sorted((FIXTURES / family).iterdir())]
    assert len(files) > 15 and scan(files) == []


@pytest.mark.parametrize("kind", ["AWS access key", "Google API key", "private key", "JSON web token"])
def test_a_letter_that_grows_in_lower_case_hides_no_key(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"\u0130stanbul\n{SECRETS[kind]}\n", encoding="utf-8")
    found = scan([PublishFile("README.md", path, path.stat().st_size, "")])
    assert kind in {finding.kind for finding in found}
