"""Bit orders, against plain-Python packers written from the published layouts."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from m3quant.quant import packing


def random_codes(*shape: int, bits: int, seed: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)


def signed_word(nibbles: list[int], bits: int) -> int:
    word = sum(value << (bits * i) for i, value in enumerate(nibbles))
    return word - (1 << 32) if word >= 1 << 31 else word


def plain_rows(codes: torch.Tensor, bits: int) -> list[list[int]]:
    """Code i of a row in bits `bits * (i mod per_word)` of word i // per_word, offset by 2^(bits - 1)."""
    per_word, offset = 32 // bits, 1 << (bits - 1)
    rows = [[code + offset for code in row] for row in codes.tolist()]
    return [[signed_word(row[i : i + per_word], bits) for i in range(0, len(row), per_word)] for row in rows]


def plain_awq(codes: torch.Tensor) -> list[list[int]]:
    """Nibble i of word j holds column 8 j + [0, 2, 4, 6, 1, 3, 5, 7][i], offset by 8 (facts: AutoAWQ GEMM)."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return [[signed_word([row[j + o] + 8 for o in order], 4) for j in range(0, len(row), 8)] for row in codes.tolist()]


def test_known_words() -> None:
    row = torch.arange(-8, 8, dtype=torch.int8)[None]
    words = packing.pack_rows(row, 4)
    assert [w & 0xFFFFFFFF for w in words[0].tolist()] == [0x76543210, 0xFEDCBA98]
    assert words.numpy().tobytes() == bytes.fromhex("1032547698badcfe")
    columns = torch.arange(8, dtype=torch.int8)[None] - 8
    assert packing.pack_awq(columns).tolist() == [[0x75316420]]
    int8 = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    assert packing.pack_rows(int8, 8).numpy().tobytes() == bytes.fromhex("007f80ff")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_rows_equal_plain_and_compressed_tensors(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits=bits, seed=seed)
    packed = packing.pack_rows(codes, bits)
    assert packed.is_contiguous() and packed.shape == (rows, -(-columns * bits // 32))
    assert packed.tolist() == plain_rows(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(packing.unpack_rows(packed, bits, columns), codes)
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 70), st.integers(1, 5), st.integers(0, 2**31))
def test_columns_equal_compressed_tensors(bits: int, rows: int, groups: int, seed: int) -> None:
    codes = random_codes(rows, groups, bits=bits, seed=seed)
    packed = packing.pack_columns(codes, bits)
    assert packed.is_contiguous() and packed.tolist() == [list(r) for r in zip(*plain_rows(codes.T, bits), strict=True)]
    assert torch.equal(packed, pack_to_int32(codes, bits, packed_dim=0))
    assert torch.equal(packing.unpack_columns(packed, bits, rows), codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
def test_awq_equals_plain_and_round_trips(rows: int, words: int, seed: int, strided: bool) -> None:
    codes = random_codes(rows, words * 8, bits=4, seed=seed)
    if strided:
        codes = codes.T.contiguous().T
    packed = packing.pack_awq(codes)
    assert packed.is_contiguous() and packed.tolist() == plain_awq(codes)
    assert torch.equal(packing.unpack_awq(packed), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_leading_dimensions_are_carried(bits: int) -> None:
    codes = random_codes(2, 3, 16, 40, bits=bits, seed=9)
    for pack, unpack, size in (
        (packing.pack_rows, packing.unpack_rows, 40),
        (packing.pack_columns, packing.unpack_columns, 16),
    ):
        packed = pack(codes, bits)
        assert torch.equal(packed[1, 2], pack(codes[1, 2], bits))
        assert torch.equal(unpack(packed, bits, size), codes)
    awq = random_codes(2, 3, 16, 40, bits=4, seed=10)
    assert torch.equal(packing.pack_awq(awq)[1, 2], packing.pack_awq(awq[1, 2]))
    assert torch.equal(packing.unpack_awq(packing.pack_awq(awq)), awq)


def test_wrong_dtypes_widths_and_sizes_are_refused() -> None:
    codes = random_codes(2, 12, bits=4, seed=11)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        packing.pack_rows(codes.int(), 4)
    with pytest.raises(ValueError, match="4 and 8 bits"):
        packing.pack_rows(codes, 3)
    with pytest.raises(ValueError, match="multiple of 8"):
        packing.pack_awq(codes)
    with pytest.raises(ValueError, match="fewer than"):
        packing.unpack_rows(packing.pack_rows(codes, 4), 4, 17)
