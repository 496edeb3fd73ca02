"""NVFP4 and MXFP4 back to BF16 and float32: against plain float64, and against compressed-tensors' own packers."""

import math

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st

from m3quant.errors import CheckpointError
from m3quant.quant.fp4 import dequantize_mxfp4, dequantize_nvfp4, unpack
from tests.support.convert.fp4_sources import to_mxfp4, to_nvfp4, values_of

OUT = [torch.bfloat16, torch.float32]


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_packed(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=drawn(seed), dtype=torch.uint8)


def random_e4m3(*shape: int, seed: int) -> torch.Tensor:
    """Every finite positive value, subnormals included."""
    return torch.randint(0, 0x7F, shape, generator=drawn(seed), dtype=torch.uint8).view(torch.float8_e4m3fn)


def test_every_byte_is_its_two_codes() -> None:
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    assert torch.equal(unpack(every).double(), values_of(every))
    assert unpack(torch.tensor([[0x21]], dtype=torch.uint8)).tolist() == [[0.5, 1.0]]  # low half first
    assert math.copysign(1, float(unpack(torch.tensor([[0x80]], dtype=torch.uint8))[0, 1])) == -1


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 12),
    st.sampled_from(OUT),
    st.booleans(),
    st.floats(-20, 20),
    st.integers(0, 2**31),
)
def test_nvfp4_equals_float64(rows: int, groups: int, out: torch.dtype, divides: bool, power: float, seed: int) -> None:
    packed, scale = random_packed(rows, groups * 8, seed=seed), random_e4m3(rows, groups, seed=seed + 1)
    whole = torch.tensor([2.0**power])
    # the two scales are one float32 number, as in compressed-tensors and ModelOpt; its product with a code is exact in float64
    together = (scale.double() / whole.double() if divides else scale.double() * whole.double()).float().double()
    expected = (values_of(packed) * together.repeat_interleave(16, 1)).float().to(out)
    got = dequantize_nvfp4(packed, scale, whole, out, divides=divides)
    assert got.dtype == out and torch.equal(got, expected)
    filled = torch.empty_like(got)
    assert dequantize_nvfp4(packed, scale, whole, divides=divides, out=filled) is filled and torch.equal(
        filled, expected
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 8), st.sampled_from(OUT), st.booleans(), st.integers(0, 2**31))
def test_mxfp4_equals_float64(rows: int, groups: int, out: torch.dtype, native: bool, seed: int) -> None:
    packed = random_packed(rows, groups * 16, seed=seed)
    exponent = torch.randint(0, 250, (rows, groups), generator=drawn(seed + 1), dtype=torch.uint8)
    expected = (values_of(packed) * torch.pow(2.0, exponent.double() - 127).repeat_interleave(32, 1)).float().to(out)
    got = dequantize_mxfp4(packed, exponent.view(torch.float8_e8m0fnu) if native else exponent, out)
    assert got.dtype == out and torch.equal(got, expected)


def test_stacks_and_long_rows_equal_single_ones() -> None:
    packed, scale = random_packed(3, 5, 1 << 17, seed=1), random_e4m3(3, 5, 1 << 14, seed=2)
    whole = torch.tensor(0.37)
    stacked = dequantize_nvfp4(packed, scale, whole, torch.float32, divides=True)
    for expert in range(3):
        assert torch.equal(
            stacked[expert], dequantize_nvfp4(packed[expert], scale[expert], whole, torch.float32, divides=True)
        )


@pytest.mark.parametrize("spread", [1e-3, 1.0, 40.0])
def test_what_compressed_tensors_packs_is_read_as_it_reads_it(spread: float) -> None:
    weight = torch.randn(48, 256, generator=drawn(3)) * spread
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    groups = weight.unflatten(-1, (-1, 16))
    whole = generate_gparam(weight.amin(), weight.amax())
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=whole)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    stored = NVFP4PackedCompressor.compress(
        {"weight": weight.bfloat16(), "weight_scale": scale, "weight_global_scale": whole}, scheme
    )
    theirs = NVFP4PackedCompressor.decompress(dict(stored), scheme)["weight"]
    ours = dequantize_nvfp4(
        stored["weight_packed"], stored["weight_scale"], stored["weight_global_scale"], divides=True
    )
    assert stored["weight_scale"].dtype == torch.float8_e4m3fn and torch.equal(ours, theirs.bfloat16())
    assert float((ours.float() - weight).norm() / weight.norm()) < 0.12


def test_compressed_tensors_mxfp4_is_read_as_it_reads_it() -> None:
    weight = torch.randn(48, 256, generator=drawn(4))
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype="uint8"
    )
    groups = weight.unflatten(-1, (-1, 32))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    stored = MXFP4PackedCompressor.compress({"weight": weight.bfloat16(), "weight_scale": scale}, scheme)
    theirs = MXFP4PackedCompressor.decompress(dict(stored), scheme)["weight"]
    ours = dequantize_mxfp4(stored["weight_packed"], stored["weight_scale"])
    assert stored["weight_scale"].dtype == torch.uint8 and torch.equal(ours, theirs.bfloat16())
    assert float((ours.float() - weight).norm() / weight.norm()) < 0.16


@pytest.mark.parametrize("divides", [True, False])
def test_the_tests_own_packer_is_near_the_weight(divides: bool) -> None:
    weight = torch.randn(64, 128, generator=drawn(5)) * 0.02
    packed, scale, whole, dense = to_nvfp4(weight, divides)
    assert torch.equal(dequantize_nvfp4(packed, scale, whole, divides=divides), dense)
    assert float((dense.float() - weight).norm() / weight.norm()) < 0.12
    packed, scale, dense = to_mxfp4(weight)
    assert torch.equal(dequantize_mxfp4(packed, scale), dense)


def test_broken_sources_are_refused_by_name() -> None:
    packed, scale = random_packed(4, 32, seed=6), random_e4m3(4, 4, seed=7)
    exponent = torch.full((4, 2), 120, dtype=torch.uint8)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(CheckpointError, match=r"global scale of w1 is .*no weight can be multiplied"):
            dequantize_nvfp4(packed, scale, torch.tensor([bad]), divides=True, name="w1")
    spoiled = scale.view(torch.uint8).clone()
    spoiled[2, 1] = 0x7F
    one = torch.ones(1)
    for call, message in (
        (lambda: dequantize_nvfp4(packed, spoiled.view(torch.float8_e4m3fn), one, divides=True, name="w1"), r"NaN/Inf in the scale of w1: 1 of"),
        (lambda: dequantize_nvfp4(packed, scale[:, :3], one, divides=True, name="w1"), r"scale of w1 has shape \[4, 3\].*needs \[4, 4\]"),
        (lambda: dequantize_nvfp4(packed, scale, torch.tensor(1e-38), divides=True, name="w1"), "w1 times its scale exceeds torch.bfloat16"),
        (lambda: dequantize_mxfp4(packed, exponent[:2], name="w1"), r"scale of w1 has shape \[2, 2\].*needs \[4, 2\]"),
        (lambda: dequantize_mxfp4(packed, torch.full((4, 2), 255, dtype=torch.uint8), name="w1"), "NaN in the scale of w1: 8 E8M0"),
        (lambda: dequantize_mxfp4(packed.float(), exponent, name="w1"), "w1 has 4-bit scales but is torch.float32"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            call()
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        dequantize_mxfp4(packed, exponent, torch.float16)
