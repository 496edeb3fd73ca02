"""Integer rounding: against float64, against compressed-tensors' formulas, and at the edges."""

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from m3quant.errors import CheckpointError
from m3quant.quant import integer
from m3quant.schemes import Scheme, parse_scheme

SCHEMES = [
    parse_scheme(f"int{bits}-{where}{asym}")
    for bits, places in (
        (4, ("g128", "g64", "g32", "channel")),
        (8, ("g128", "g64", "g32", "channel")),
        (2, ("g128", "g16")),
        (3, ("g64", "channel")),
        (5, ("g32",)),
        (6, ("g256",)),
        (7, ("g64",)),
    )
    for where in places
    for asym in ("", "-asym")
]
DTYPES = [torch.bfloat16, torch.float32]


def random_weight(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different size, heavy tails and an offset, as real weights have."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator) ** 3
    spread = torch.logspace(-4, 1, shape[-2])[:, None]
    return ((weight + 0.2) * spread).to(dtype)


def reference(weight: torch.Tensor, scheme: Scheme, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """Plain float64 quantize-dequantize of [N, K], one group at a time."""
    rows, columns = weight.shape
    size = scheme.group_size or columns
    half = 2 ** (scheme.bits - 1)
    out = torch.empty(rows, columns, dtype=torch.float64)
    for n in range(rows):
        for g in range(columns // size):
            s = float(scale[n, g])
            z = 0 if zero is None else int(zero[n, g])
            group = weight[n, g * size : (g + 1) * size].double()
            codes = torch.clamp(torch.round(group / s + z), -half, half - 1)
            out[n, g * size : (g + 1) * size] = (codes - z) * s
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_fake_quantize_equals_float64(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = random_weight(6, 256, seed=1, dtype=dtype)
    scale, zero = integer.int_qparams(weight, scheme)
    assert torch.equal(scale, scale.bfloat16().float())
    ours = integer.fake_quantize(weight, scheme)
    assert ours.dtype == torch.float32
    assert torch.equal(ours.double(), reference(weight, scheme, scale, zero))
    codes = integer.quantize(weight, scale, zero, scheme)
    assert torch.equal(ours, integer.dequantize(codes, scale, zero, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_error_is_at_most_half_a_step(scheme: Scheme) -> None:
    weight = random_weight(16, 256, seed=2)
    scale, _ = integer.int_qparams(weight, scheme)
    error = (integer.fake_quantize(weight, scheme) - weight).abs().unflatten(-1, (scale.shape[-1], -1))
    # Half a step, plus what the range may lack: the symmetric grid ends half a step short on one side, a scale rounded
    # down to BF16 by 2^-9, and the zero point rounds by up to half a step.
    steps = 0.5 + 2.0 ** (scheme.bits - 1) * 2**-8 + 0.5
    assert bool((error <= steps * scale.unsqueeze(-1)).all())
    assert float((error <= 0.5001 * scale.unsqueeze(-1)).float().mean()) > 0.95


def args_of(scheme: Scheme, **extra: object) -> QuantizationArgs:
    strategy = "group" if scheme.group_size else "channel"
    kind = {"type": "int", "num_bits": scheme.bits, "symmetric": scheme.symmetric}
    return QuantizationArgs(**kind, strategy=strategy, group_size=scheme.group_size, **extra)


def min_max(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.unflatten(-1, (-1, scheme.group_size or weight.shape[-1]))
    return groups.amin(-1), groups.amax(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scales_equal_compressed_tensors(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = random_weight(512, 256, seed=3, dtype=dtype)
    low, high = min_max(weight.float(), scheme)
    theirs, their_zero = calculate_qparams(low, high, args_of(scheme, scale_dtype=torch.bfloat16))
    scale, zero = integer.int_qparams(weight, scheme)
    assert torch.equal(scale, theirs)
    if dtype == torch.bfloat16 and scheme.symmetric:  # a BF16 model there, no scale_dtype: the same single rounding
        assert torch.equal(scale, calculate_qparams(*min_max(weight, scheme), args_of(scheme))[0].float())
    if zero is None:
        return
    half = 2 ** (scheme.bits - 1)
    from_stored = torch.round((-half - low.clamp_max(0) / scale).clamp(-half, half - 1))
    assert torch.equal(zero.float(), from_stored)
    # Theirs comes from the scale before it is rounded to BF16: one code away at most, and for int4 hardly ever.
    difference = (zero.int() - their_zero.int()).abs()
    assert int(difference.max()) <= 1
    assert float(difference.float().mean()) <= (0.05 if scheme.bits <= 4 else 0.4)


def test_zero_point_is_exact_where_the_scale_needs_no_rounding() -> None:
    scheme = parse_scheme("int4-g32-asym")
    generator = torch.Generator().manual_seed(4)
    steps = torch.randint(-9, 7, (64, 4, 32), generator=generator)
    steps[..., 0], steps[..., 1] = -9, 6  # the range is fifteen steps of 2^-5
    weight = (steps * 2.0**-5).flatten(-2)
    low, high = min_max(weight, scheme)
    scale, zero = integer.int_qparams(weight, scheme)
    theirs, their_zero = calculate_qparams(low, high, args_of(scheme))
    assert torch.equal(scale, theirs) and zero is not None and torch.equal(zero, their_zero)
    assert torch.equal(integer.fake_quantize(weight, scheme), weight)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zero_groups_have_a_positive_scale_and_give_zeros(scheme: Scheme, scale_dtype: torch.dtype) -> None:
    weight = random_weight(8, 256, seed=5)
    weight[2] = 0.0
    scale, zero = integer.int_qparams(weight, scheme, scale_dtype=scale_dtype)
    assert bool((scale.to(scale_dtype) > 0).all())
    values = integer.dequantize(integer.quantize(weight, scale, zero, scheme), scale, zero, scheme)
    assert torch.count_nonzero(values[2]) == 0 and torch.count_nonzero(values[3]) > 0
    if zero is None:
        assert torch.count_nonzero(integer.quantize(weight, scale, zero, scheme)[2]) == 0


@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=str)
def test_subnormal_weights_keep_a_normal_scale(scheme: Scheme) -> None:
    weight = torch.full((2, 128), 1e-39)
    scale, _ = integer.int_qparams(weight, scheme)
    assert float(scale.min()) >= torch.finfo(torch.bfloat16).tiny
    assert float(integer.fake_quantize(weight, scheme).abs().max()) < 2e-38


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_shrink_multiplies_the_range(scheme: Scheme) -> None:
    weight = random_weight(8, 256, seed=6)
    full, _ = integer.int_qparams(weight, scheme, scale_dtype=torch.float32)
    half, half_zero = integer.int_qparams(weight, scheme, 0.5, scale_dtype=torch.float32)
    assert torch.equal(half, full / 2)
    factor = torch.linspace(0.3, 1.0, full.numel()).reshape(full.shape)
    scale, zero = integer.int_qparams(weight, scheme, factor, scale_dtype=torch.float32)
    low, high = min_max(weight, scheme)
    low, high = low.clamp_max(0).double() * factor, high.clamp_min(0).double() * factor
    levels = 2**scheme.bits - 1
    expected = torch.maximum(-low, high) / (levels / 2) if scheme.symmetric else (high - low) / levels
    torch.testing.assert_close(scale.double(), expected, rtol=3e-7, atol=0)
    assert (zero is None) == (half_zero is None) == scheme.symmetric


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.01, math.nan])
def test_shrink_outside_its_range_is_refused(bad: float) -> None:
    weight, scheme = random_weight(2, 64, seed=7), parse_scheme("int4-g32")
    with pytest.raises(ValueError, match="shrink"):
        integer.int_qparams(weight, scheme, bad)
    with pytest.raises(ValueError, match="shrink"):
        integer.int_qparams(weight, scheme, torch.tensor([[1.0, bad], [1.0, 1.0]]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", [parse_scheme("int4-g32"), parse_scheme("int8-channel-asym")], ids=str)
def test_non_finite_weights_are_named(scheme: Scheme, dtype: torch.dtype, value: float) -> None:
    weight = random_weight(4, 64, seed=8, dtype=dtype)
    scale, zero = integer.int_qparams(weight, scheme)
    weight[3, 63] = value
    for call in (
        lambda: integer.int_qparams(weight, scheme, name="layers.7.w2"),
        lambda: integer.fake_quantize(weight, scheme, name="layers.7.w2"),
        lambda: integer.quantize(weight, scale, zero, scheme, name="layers.7.w2"),
        lambda: integer.ensure_finite(weight, "layers.7.w2"),
    ):
        with pytest.raises(CheckpointError, match=r"NaN/Inf in layers\.7\.w2: 1 of 256"):
            call()


def test_ensure_finite_sees_fp8_nan_and_passes_the_rest() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    with pytest.raises(CheckpointError, match="2 of 256"):
        integer.ensure_finite(codes.view(torch.float8_e4m3fn), "w")
    integer.ensure_finite(codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn), "w")
    integer.ensure_finite(torch.tensor([3.4e38, -3.4e38]), "w")
    integer.ensure_finite(torch.empty(0), "w")


def test_f16_scales_refuse_overflow_and_underflow_and_never_round_a_subnormal_down() -> None:
    scheme = parse_scheme("int4-channel")
    for largest, word in ((5e5, "exceeds F16"), (3e-7, "underflows F16")):
        weight = torch.linspace(-1, 1, 64)[None] * largest
        with pytest.raises(CheckpointError, match=rf"a group of layers\.0\.w1 needs .*{word}.*compressed-tensors"):
            integer.int_qparams(weight, scheme, scale_dtype=torch.float16, name="layers.0.w1")
        integer.int_qparams(weight, scheme, scale_dtype=torch.bfloat16)
    wanted = torch.logspace(-7.2, 4.8, 500)
    stored = integer.round_scale(wanted, torch.float16)
    assert torch.equal(stored, stored.half().float()) and float(stored.min()) > 0
    subnormal = wanted < 2.0**-14
    assert 50 < int(subnormal.sum()) < 450
    assert bool((stored[subnormal] >= wanted[subnormal]).all())
    assert bool((stored[subnormal] - wanted[subnormal] < 2.0**-24).all())
    assert torch.equal(stored[~subnormal], wanted[~subnormal].half().float())


def test_round_scale_leaves_its_input_alone() -> None:
    scale = torch.tensor([1e-45, 1.0])
    integer.round_scale(scale, torch.float32)
    assert float(scale[0]) > 0 and float(scale[0]) < 1e-44


def test_a_range_beyond_float32_is_refused() -> None:
    weight = torch.tensor([[3.4e38, -3.4e38] * 16])
    with pytest.raises(CheckpointError, match=r"range of a group of w1 exceeds float32"):
        integer.int_qparams(weight, parse_scheme("int4-g32-asym"), name="w1")


def test_ties_round_to_even_and_clamp_at_both_ends() -> None:
    weight = torch.tensor([[-9.0, -8.5, -2.5, -1.5, 0.5, 1.5, 7.5, 100.0]])
    codes = integer.quantize(weight, torch.ones(1, 1), None, parse_scheme("int4-channel"))
    assert codes.tolist() == [[-8, -8, -2, -2, 0, 2, 7, 7]]


@settings(max_examples=40, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    name=st.sampled_from(["int4-g32", "int4-g64-asym", "int8-g32-asym", "int8-channel", "int4-channel-asym"]),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_batches_and_strided_views_equal_single_matrices(
    lead: list[int], rows: int, groups: int, name: str, dtype: torch.dtype, strided: bool, seed: int
) -> None:
    scheme = parse_scheme(name)
    columns = groups * (scheme.group_size or 24)
    weight = random_weight(*lead, rows, columns, seed=seed, dtype=dtype)
    if strided:
        weight = weight.transpose(-1, -2).contiguous().transpose(-1, -2)
    before = weight.clone()
    scale, zero = integer.int_qparams(weight, scheme)
    codes = integer.quantize(weight, scale, zero, scheme)
    values = integer.fake_quantize(weight, scheme)
    assert torch.equal(weight, before), "inputs are never written"
    assert codes.shape == weight.shape and codes.dtype == torch.int8
    qmin, qmax = integer.int_range(scheme)
    assert qmin <= int(codes.min()) and int(codes.max()) <= qmax
    flat = weight.reshape(-1, rows, columns)
    for i, matrix in enumerate(flat):
        one_scale, one_zero = integer.int_qparams(matrix, scheme)
        assert torch.equal(scale.reshape(-1, *one_scale.shape)[i], one_scale)
        assert torch.equal(codes.reshape(flat.shape)[i], integer.quantize(matrix, one_scale, one_zero, scheme))
        assert torch.equal(values.reshape(flat.shape)[i], integer.fake_quantize(matrix, scheme))


def test_other_schemes_are_a_programming_error() -> None:
    for name in ("fp8-channel", "keep"):
        with pytest.raises(ValueError, match="not an integer scheme"):
            integer.int_range(parse_scheme(name))
    with pytest.raises(ValueError, match="does not divide"):
        integer.int_qparams(torch.randn(2, 100), parse_scheme("int4-g32"))
