"""FP8-block and MXFP8 sources back to BF16 and float32, against plain float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3quant.errors import CheckpointError
from m3quant.quant import dequantize as source

OUT = [torch.bfloat16, torch.float32]


def random_codes(*shape: int, seed: int) -> torch.Tensor:
    """Every finite byte, subnormals and both zeros included."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.randint(0, 0x7F, shape, generator=generator, dtype=torch.uint8)
    sign = torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) << 7
    return (magnitude | sign).view(torch.float8_e4m3fn)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 280), st.integers(1, 280), st.sampled_from(OUT), st.booleans(), st.integers(0, 2**31))
def test_fp8_block_equals_float64(rows: int, columns: int, out: torch.dtype, bf16_scale: bool, seed: int) -> None:
    codes = random_codes(rows, columns, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(math.ceil(rows / 128), math.ceil(columns / 128), generator=generator) * 1e-3 + 1e-6
    if bf16_scale:
        scale = scale.bfloat16()
    wide = scale.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    expected = (codes.double() * wide).float().to(out)  # a product of 4 and 24 bits is exact in float64
    got = source.dequantize_fp8_block(codes, scale, out)
    assert got.dtype == out and torch.equal(got, expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 200), st.sampled_from(OUT), st.booleans(), st.integers(0, 2**31))
def test_mxfp8_equals_float64(rows: int, columns: int, out: torch.dtype, native: bool, seed: int) -> None:
    codes = random_codes(rows, columns, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, math.ceil(columns / 32))
    exponent = torch.randint(0, 240, shape, generator=generator, dtype=torch.uint8)
    wide = torch.pow(2.0, exponent.double() - 127).repeat_interleave(32, 1)[:, :columns]
    expected = (codes.double() * wide).float().to(out)
    scale = exponent.view(torch.float8_e8m0fnu) if native else exponent
    got = source.dequantize_mxfp8(codes, scale, out)
    assert got.dtype == out and torch.equal(got, expected)


def test_every_e8m0_scale_is_a_power_of_two() -> None:
    every = torch.arange(255, dtype=torch.int32).to(torch.uint8)
    values = source.e8m0_to_float(every)
    assert values.dtype == torch.float32
    assert torch.equal(values.double(), torch.pow(2.0, torch.arange(255).double() - 127))


def test_bf16_values_survive_mxfp8_exactly() -> None:
    """4 significant bits times a power of two is a BF16 value, so BF16 output loses nothing."""
    codes = random_codes(4, 64, seed=1)
    scale = torch.randint(100, 150, (4, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    exact = source.dequantize_mxfp8(codes, scale, torch.float32)
    assert torch.equal(source.dequantize_mxfp8(codes, scale).float(), exact)


def test_stacked_experts_equal_single_ones() -> None:
    codes = random_codes(3, 150, 160, seed=3)
    generator = torch.Generator().manual_seed(4)
    block = torch.rand(3, 2, 2, generator=generator) + 0.1
    micro = torch.randint(110, 130, (3, 150, 5), dtype=torch.uint8, generator=generator)
    for e in range(3):
        assert torch.equal(
            source.dequantize_fp8_block(codes, block)[e], source.dequantize_fp8_block(codes[e], block[e])
        )
        assert torch.equal(source.dequantize_mxfp8(codes, micro)[e], source.dequantize_mxfp8(codes[e], micro[e]))


def test_broken_sources_are_refused_by_name() -> None:
    codes = random_codes(130, 64, seed=5)
    block, micro = torch.full((2, 1), 0.01), torch.full((130, 2), 120, dtype=torch.uint8)
    nan = codes.view(torch.uint8).clone()
    nan[129, 63] = 0xFF
    nan_codes = nan.view(torch.float8_e4m3fn)
    bad_micro, huge_micro = micro.clone(), micro.clone()
    bad_micro[7, 1], huge_micro[:] = 255, 254
    fp8_block, mxfp8 = source.dequantize_fp8_block, source.dequantize_mxfp8
    cases = [
        (fp8_block, nan_codes, block, r"NaN/Inf in w1: 1 of 8320"),
        (mxfp8, nan_codes, micro, r"NaN/Inf in w1: 1 of 8320"),
        (fp8_block, codes, block.T, r"scale of w1 has shape \[1, 2\].*needs \[2, 1\]"),
        (mxfp8, codes, micro[:, :1], r"scale of w1 has shape \[130, 1\].*needs \[130, 2\]"),
        (fp8_block, codes, torch.tensor([[0.1], [math.nan]]), r"NaN/Inf in the scale of w1"),
        (fp8_block, codes, torch.tensor([[0.1], [math.inf]]), r"NaN/Inf in the scale of w1"),
        (mxfp8, codes, bad_micro, r"NaN in the scale of w1: 1 E8M0"),
        (mxfp8, codes, huge_micro, r"w1 times its scale exceeds torch.bfloat16"),
        (fp8_block, codes, torch.full((2, 1), 1e37), r"w1 times its scale exceeds torch.bfloat16"),
        (mxfp8, codes, micro.float(), r"E8M0"),
        (fp8_block, codes.float(), block, r"w1 has a scale but is torch.float32"),
    ]
    for function, weight, scale, message in cases:
        with pytest.raises(CheckpointError, match=message):
            function(weight, scale, name="w1")
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        fp8_block(codes, block, torch.float16)
