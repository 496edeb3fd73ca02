"""m3quant.json and eval.json: records of schema 1 stay readable, and no damaged one is more than a sentence."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3quant.artifact.eval_record import EvalRecord
from m3quant.artifact.journal import FOLDER, JOB, LOCK, RECORDS, Journal
from m3quant.artifact.manifest import MANIFEST_SCHEMA, Manifest, Sums, load_manifest, parse_manifest
from m3quant.artifact.output import read_manifest
from m3quant.checkpoint.bounded import MANIFEST_BYTES
from m3quant.errors import M3QuantError, OutputError
from m3quant.verify.verification import verify
from tests.support.convert.common import make_plan_of, make_source, run_convert, run_plan
from tests.support.convert.tampering import SaidLines

SAMPLES = Path(__file__).parent / "schema1"


@pytest.mark.parametrize("name", ["manifest-int4.json", "manifest-awq.json"])
def test_a_manifest_of_schema_1_is_read_whole(name: str) -> None:
    manifest = load_manifest(SAMPLES / name, Manifest)
    assert manifest.schema_version == 1 < MANIFEST_SCHEMA
    assert manifest.source.identity is None and manifest.source.read == {}
    assert manifest.to_json() == json.loads((SAMPLES / name).read_text())


def test_an_evaluation_of_schema_1_is_read_whole() -> None:
    text = (SAMPLES / "eval.json").read_text()
    record = EvalRecord.model_validate_json(text)
    assert record.schema_version == 1 and record.computed is None
    assert record.model_dump(mode="json") == {**json.loads(text), "computed": None}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its output."""
    folder = tmp_path_factory.mktemp("manifest")
    source = make_source(folder / "src", "m2")
    (source / "tokenizer.json").write_text("{}")
    run_convert(source, folder / "out", "int4")
    return source, folder / "out"


def as_schema_1(output: Path) -> None:
    path = output / "m3quant.json"
    manifest = json.loads(path.read_text())
    for key in ("identity", "read"):
        del manifest["source"][key]
    manifest["job"]["torch"] = None
    path.write_text(json.dumps({**manifest, "schema": 1}))


def test_an_output_of_schema_1_is_complete_and_verified_and_what_cannot_be_compared_is_said(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    source, progress = made[0], SaidLines()
    out = shutil.copytree(made[1], tmp_path / "out")
    as_schema_1(out)
    run_plan(make_plan_of(source, "int4"), out, progress=progress)
    assert "was made before m3quant recorded what it read" in progress.said[0]
    said: list[str] = []
    assert verify(out, str(source), said.append)[0].holds
    assert any("before m3quant recorded what it read" in line for line in said)
    edited = shutil.copytree(source, tmp_path / "src")
    (edited / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(OutputError, match=r"another source: tokenizer.json has changed"):
        run_convert(edited, out, "int4")


def change(values: Any, random_: random.Random) -> Any:
    """The same values with one of them, at some depth, gone or of another kind."""
    if isinstance(values, dict) and values and random_.random() < 0.9:
        key = random_.choice(list(values))
        if random_.random() < 0.2:
            return {k: v for k, v in values.items() if k != key}
        return {**values, key: change(values[key], random_)}
    if isinstance(values, list) and values and random_.random() < 0.9:
        at = random_.randrange(len(values))
        return [*values[:at], change(values[at], random_), *values[at + 1 :]]
    return random_.choice([None, 5, -1, 1e400, "x", "", [], {}, [[]], {"a": None}, True, 10**30, "../../x", "\ud800"])


Use = Callable[[Path, Path], Any]
USES: dict[str, Use] = {
    "read": lambda source, out: read_manifest(out),
    "convert": lambda source, out: run_convert(source, out, "int4"),
    "verify": lambda source, out: verify(out, str(source), lambda line: None),
}


@pytest.mark.parametrize("use", USES)
def test_a_damaged_manifest_is_a_sentence_whatever_reads_it(made: tuple[Path, Path], tmp_path: Path, use: str) -> None:
    source, out = made[0], shutil.copytree(made[1], tmp_path / "out")
    good, random_, refused = json.loads((out / "m3quant.json").read_text()), random.Random(5), 0
    for number in range(400 if use == "read" else 25):
        (out / "m3quant.json").write_text(json.dumps(change(good, random_)))
        try:
            found = USES[use](source, out)
        except M3QuantError as error:
            assert str(error), number
            refused += 1
        else:
            refused += use == "verify" and not found[0].holds
    assert refused >= 10


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[" * 200_000, b"5", b"\xff", b"{}", b"9" * 5000, b'{"shards": {"\\ud800": 1}}']
)
def test_bytes_that_are_no_manifest_are_damaged(data: bytes) -> None:
    for kind in (Manifest, Sums):
        with pytest.raises(ValueError, match=r"^here is damaged \("):
            parse_manifest(data, "here", kind)


def test_a_manifest_of_a_later_schema_says_so(made: tuple[Path, Path]) -> None:
    later = {**json.loads((made[1] / "m3quant.json").read_text()), "schema": MANIFEST_SCHEMA + 1}
    with pytest.raises(ValueError, match="written by a newer m3quant"):
        parse_manifest(json.dumps(later).encode(), "here", Manifest)


def test_a_manifest_that_is_no_regular_file_or_too_large_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for a writer
    (tmp_path / "link").symlink_to("/etc/hostname")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MANIFEST_BYTES + 1)
    for name, words in (
        ("pipe", "is not a regular file"),
        ("link", "is a link to"),
        ("large", "more than the"),
        ("absent", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=words):
            load_manifest(tmp_path / name, Manifest)


@pytest.mark.parametrize("name", [JOB, RECORDS])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_journal_reads_no_link_and_no_pipe(name: str, kind: str, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    Journal.begin(out, {"a": 1}, {}).release()
    elsewhere.write_text("a secret\n")
    (out / FOLDER / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(out / FOLDER / name)
    else:
        (out / FOLDER / name).symlink_to(elsewhere)
    with pytest.raises(OutputError, match=rf"{name} is (not a regular file|a link to)"):
        Journal.begin(out, {"a": 1}, {})
    assert elsewhere.read_text() == "a secret\n"


def test_a_lock_that_is_a_link_is_not_made_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "out" / FOLDER).mkdir(parents=True)
    (tmp_path / "out" / FOLDER / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="cannot be locked"):
        Journal.begin(tmp_path / "out", {"a": 1}, {})
    assert not (tmp_path / "elsewhere").exists()
