"""FP8 E4M3: rounding equal to torch's cast, saturation, scales per row and per ragged 128x128 block."""

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from m3quant.errors import CheckpointError
from m3quant.quant import fp8

ONE = torch.ones(1, 1)


def all_values() -> torch.Tensor:
    """All E4M3 values in order of their byte, from the format: 4 exponent bits with bias 7, 3 mantissa bits."""
    values = []
    for byte in range(256):
        sign, exponent, mantissa = (-1.0 if byte & 0x80 else 1.0), (byte >> 3) & 0xF, byte & 7
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(math.nan if byte & 0x7F == 0x7F else sign * size)
    return torch.tensor(values, dtype=torch.float32)


def code_bytes(weight: torch.Tensor) -> torch.Tensor:
    return fp8.quantize_channel(weight[None], ONE).view(torch.uint8)[0]


def random_weight(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) ** 3 * torch.logspace(-4, 1, shape[-2])[:, None]).to(dtype)


def test_every_code_is_its_own_value() -> None:
    values = all_values()
    finite = ~values.isnan()
    assert int(finite.sum()) == 254
    bytes_ = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert torch.equal(code_bytes(values[finite]), bytes_[finite])
    decoded = fp8.dequantize_channel(bytes_[finite][None].view(torch.float8_e4m3fn), ONE)[0]
    assert torch.equal(decoded, values[finite])


def test_midpoints_round_to_even_and_neighbours_to_the_nearer() -> None:
    values = all_values()[:0x7F]  # 0 to 448, ascending
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2  # exact in float32
    even = torch.where(torch.arange(len(low)) % 2 == 0, low, high)  # the byte whose last mantissa bit is 0
    for sign in (1.0, -1.0):
        got = fp8.dequantize_channel(fp8.quantize_channel(sign * middle[None], ONE), ONE)[0]
        assert torch.equal(got, sign * even)
        assert torch.equal(code_bytes(sign * middle), (sign * middle).to(torch.float8_e4m3fn).view(torch.uint8))
        inf = torch.tensor(math.inf)
        for nearer, side in ((low, -inf), (high, inf)):
            beside = torch.nextafter(middle, side)
            assert torch.equal(code_bytes(sign * beside), code_bytes(sign * nearer))


def test_saturation_instead_of_nan() -> None:
    big = torch.tensor([448.0, 448.1, 463.9, 464.0, 465.0, 1e4, 3e38])
    for sign in (1.0, -1.0):
        got = fp8.dequantize_channel(fp8.quantize_channel(sign * big[None], ONE), ONE)[0]
        assert torch.equal(got, torch.full_like(big, sign * 448.0))
    tiny_scale = torch.full((1, 1), 1e-38)
    over = fp8.quantize_channel(torch.tensor([[1e30, -1e30]]), tiny_scale)  # the quotient is infinite
    assert over.float().tolist() == [[448.0, -448.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_channel_equals_torch_cast_and_compressed_tensors_scale(dtype: torch.dtype) -> None:
    weight = random_weight(64, 200, seed=1, dtype=dtype)
    scale = fp8.channel_scale(weight)
    assert scale.dtype == torch.float32 and scale.shape == (64, 1)
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
    wide = weight.float()
    theirs, _ = calculate_qparams(wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True), args)
    assert torch.equal(scale, theirs)
    cast = (wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(fp8.quantize_channel(weight, scale).view(torch.uint8), cast.view(torch.uint8))
    assert int((cast.float().abs().amax(-1) == 448).sum()) == 64, "each row uses the whole range"


def reference_block_scale(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    blocks = [
        [weight[r : r + 128, c : c + 128].double().abs().max() / 448 for c in range(0, columns, 128)]
        for r in range(0, rows, 128)
    ]
    return torch.tensor(blocks, dtype=torch.float64).float()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_blocks_equal_a_plain_loop(rows: int, columns: int, dtype: torch.dtype, strided: bool, seed: int) -> None:
    weight = random_weight(rows, columns, seed=seed, dtype=dtype)
    if strided:
        weight = weight.T.contiguous().T
    before = weight.clone()
    scale = fp8.block_scale(weight)
    torch.testing.assert_close(scale, reference_block_scale(weight), rtol=1e-7, atol=0)
    wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    codes = fp8.quantize_block(weight, scale)
    cast = (weight.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.uint8), cast.view(torch.uint8))
    assert torch.equal(fp8.dequantize_block(codes, scale), cast.float() * wide)
    assert torch.equal(weight, before), "inputs are never written"


def test_stacked_experts_equal_single_ones() -> None:
    weight = torch.stack([random_weight(200, 130, seed=s) for s in range(3)])
    for scale_of, quantize, dequantize in (
        (fp8.channel_scale, fp8.quantize_channel, fp8.dequantize_channel),
        (fp8.block_scale, fp8.quantize_block, fp8.dequantize_block),
    ):
        scale = scale_of(weight)
        codes = quantize(weight, scale)
        for e in range(3):
            assert torch.equal(scale[e], scale_of(weight[e]))
            assert torch.equal(codes[e].view(torch.uint8), quantize(weight[e], scale[e]).view(torch.uint8))
            assert torch.equal(dequantize(codes, scale)[e], dequantize(codes[e], scale[e]))


def test_relative_error_is_at_most_a_sixteenth_above_the_subnormals() -> None:
    weight = random_weight(32, 256, seed=3)
    scale = fp8.channel_scale(weight)
    back = fp8.dequantize_channel(fp8.quantize_channel(weight, scale), scale)
    error = (back - weight).abs()
    normal = weight.abs() >= scale * 2.0**-6
    assert 0.5 < float(normal.float().mean()) < 1.0
    assert bool((error[normal] <= weight.abs()[normal] * (1 / 16 + 1e-6)).all())
    assert bool((error <= torch.maximum(weight.abs() / 16, scale * 2.0**-10) * (1 + 1e-5)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_zero_and_subnormal_rows_keep_a_positive_normal_scale(dtype: torch.dtype) -> None:
    weight = random_weight(256, 256, seed=4, dtype=dtype)
    weight[:130] = 0.0
    weight[1, 5] = 1e-39
    for scale_of, quantize, dequantize in (
        (fp8.channel_scale, fp8.quantize_channel, fp8.dequantize_channel),
        (fp8.block_scale, fp8.quantize_block, fp8.dequantize_block),
    ):
        scale = scale_of(weight)
        assert float(scale.min()) >= torch.finfo(torch.float32).tiny
        back = dequantize(quantize(weight, scale), scale)
        assert bool(back.isfinite().all()) and torch.count_nonzero(back[2:130]) == 0
        assert torch.count_nonzero(back[130:]) > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_named(value: float) -> None:
    weight = random_weight(130, 140, seed=5, dtype=torch.bfloat16)
    channel, block = fp8.channel_scale(weight), fp8.block_scale(weight)
    weight[129, 139] = value
    for call in (
        lambda: fp8.channel_scale(weight, name="q_proj"),
        lambda: fp8.block_scale(weight, name="q_proj"),
        lambda: fp8.quantize_channel(weight, channel, name="q_proj"),
        lambda: fp8.quantize_block(weight, block, name="q_proj"),
    ):
        with pytest.raises(CheckpointError, match="NaN/Inf in q_proj: 1 of 18200"):
            call()


def test_a_scale_of_another_shape_is_refused() -> None:
    weight = random_weight(130, 140, seed=6)
    with pytest.raises(CheckpointError, match=r"scale of w2 has shape \[1, 2\].*needs \[2, 2\]"):
        fp8.quantize_block(weight, torch.ones(1, 2), name="w2")
