"""Of the long lists in m3quant's own files only lines that repeat others are left out, and nothing is found elsewhere or less."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path

import pytest

from m3quant.publish.files import PublishFile
from m3quant.publish.scan import Allowed, scan, scan_file
from m3quant.publish.scan.allow import Entry
from m3quant.publish.scan.lists import LINE_BYTES, REPEATING, without_repeats
from tests.support.paths import FIXTURES

KEY = "hf_" + "".join(random.Random(3).choices("abcdefghijkmnpqrstuvwxyzABCDEFG23456789", k=34))
PARTS = ("weight_packed", "weight_scale", "weight_shape")


def index(extra: dict[str, str] | None = None) -> dict[str, object]:
    names = (f"model.layers.{n}.mlp.experts.{e}.{w}.{p}" for n in range(40) for e in range(30) for w in ("w1", "w2", "w3") for p in PARTS)  # fmt: skip
    weight_map = {name: f"model-{number // 100 + 1:05d}-of-00108.safetensors" for number, name in enumerate(names)}
    return {"metadata": {"total_size": 7}, "weight_map": weight_map | (extra or {})}


def folded(document: object) -> list[str]:
    raw = json.dumps(document, indent=2).encode()
    return without_repeats(io.BytesIO(raw)).getvalue().decode().split("\n")


def as_file(folder: Path, name: str, text: str) -> PublishFile:
    (folder / name).write_text(text)
    return PublishFile(name, folder / name, len(text), "")


def test_lists_of_tensors_shrink_and_lines_keep_their_numbers() -> None:
    whole = json.dumps(index(), indent=2).split("\n")
    left = folded(index())
    assert len(left) == len(whole) and all(line in ("", full) for line, full in zip(left, whole, strict=True))
    assert sum(map(bool, left)) < 20 < 10_000 < len(whole)


def test_tensors_of_a_manifest_shrink() -> None:
    tensors = {f"model.layers.{n}.experts.{e}.w1.weight": {"dtype": "F8_E4M3", "shape": [128, 256], "kind": "fp8-block", "scale": "F32"} for n in range(9) for e in range(99)}  # fmt: skip
    assert sum(map(bool, folded({"source": {"tensors": tensors}}))) < 20


@pytest.mark.parametrize(
    "entry",
    [
        {f"model.layers.3.{KEY}.weight": "model-00001-of-00108.safetensors"},
        {"model.layers.3.mlp.experts.3.w1.weight_packed2": f"model-00001-of-00108.safetensors {KEY}"},
        {"model.layers.3.mlp.experts.3.w1.x": "/home/alice/work/model-00001-of-00108.safetensors"},
        {"model.layers.3.mlp": "172.16.3.4"},
    ],
)
def test_what_is_planted_among_them_is_found_at_its_line(entry: dict[str, str], tmp_path: Path) -> None:
    text = json.dumps(index(entry), indent=2)
    [key] = entry
    line = next(number for number, line in enumerate(text.split("\n"), 1) if f'"{key}"' in line)
    for name in sorted(REPEATING):
        found = list(scan_file(as_file(tmp_path, name, text)))
        assert [finding.line for finding in found] == [line], found


def test_what_is_found_in_a_line_is_found_in_those_that_differ_in_a_number(tmp_path: Path) -> None:
    """Else an entry that allows one host by its exact text would let the others of its shape pass."""
    hosts = [f"node.{number}.internal" for number in (7, 8, 31)]
    text = json.dumps(index(dict.fromkeys(hosts, "model-00001-of-00108.safetensors")), indent=2)
    for name in sorted(REPEATING):
        file = as_file(tmp_path, name, text)
        assert [finding.found for finding in scan_file(file)] == hosts
        entry = Entry(text=re.escape(hosts[0]), reason="a host of the documentation")
        assert [finding.found for finding in scan([file], allowed=Allowed((entry,)))] == hosts[1:]


def test_the_same_is_found_as_without_it(tmp_path: Path) -> None:
    """Lines of all forms with planted ones between them, in random order: the index against a file of another name."""
    numbers = random.Random(7)
    lines = json.dumps(index(), indent=1).split("\n")[:3000]
    for _ in range(30):
        kind = numbers.choice(("hf_{}", "/home/{}/x", "10.0.{}.7", '"key": "{}"', "AKIA{}"))
        tail = "".join(numbers.choices("ABCDEFGHJKLMNPQRSTUVWXYZ234567", k=34))
        lines.insert(numbers.randrange(len(lines)), kind.format(tail[:16] if kind.startswith("AKIA") else tail))
    text = "\n".join(lines)
    listed, plain = (
        {(finding.kind, finding.line, finding.found) for finding in scan_file(as_file(tmp_path, name, text))}
        for name in (sorted(REPEATING)[0], "notes.json")
    )
    assert listed == plain and len(listed) >= 10


def test_addresses_and_sums_are_no_repeats() -> None:
    lines = [f'"model.layers.1.w{n}": "10.0.0.{n}",\n' for n in range(5)]
    lines += [f'"a.b": "{n:064x}",\n' for n in range(5)] + [f'"v": "1.{n}.2"\n' for n in range(5)]
    raw = "".join(lines).encode()
    assert without_repeats(io.BytesIO(raw)).getvalue() == raw


def test_text_of_this_machine_is_found_whatever_it_looks_like(tmp_path: Path) -> None:
    lines = [f'"gpu.{number}.cluster": {{' for number in range(5)]
    for name in sorted(REPEATING):
        found = list(scan_file(as_file(tmp_path, name, "\n".join([*lines, ""])), ["gpu.3.cluster"]))
        assert [finding.line for finding in found] == [4]


def test_the_end_of_what_began_before_is_kept(tmp_path: Path) -> None:
    """A line, or the last piece of one, that would be a repeat by itself."""
    key = "AKIA" + "QWERTZUIOPAS" + "2345"
    long = "x" * (LINE_BYTES - 17) + " " + key  # the last four of the key are the second piece
    name = sorted(REPEATING)[0]
    found = list(scan_file(as_file(tmp_path, name, f"1,\n2345\n{long}\n")))
    assert [finding.line for finding in found] == [3]
    wrapped = b'"' + b"QUJD" * 19 + b"\n1234\n"
    assert without_repeats(io.BytesIO(b"1,\n1234\n" + wrapped)).getvalue() == b"1,\n1234\n" + wrapped


def test_numbers_that_may_be_text_in_hex_are_no_repeats() -> None:
    raw = b"1,\n" + 2 * (b"6869" * 8 + b"\n")
    assert without_repeats(io.BytesIO(raw)).getvalue() == raw


def test_a_line_without_end_takes_linear_time_and_is_kept() -> None:
    for text in (b"0" * 3_000_000, b'"' + b"a." * 1_500_000, b"[" * 3_000_000, b'"a.b": {' + b" " * 3_000_000):
        assert without_repeats(io.BytesIO(text)).getvalue() == text
    assert LINE_BYTES < 10**6


def test_the_indices_of_the_fixtures_have_these_forms() -> None:
    for name in ("tiny-m2", "tiny-m3"):
        with open(FIXTURES / name / "model.safetensors.index.json", "rb") as file:
            left = without_repeats(file).getvalue().decode()
        kept = [line for line in left.split("\n") if line]
        skeletons = {re.sub(r"\.[0-9]+\.", ".#.", line.partition(":")[0]) for line in kept}
        assert len(kept) <= len(skeletons) + 3, kept
