"""Tokenizers that are made to do harm: growth is refused before a text is given to them, failures are sentences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from m3quant.calibration.tokenizing import encode, growth
from m3quant.calibration.windows import load_tokenizer
from m3quant.errors import CalibrationError
from tests.support.paths import FIXTURES

FIXTURE = FIXTURES / "tiny-m2"
DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def changed(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(FIXTURE / name, folder / name)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, **changes}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [DOUBLING] * 40}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 10_000}},
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "x" * 1_000_000}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 30}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [DOUBLING] * 4}, DOUBLING, DOUBLING, DOUBLING]}},
    ],
)  # fmt: skip
def test_a_tokenizer_that_makes_much_of_little_is_refused_before_it_reads(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(
        CalibrationError, match=r"can make .* characters of one .*compare the file with the model's own"
    ):
        load_tokenizer(changed(tmp_path / "it", **changes))


def test_the_steps_of_released_tokenizers_pass(tmp_path: Path) -> None:
    prepend = {"type": "Prepend", "prepend": "x"}
    llama = {
        "type": "Sequence",
        "normalizers": [prepend, {"type": "Replace", "pattern": {"String": " "}, "content": "_"}],
    }
    assert load_tokenizer(changed(tmp_path / "it", normalizer=llama)).vocab_size > 0
    assert growth(llama) == 1 and growth(BYTES) == 2 and growth(DOUBLING) == 2
    assert growth({"type": "Replace", "pattern": {"Regex": "[ ]+"}, "content": "__"}) == 3
    assert load_tokenizer(FIXTURE).vocab_size > 0


def test_what_the_library_raises_is_a_sentence(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = load_tokenizer(changed(tmp_path / "it", pre_tokenizer=split))
    assert encode(tokenizer, "aa")
    with pytest.raises(CalibrationError, match=r"fails on a text of 41 characters .*retry-limit"):
        encode(tokenizer, "a" * 40 + "!")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(interrupted, "a")  # type: ignore[arg-type]
