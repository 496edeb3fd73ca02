"""Bit orders, against plain-Python packers written from the published layouts."""

import importlib.util

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from m3quant.quant import packing
from m3quant.schemes import INT_BITS
from tests.support.paths import TESTS


def random_codes(*shape: int, bits: int, seed: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)


def signed_word(nibbles: list[int], bits: int) -> int:
    word = sum(value << (bits * i) for i, value in enumerate(nibbles))
    return word - (1 << 32) if word >= 1 << 31 else word


def plain_rows(codes: torch.Tensor, bits: int) -> list[list[int]]:
    """A row as one number, code i in its bits bits * i and up, offset by 2^(bits - 1); cut into 32-bit words."""
    out = []
    for row in codes.tolist():
        stream = sum((code + (1 << (bits - 1))) << (bits * i) for i, code in enumerate(row))
        words = [stream >> (32 * i) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
        out.append([word - (1 << 32) if word >> 31 else word for word in words])
    return out


def plain_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes [N, K], K * bits a multiple of 32, bit by bit: what vLLM loads at 2 and 3 bits (facts: sub-4-bit)."""
    rows, columns = codes.shape
    ones = (codes.to(torch.int64).unsqueeze(-1) >> torch.arange(bits)) & 1
    words = (ones.view(rows, columns * bits // 32, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


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
    # 3 bits: 0 1 2 ... 7 is the stream 0o76543210 read from its end, and the tenth code lies across two words
    three = torch.arange(-4, 4, dtype=torch.int8)[None].repeat(1, 4)
    assert packing.pack_rows(three, 3).numpy().tobytes() == bytes.fromhex("88c6fa" * 4)
    int8 = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    assert packing.pack_rows(int8, 8).numpy().tobytes() == bytes.fromhex("007f80ff")


@settings(max_examples=70, deadline=None)
@given(st.sampled_from(INT_BITS), st.integers(1, 5), st.integers(1, 140), st.integers(0, 2**31))
def test_rows_equal_plain_and_compressed_tensors(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits=bits, seed=seed)
    packed = packing.pack_rows(codes, bits)
    assert packed.is_contiguous() and packed.shape == (rows, -(-columns * bits // 32))
    assert packed.tolist() == plain_rows(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(packing.unpack_rows(packed, bits, columns), codes)
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


@settings(max_examples=70, deadline=None)
@given(st.sampled_from(INT_BITS), st.integers(1, 140), st.integers(1, 5), st.integers(0, 2**31))
def test_columns_equal_compressed_tensors(bits: int, rows: int, groups: int, seed: int) -> None:
    codes = random_codes(rows, groups, bits=bits, seed=seed)
    packed = packing.pack_columns(codes, bits)
    assert packed.is_contiguous() and packed.tolist() == [list(r) for r in zip(*plain_rows(codes.T, bits), strict=True)]
    assert torch.equal(packed, pack_to_int32(codes, bits, packed_dim=0))
    assert torch.equal(packing.unpack_columns(packed, bits, rows), codes)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(INT_BITS), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
def test_words_are_those_that_vllm_reads_at_any_width(bits: int, rows: int, units: int, seed: int) -> None:
    codes = random_codes(rows, 32 * units, bits=bits, seed=seed)
    assert torch.equal(packing.pack_rows(codes, bits), plain_bits(codes.int() + (1 << (bits - 1)), bits))
    zeros = plain_bits((codes.int() + (1 << (bits - 1))), bits).T
    assert torch.equal(packing.pack_columns(codes.T, bits), zeros)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_blocks_leave_no_seam(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    codes = random_codes(3, 5, 96, bits=bits, seed=bits)
    whole = packing.pack_rows(codes, bits)
    monkeypatch.setattr(packing, "_BLOCK", 40)
    assert torch.equal(packing.pack_rows(codes, bits), whole)
    assert torch.equal(packing.unpack_rows(whole, bits, 96), codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
def test_awq_equals_plain_and_round_trips(rows: int, words: int, seed: int, strided: bool) -> None:
    codes = random_codes(rows, words * 8, bits=4, seed=seed)
    if strided:
        codes = codes.T.contiguous().T
    packed = packing.pack_awq(codes)
    assert packed.is_contiguous() and packed.tolist() == plain_awq(codes)
    assert torch.equal(packing.unpack_awq(packed), codes)


@pytest.mark.parametrize("bits", INT_BITS)
def test_leading_dimensions_are_carried(bits: int) -> None:
    codes = random_codes(2, 3, 16, 40, bits=bits, seed=9)
    for pack, unpack, size in (
        (packing.pack_rows, packing.unpack_rows, 40),
        (packing.pack_columns, packing.unpack_columns, 16),
    ):
        packed = pack(codes, bits)
        assert torch.equal(packed[1, 2], pack(codes[1, 2], bits))
        assert torch.equal(unpack(packed, bits, size), codes)
        transposed = codes.transpose(0, 1)  # strides that are no row-major ones
        assert torch.equal(pack(transposed, bits), packed.transpose(0, 1))
    awq = random_codes(2, 3, 16, 40, bits=4, seed=10)
    assert torch.equal(packing.pack_awq(awq)[1, 2], packing.pack_awq(awq[1, 2]))
    assert torch.equal(packing.unpack_awq(packing.pack_awq(awq)), awq)


@pytest.mark.parametrize("bits", INT_BITS)
def test_the_cpu_engines_plugin_unpacks_the_same_codes(bits: int) -> None:
    """tests/engine runs on it, in an environment of its own: here only its arithmetic is looked at."""
    path = TESTS / "support" / "engine" / "cpu_plugin" / "m3quant_cpu_engine" / "dequantize.py"
    spec = importlib.util.spec_from_file_location("plugin_dequantize", path)
    assert spec is not None and spec.loader is not None
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    codes = random_codes(3, 64, 160, bits=bits, seed=bits)
    unsigned = codes.int() + (1 << (bits - 1))
    assert torch.equal(plugin.unpack(packing.pack_rows(codes, bits), -1, bits), unsigned)
    assert torch.equal(plugin.unpack(packing.pack_columns(codes, bits), 1, bits), unsigned)


def test_wrong_dtypes_widths_and_sizes_are_refused() -> None:
    codes = random_codes(2, 12, bits=4, seed=11)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        packing.pack_rows(codes.int(), 4)
    for bits in (1, 9, 0, -4):
        with pytest.raises(ValueError, match="2 to 8 bits"):
            packing.pack_rows(codes, bits)
        with pytest.raises(ValueError, match="2 to 8 bits"):
            packing.unpack_rows(codes.view(torch.int32), bits, 1)
    with pytest.raises(ValueError, match="multiple of 8"):
        packing.pack_awq(codes)
    with pytest.raises(ValueError, match="fewer than"):
        packing.unpack_rows(packing.pack_rows(codes, 4), 4, 17)
    with pytest.raises(ValueError, match="fewer than"):
        packing.unpack_rows(packing.pack_rows(random_codes(2, 32, bits=3, seed=12), 3), 3, 33)
