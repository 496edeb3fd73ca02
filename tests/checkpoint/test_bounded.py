"""Small files that would be large: refused by a sentence, in little memory. Links: refused by name, but for the Hub cache's."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from m3quant.checkpoint import Checkpoint
from m3quant.checkpoint.bounded import TEXT_BYTES, parse_yaml, read_bounded, read_json
from m3quant.checkpoint.copying import copy_file, hash_file
from m3quant.checkpoint.links import require_regular
from m3quant.errors import CheckpointError, OutputError, PublishError, RecipeError
from m3quant.evaluate.suites import load_suite
from m3quant.recipe.recipe import read_recipe_file
from m3quant.runtime.cost import load_prices
from tests.support import hostile
from tests.support.adversarial import CONFIG, INDEX, good_files, write
from tests.support.paths import ROOT

GB = 2**30


@contextmanager
def peak_bytes() -> Iterator[Callable[[], int]]:
    """The most memory that Python held inside the block, known until its end."""
    peak = 0
    tracemalloc.start()
    try:
        yield lambda: peak
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


@pytest.mark.parametrize("kind", hostile.YAML)
def test_yaml_that_expands_is_refused_before_a_value_is_made(kind: str) -> None:
    text = hostile.YAML[kind]()
    with pytest.raises(RecipeError, match=r"^the file .*(more than|nested|part of|number of)") as caught:
        parse_yaml(text, "the file", error=RecipeError)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        "!!int ''",
        "!!timestamp x",
        "a: 2001-99-99",
        "!!python/object/apply:os.system [x]",
        "a: [",
        "\0",
        "? [a]\n: b",
        "&a",
    ],
)
def test_what_is_no_plain_yaml_is_one_sentence(text: str) -> None:
    if text == "&a":
        assert parse_yaml(text, "it") in (None, "")
        return
    with pytest.raises(CheckpointError, match=r"^it is not YAML: .*\.$"):
        parse_yaml(text, "it")


def test_anchors_that_a_person_writes_are_kept() -> None:
    text = "base: &base {bits: 4, groups: [32, 64]}\nother: {<<: *base, bits: 3}\nagain: *base\nwhen: 12:30:00\n"
    assert parse_yaml(text, "it") == yaml.safe_load(text)


def test_every_yaml_file_goes_through_the_one_loader() -> None:
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("m3quant", "calibration", "runtime")
        for path in (ROOT / folder).rglob("*.py")
        if any(
            call in path.read_text(encoding="utf-8") for call in ("yaml.load(", "safe_load(", "full_load(", "load_all(")
        )
    ]
    assert found == ["m3quant/checkpoint/bounded.py"]


@pytest.mark.parametrize("read", [read_recipe_file, lambda p: load_suite(str(p)), load_prices])
def test_every_reader_of_yaml_is_bounded(read: object, tmp_path: Path) -> None:
    path = tmp_path / "it.yaml"
    path.write_text(hostile.alias_bomb(), encoding="utf-8")
    with pytest.raises(Exception, match="aliases expand") as caught:
        read(path)  # type: ignore[operator]
    assert type(caught.value).__module__ == "m3quant.errors"
    hostile.sparse(path, 3 * GB)
    with pytest.raises(Exception, match=r"3,221,225,472 bytes, more than the 1,048,576"):
        read(path)  # type: ignore[operator]


@pytest.mark.parametrize("name", [CONFIG, INDEX])
def test_a_config_or_index_of_gigabytes_is_not_read(name: str, tmp_path: Path) -> None:
    write(tmp_path, good_files())
    hostile.sparse(tmp_path / name, 3 * GB, b"{}")
    with peak_bytes() as peak, pytest.raises(CheckpointError, match=rf"{name} has 3,221,225,472 bytes, more than"):
        Checkpoint.open(tmp_path)
    assert peak() < 2**20


def test_a_file_that_is_carried_over_is_copied_in_pieces(tmp_path: Path) -> None:
    size = 96 * 2**20 + 17
    source = hostile.sparse(tmp_path / "notes.txt", size, b"first line\n")
    with peak_bytes() as peak:
        copied = copy_file(source, tmp_path / "copy.txt")
    assert peak() < 6 * 2**20
    data = source.read_bytes()
    assert (tmp_path / "copy.txt").read_bytes() == data and copied == hash_file(source)
    assert (copied.size, copied.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert copied.has_etag(copied.sha256)
    assert copied.has_etag(hashlib.sha1(b"blob %d\0" % size + data).hexdigest())
    assert not copied.has_etag(hashlib.sha1(data).hexdigest())


def test_an_empty_file_is_copied(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert copy_file(tmp_path / "empty", tmp_path / "copy").size == 0
    assert (tmp_path / "copy").read_bytes() == b""


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hostile.sparse(tmp_path / "notes.txt", 10 * 2**20)
    readv = os.readv

    def growing(descriptor: int, buffers: list[memoryview]) -> int:
        with source.open("ab") as file:
            file.write(b"more")
        return readv(descriptor, buffers)

    monkeypatch.setattr(os, "readv", growing)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        copy_file(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]


def test_json_is_bounded_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "m3quant.json"
    for text in ('{"a": 1, "a": 2}', "[]", '{"a": NaN}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\ud800"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(OutputError, match=r"m3quant\.json .*Remove it\.$"):
            read_json(path, TEXT_BYTES, "Remove it.", error=OutputError)
    path.write_text(json.dumps({"a": [1]}))
    assert read_json(path, TEXT_BYTES, "") == {"a": [1]}
    with pytest.raises(OutputError, match="more than the 5 that"):
        read_json(path, 5, "", error=OutputError)


@pytest.mark.parametrize("name", ["notes.txt", CONFIG, INDEX, "model-00001-of-00002.safetensors", "sub/notes.txt"])
@pytest.mark.parametrize("target", ["outside", "inside", "nowhere"])
def test_a_link_in_a_checkpoint_is_refused_by_name(name: str, target: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder, good_files())
    (folder / "sub").mkdir()
    path = folder / name
    aside = (folder / f"the.{path.suffix[1:]}.txt") if target == "inside" else tmp_path / "elsewhere"
    aside.write_bytes(path.read_bytes() if path.exists() else b"text")
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "absent" if target == "nowhere" else aside)
    with pytest.raises(CheckpointError, match=r"is a link to|absent from") as caught:
        Checkpoint.open(folder)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("shared", [False, True])
def test_the_hub_caches_own_links_are_followed(shared: bool, tmp_path: Path) -> None:
    direct = tmp_path / "direct"
    (direct / "sub").mkdir(parents=True)
    write(direct, good_files() | {"notes.txt": b"text", "sub/code.py": b"pass"})
    snapshot = hostile.cached(direct, tmp_path / "hub", shared)
    opened = Checkpoint.open(snapshot)
    assert opened.fingerprint() == Checkpoint.open(direct).fingerprint()
    assert opened.other_files == ["notes.txt", "sub/code.py"]
    assert opened.copy_file("sub/code.py", tmp_path / "code.py").size == 4
    (tmp_path / "link").symlink_to(snapshot)  # a person may name the folder by a link
    assert Checkpoint.open(tmp_path / "link").other_files == opened.other_files


@pytest.mark.parametrize(
    "target", ["../../../secret", "/etc/hostname", "../../blobs/absent", "../../refs/main", "notes.txt"]
)
def test_other_links_in_the_cache_are_not_followed(target: str, tmp_path: Path) -> None:
    direct = tmp_path / "direct"
    direct.mkdir()
    write(direct, good_files() | {"notes.txt": b"text"})
    snapshot = hostile.cached(direct, tmp_path / "hub")
    (tmp_path / "hub" / "secret").write_text("a secret")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(hostile.COMMIT)
    (snapshot / "more.txt").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"more\.txt is a link to"):
        Checkpoint.open(snapshot)


def test_a_file_replaced_by_a_link_after_the_opening_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder, good_files() | {"notes.txt": b"text"})
    opened = Checkpoint.open(folder)
    (tmp_path / "secret").write_text("a secret")
    (folder / "notes.txt").unlink()
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link to"):
        opened.file_bytes("notes.txt")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link to"):
        opened.copy_file("notes.txt", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "", ".", "a\\b", "a\nb"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a secret")
    (tmp_path / "in").mkdir()
    with pytest.raises(PublishError):
        require_regular(tmp_path / "in", name, PublishError)


def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "absent"):
        with pytest.raises(CheckpointError, match=name):
            require_regular(tmp_path, name)
        with pytest.raises(CheckpointError, match=name):
            read_bounded(tmp_path / name, 10)
