"""Sizes as people write them."""

from __future__ import annotations

import pytest

from m3quant.running.words import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("8000000", 8_000_000), ("8MB", 8_000_000), ("118.4 GiB", 127_131_031_961), ("0.5kB", 500), ("1.9", 1)],
)
def test_bytes_of_a_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0.5", "0.0001 kB"])
def test_less_than_a_byte_is_not_none_at_all(text: str) -> None:
    with pytest.raises(ValueError, match="less than a byte"):
        parse_size(text)
