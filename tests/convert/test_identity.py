"""Which source an output is made of, by content: another one is refused by name, the same one in another place is not.

Weights are edited far from the blocks that are sampled, with size and mtime put back, so that only reading them shows it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3quant.checkpoint import Checkpoint
from m3quant.errors import M3QuantError, OutputError
from m3quant.running.progress import Silent
from tests.support.convert.common import files, make_plan_of, make_source, run_convert, run_plan, same_output
from tests.support.convert.tampering import SaidLines, edit_unsampled, flip, interrupt

WIDE = {"hidden_size": 256, "intermediate_size": 256}  # shards much larger than what is sampled of them


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_source(tmp_path_factory.mktemp("identity") / "src", "m2", **WIDE)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "src")


def first_layer_shard(folder: Path) -> str:
    return next(i.shard for n, i in Checkpoint.open(folder).tensors.items() if ".layers.0." in n and "experts" in n)


@pytest.mark.parametrize("to", ["int4", "awq"])
def test_another_model_of_the_same_shapes_is_refused_at_every_stage(tmp_path: Path, to: str) -> None:
    first, second = (make_source(tmp_path / name, "m2", seed) for seed, name in enumerate(("a", "b")))
    out = tmp_path / "out"
    interrupt(first, out, to)
    before = files(out)
    with pytest.raises(OutputError, match=r"another source: model-00001-of-00003.safetensors holds other weights"):
        run_convert(second, out, to)
    assert files(out) == before
    run_convert(first, out, to)
    whole = files(out)
    with pytest.raises(
        OutputError, match=r"is complete and was made with other settings \(another source: model-00001"
    ):
        run_convert(second, out, to)
    assert files(out) == whole


def rewrite_copy(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
        os.utime(path, (1, 1))


@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_the_same_bytes_in_other_files_are_the_same_source(source: Path, tmp_path: Path, finished: bool) -> None:
    out, moved, progress = tmp_path / "out", tmp_path / "moved", SaidLines()
    run_convert(source, out, "int4") if finished else interrupt(source, out)
    shutil.copytree(source, moved)
    rewrite_copy(moved)
    run_plan(make_plan_of(moved, "int4"), out, progress=progress)
    assert any("written or moved since" in line for line in progress.said)
    run_convert(source, tmp_path / "whole", "int4")
    manifests = [json.loads((folder / "m3quant.json").read_text()) for folder in (out, tmp_path / "whole")]
    assert same_output(out, tmp_path / "whole") in (
        [],
        ["m3quant.json"],
    )  # stamps are those of the files that were read
    assert manifests[0]["source"]["read"] == manifests[1]["source"]["read"]


def test_after_a_move_that_was_looked_into_nothing_is_read_again(source: Path, tmp_path: Path) -> None:
    out, moved, progress = tmp_path / "out", tmp_path / "moved", SaidLines()
    interrupt(source, out, units=1)
    shutil.copytree(source, moved)
    interrupt(moved, out, units=2)
    run_plan(make_plan_of(moved, "int4"), out, progress=progress)
    assert not any("written or moved" in line for line in progress.said)


@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
@pytest.mark.parametrize("to", ["int4", "awq"])
def test_one_flipped_bit_in_what_was_read_is_refused_by_shard(
    copy: Path, tmp_path: Path, to: str, finished: bool
) -> None:
    out, shard = tmp_path / "out", first_layer_shard(copy)
    run_convert(copy, out, to) if finished else interrupt(copy, out, to)
    edit_unsampled(copy, shard)
    with pytest.raises(OutputError, match=rf"another source: {shard} h(olds|eld) other weights"):
        run_convert(copy, out, to)


def test_a_weight_that_nothing_was_made_of_yet_may_still_change(copy: Path, tmp_path: Path) -> None:
    """Nothing was read of it, so that the output is wholly of the source as it is now."""
    out = tmp_path / "out"
    interrupt(copy, out, units=1)
    last = next(i for n, i in Checkpoint.open(copy).tensors.items() if ".layers.1." in n and n.endswith("w1.weight"))
    edit_unsampled(copy, last.shard, last.name)
    run_convert(copy, out, "int4")
    run_convert(copy, tmp_path / "whole", "int4")
    assert same_output(out, tmp_path / "whole") == []


EDITS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json has changed"),
    "gone": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is gone"),
    "config": (lambda f: edit_config(f), "config.json has changed"),
}


def edit_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 3}))


@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_file_beside_the_weights_is_named(copy: Path, tmp_path: Path, edit: str, finished: bool) -> None:
    out = tmp_path / "out"
    run_convert(copy, out, "int4") if finished else interrupt(copy, out)
    change, words = EDITS[edit]
    change(copy)
    with pytest.raises(OutputError, match=f"another source: {words}"):
        run_convert(copy, out, "int4")


def test_a_file_that_has_come_since_is_taken_along_while_there_is_time(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(copy, out)
    (copy / "chat_template.jinja").write_text("hello")
    run_convert(copy, out, "int4")
    assert (out / "chat_template.jinja").read_text() == "hello"
    (copy / "merges.txt").write_text("a b")
    with pytest.raises(OutputError, match=r"another source: merges.txt is new"):
        run_convert(copy, out, "int4")


def test_a_file_edited_while_the_conversion_runs_is_refused_and_nothing_is_lost(copy: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", copy / "tokenizer.json"
    earlier = path.read_bytes()

    class Editing(Silent):
        def advance(self, count: int) -> None:
            path.write_text("{}")

    with pytest.raises(OutputError, match=r"tokenizer.json of the source has changed since the conversion"):
        run_plan(make_plan_of(copy, "int4"), out, progress=Editing())
    path.write_bytes(earlier)
    progress = SaidLines()
    run_plan(make_plan_of(copy, "int4"), out, progress=progress)
    assert any("3 of 3 shards are finished" in line for line in progress.said)


def record_download(folder: Path, commit: str, etags: dict[str, str], later: float = 10.0) -> None:
    """What huggingface_hub leaves next to a download."""
    for path in folder.iterdir():
        if path.is_file():
            note = folder / ".cache/huggingface/download" / f"{path.name}.metadata"
            note.parent.mkdir(parents=True, exist_ok=True)
            etag = etags.get(path.name, "0" * 40)
            note.write_text(f"{commit}\n{etag}\n{path.stat().st_mtime + later}\n")


def test_another_revision_or_checksum_of_the_hub_is_refused(copy: Path, tmp_path: Path) -> None:
    out, shard = tmp_path / "out", first_layer_shard(copy)
    record_download(copy, "a" * 40, {shard: "1" * 64})
    interrupt(copy, out)
    record_download(copy, "b" * 40, {shard: "1" * 64})
    with pytest.raises(OutputError, match=f"another source: its revision was {'a' * 40}, now {'b' * 40}"):
        run_convert(copy, out, "int4")
    record_download(copy, "a" * 40, {shard: "2" * 64})
    with pytest.raises(OutputError, match=f"another source: {shard} holds other weights"):
        run_convert(copy, out, "int4")
    record_download(copy, "a" * 40, {shard: "2" * 64}, later=-10.0)  # void: the file was written after it
    run_convert(copy, out, "int4")


@pytest.mark.parametrize("to", ["int4", "awq"])
def test_another_torch_is_refused_for_every_recipe(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    out = tmp_path / "out"
    interrupt(source, out, to)
    monkeypatch.setattr("torch.__version__", "1.0")
    with pytest.raises(OutputError, match=r"torch was '.*', now '1.0'"):
        run_convert(source, out, to)


def test_a_flipped_bit_in_a_finished_data_free_shard_is_found_and_the_shard_made_again(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(source, out)
    flip(out / "model-00002-of-00003.safetensors", -5)
    run_convert(source, out, "int4")
    run_convert(source, tmp_path / "whole", "int4")
    assert same_output(out, tmp_path / "whole") == []


def test_a_flipped_bit_in_a_calibrated_layer_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(source, out, "awq")
    states = next((out / ".m3quant").glob("boundary-*-quantized.states"))
    flip(states, 100)
    with pytest.raises(OutputError, match=f"{states.name} is missing or holds other hidden states"):
        run_convert(source, out, "awq")
    flip(states, 100)
    flip(out / "model-00002-of-00003.safetensors", -5)
    with pytest.raises(OutputError, match=r"model-00002-of-00003.safetensors was finished but holds other bytes now"):
        run_convert(source, out, "awq")
    flip(out / "model-00002-of-00003.safetensors", -5)
    flip(out / "model-00001-of-00003.safetensors", -5)  # belongs to no layer: made again
    run_convert(source, out, "awq")
    run_convert(source, tmp_path / "whole", "awq")
    assert same_output(out, tmp_path / "whole") == []


def mutated(data: bytes, random_: random.Random) -> bytes:
    """Damage as disks and editors do it: bits, cuts, lines that are lost, doubled, swapped, or of another kind."""
    kind, lines = random_.randrange(6), data.splitlines(keepends=True)
    if kind == 0:
        at = random_.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << random_.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[: random_.randrange(len(data))]
    if kind == 2:
        return b"".join(random_.sample(lines, len(lines) - 1))
    if kind == 3:
        return data + random_.choice(lines)
    if kind == 4:
        junk = (b"[" * 100_000, b"1e999\n", b'{"unit": 1}\n', b"\xff\n", b"null\n", b"9" * 5000 + b"\n", b'"\\ud800"\n')
        return random_.choice([data, b""]) + random_.choice(junk)
    start, end = sorted(random_.sample(range(len(data)), 2))
    return data[:start] + data[end:]


@pytest.mark.parametrize("name", ["units.jsonl", "job.json"])
@pytest.mark.parametrize("to", ["int4", "awq"])
def test_a_damaged_journal_is_a_sentence_or_does_no_harm(source: Path, tmp_path: Path, to: str, name: str) -> None:
    """However it is damaged: the run is refused, or ends with the bytes of an undisturbed one."""
    begun, whole, out = tmp_path / "begun", tmp_path / "whole", tmp_path / "out"
    interrupt(source, begun, to)
    run_convert(source, whole, to)
    good, refused = (begun / ".m3quant" / name).read_bytes(), 0
    random_ = random.Random(7)
    for number in range(40 if to == "int4" else 5):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(begun, out)
        (out / ".m3quant" / name).write_bytes(mutated(good, random_))
        try:
            run_convert(source, out, to)
        except M3QuantError as error:
            assert str(out) in str(error), number
            refused += 1
        else:
            assert same_output(out, whole) == [], number
    assert refused


def test_a_record_of_an_unknown_unit_is_a_sentence(source: Path, tmp_path: Path) -> None:
    from m3quant.artifact.records import ConvertedUnit, seal, unseal

    out = tmp_path / "out"
    interrupt(source, out)
    path = out / ".m3quant" / "units.jsonl"
    whole = path.read_bytes()
    record = unseal(whole.splitlines()[0], ConvertedUnit).model_dump()
    for change in ({"unit": 70}, {"unit": 2}, {"size": 5}, {"shard": "../x"}, {"layer": 0}):
        path.write_bytes(whole + seal({**record, **change}) + b"\n")
        with pytest.raises(OutputError, match=r"units.jsonl holds a record .* it is damaged; remove"):
            run_convert(source, out, "int4")


def test_a_journal_of_an_earlier_layout_is_told_as_that(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(source, out)
    (out / ".m3quant" / "job.json").write_text('{"fingerprint": "x", "version": "0.1.0"}\n')
    with pytest.raises(OutputError, match=r"was written by another version of m3quant \(schema 1"):
        run_convert(source, out, "int4")
