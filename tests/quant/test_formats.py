"""Whole stored tensors, byte for byte against compressed-tensors' and AutoAWQ's own compressors."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from m3quant.errors import CheckpointError, PlanError
from m3quant.planning import layout
from m3quant.quant import formats, packing
from m3quant.schemes import KEEP, Scheme, parse_scheme

INT = [f"int{b}-{w}{a}" for b in (4, 8) for w in ("g128", "g64", "g32", "channel") for a in ("", "-asym")]
INT += [
    f"int{b}-{w}{a}"
    for b, w in ((2, "g128"), (3, "g64"), (5, "channel"), (6, "g16"), (7, "g32"))
    for a in ("", "-asym")
]
AWQ = ["int4-g128", "int4-g128-asym", "int4-g32-asym", "int4-channel", "int4-channel-asym"]
STORED = [
    *((name, "compressed-tensors") for name in [*INT, "fp8-channel", "fp8-block"]),
    *((name, "autoawq") for name in AWQ),
    ("fp8-block", "fp8"),
]
GOLDEN = Path(__file__).parent / "data" / "awq_golden.safetensors"


def random_weight(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator) ** 3 + 0.2
    return (weight * torch.logspace(-3, 0, shape[-2])[:, None]).to(dtype)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def their_scheme(scheme: Scheme) -> QuantizationScheme:
    if scheme.kind == "fp8":
        strategy = {"strategy": "block", "block_structure": [128, 128]} if scheme.block else {"strategy": "channel"}
        weights = QuantizationArgs(num_bits=8, type="float", symmetric=True, **strategy)
        inputs = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="token", dynamic=True)
        return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    weights = QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy="group" if scheme.group_size else "channel",
        group_size=scheme.group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*INT, "fp8-channel", "fp8-block"])
def test_bytes_equal_compressed_tensors(name: str, dtype: torch.dtype) -> None:
    """The same weight and parameters through their compressor: every tensor equal in name, dtype, shape and bytes."""
    scheme = parse_scheme(name)
    shape = (200, 328) if scheme.block else (96, 256)
    weight = random_weight(*shape, seed=1, dtype=dtype)
    ours = formats.compress(weight, scheme, "compressed-tensors")
    _, zero = formats.qparams(weight, scheme, "compressed-tensors")
    given = {"weight": weight.float(), "weight_scale": ours["weight_scale"]}
    if zero is not None:
        given["weight_zero_point"] = zero
    kind = "float-quantized" if scheme.kind == "fp8" else "pack-quantized"
    compressor = BaseCompressor.get_value_from_registry(kind)
    theirs = compressor.compress(given, their_scheme(scheme))
    assert set(ours) == set(theirs)
    for suffix, tensor in theirs.items():
        assert ours[suffix].dtype == tensor.dtype and ours[suffix].shape == tensor.shape, suffix
        assert raw(ours[suffix]) == raw(tensor), suffix
    widened = {**ours, "weight_scale": ours["weight_scale"].float()}
    back = compressor.decompress(widened, their_scheme(scheme))["weight"]
    assert torch.equal(formats.decompress(ours, scheme, "compressed-tensors", shape), back)


@pytest.mark.parametrize(("name", "fmt"), STORED)
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)], ids=str)
def test_compress_returns_what_the_layout_promises(name: str, fmt: str, lead: tuple[int, ...]) -> None:
    scheme = parse_scheme(name)
    shape = (*lead, 160, 256)
    weight = random_weight(*shape, seed=2, dtype=torch.bfloat16)
    before = weight.clone()
    stored = formats.compress(weight, scheme, fmt)
    promised = layout.stored_tensors(shape, scheme, fmt)
    assert list(stored) == list(promised)
    for suffix, (code, dims) in promised.items():
        assert stored[suffix].dtype == formats.TORCH_DTYPES[code], suffix
        assert tuple(stored[suffix].shape) == dims, suffix
        assert stored[suffix].stride() == torch.empty(dims).stride(), f"{suffix} must be writable through a byte view"
    assert layout.stored_bytes(shape, scheme, fmt) == sum(t.nbytes for t in stored.values())
    back = formats.decompress(stored, scheme, fmt, shape)
    assert torch.equal(back, formats.round_trip(weight, scheme, fmt))
    assert torch.equal(weight, before)
    bound = max(0.03, 4 / 2**scheme.bits)
    assert float((back - weight.float()).norm() / weight.float().norm()) < bound
    if lead:
        expert = (1,) * len(lead)
        for suffix, tensor in formats.compress(weight[expert], scheme, fmt).items():
            assert raw(tensor) == raw(stored[suffix][expert]), suffix


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(STORED), st.integers(1, 20), st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
def test_round_trip_and_requantizing_is_stable(
    stored: tuple[str, str], eights: int, groups: int, is_bf16: bool, seed: int
) -> None:
    """decompress(compress(w)) is round_trip(w), and stays itself when compressed again under the same scale."""
    scheme, fmt = parse_scheme(stored[0]), stored[1]
    unit = layout.codes_in_whole_words(scheme.bits) if scheme.kind == "int" else 8
    columns = groups * (scheme.group_size or 5 * unit)
    shape = (eights * max(8, unit), -(-columns // unit) * unit)
    weight = random_weight(*shape, seed=seed, dtype=torch.bfloat16 if is_bf16 else torch.float32)
    scale, zero = formats.qparams(weight, scheme, fmt)
    tensors = formats.compress(weight, scheme, fmt, scale, zero)
    default = formats.compress(weight, scheme, fmt)
    assert all(raw(tensors[k]) == raw(default[k]) for k in default)
    back = formats.decompress(tensors, scheme, fmt, shape)
    assert torch.equal(back, formats.round_trip(weight, scheme, fmt, scale, zero))
    again = formats.compress(back, scheme, fmt, scale, zero)
    values = formats.decompress(again, scheme, fmt, shape)
    assert torch.equal(values, back)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "fmt"), STORED)
def test_a_gpu_writes_the_same_bytes(name: str, fmt: str) -> None:
    scheme = parse_scheme(name)
    weight = random_weight(2, 288, 384, seed=9, dtype=torch.bfloat16)
    cpu = formats.compress(weight, scheme, fmt)
    gpu = formats.compress(weight.cuda(), scheme, fmt)
    for suffix, tensor in cpu.items():
        assert gpu[suffix].is_cuda and raw(gpu[suffix].cpu()) == raw(tensor), suffix
    back = formats.decompress(gpu, scheme, fmt, tuple(weight.shape))
    assert torch.equal(back.cpu(), formats.decompress(cpu, scheme, fmt, tuple(weight.shape)))


def test_given_scales_are_rounded_to_the_stored_dtype_first() -> None:
    scheme = parse_scheme("int4-g128")
    weight = random_weight(16, 256, seed=3)
    fine = torch.full((16, 2), 0.0123456)
    for fmt, dtype in (("compressed-tensors", torch.bfloat16), ("autoawq", torch.float16)):
        coarse = fine.to(dtype).float()
        assert not torch.equal(fine, coarse)
        a = formats.compress(weight, scheme, fmt, fine)
        b = formats.compress(weight, scheme, fmt, coarse)
        assert all(raw(a[k]) == raw(b[k]) for k in a)


def unpack_awq_plainly(packed: torch.Tensor) -> torch.Tensor:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    out = torch.empty(packed.shape[0], packed.shape[1] * 8, dtype=torch.int64)
    for r, row in enumerate(packed.tolist()):
        for j, word in enumerate(row):
            for i, column in enumerate(order):
                out[r, 8 * j + column] = (word >> (4 * i)) & 0xF
    return out


@pytest.mark.parametrize("case", ["g32", "channel"])
def test_bytes_equal_autoawq(case: str) -> None:
    """data/make_awq_golden.py wrote the file with AutoAWQ 0.2.9's quantizer and packer."""
    golden = {k.removeprefix(f"{case}."): v for k, v in load_file(GOLDEN).items() if k.startswith(f"{case}.")}
    scheme = parse_scheme(f"int4-{case}-asym")
    zero = (unpack_awq_plainly(golden["qzeros"]) - 8).to(torch.int8).T.contiguous()
    scale = golden["scales"].float().T.contiguous()
    ours = formats.compress(golden["rounded"], scheme, "autoawq", scale, zero)
    for suffix in ("qweight", "qzeros", "scales"):
        assert ours[suffix].shape == golden[suffix].shape and raw(ours[suffix]) == raw(golden[suffix]), suffix
    shape = tuple(golden["weight"].shape)
    back = formats.decompress({k: golden[k] for k in ours}, scheme, "autoawq", shape)
    assert torch.equal(back.T.half(), golden["dequantized"])
    # From the weight before rounding: AutoAWQ's codes come from a scale that was not yet F16, so a few differ by one.
    codes = packing.unpack_awq(formats.compress(golden["weight"], scheme, "autoawq", scale, zero)["qweight"])
    difference = (codes - packing.unpack_awq(golden["qweight"])).abs()
    assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) < 0.01


def test_a_symmetric_scheme_in_autoawq_has_zero_points_of_eight() -> None:
    scheme = parse_scheme("int4-g32")
    weight = random_weight(16, 64, seed=4)
    stored = formats.compress(weight, scheme, "autoawq")
    assert bool((unpack_awq_plainly(stored["qzeros"]) == 8).all())
    scale, _ = formats.qparams(weight, scheme, "autoawq")
    codes = unpack_awq_plainly(stored["qweight"]).T - 8
    expected = codes.double().unflatten(-1, (2, 32)) * scale.double().unsqueeze(-1)
    assert torch.equal(formats.round_trip(weight, scheme, "autoawq").double(), expected.flatten(-2))


def test_autoawq_names_the_weight_whose_scale_leaves_f16() -> None:
    weight = random_weight(16, 64, seed=5)
    weight[3] *= 1e-9
    with pytest.raises(CheckpointError, match=r"a group of layers\.1\.w2 .*underflows F16.*compressed-tensors"):
        formats.compress(weight, parse_scheme("int4-g32"), "autoawq", name="layers.1.w2")
    formats.compress(weight, parse_scheme("int4-g32"), "compressed-tensors")


def test_keep_round_trips_and_is_never_stored() -> None:
    weight = random_weight(8, 8, seed=6, dtype=torch.bfloat16)
    assert torch.equal(formats.round_trip(weight, KEEP), weight.float())
    with pytest.raises(PlanError, match="'keep'"):
        formats.compress(weight, KEEP, "compressed-tensors")


@pytest.mark.parametrize(
    ("name", "fmt", "shape", "message"),
    [
        ("int4-g128", "compressed-tensors", (64, 192), r"groups 128 input columns.*192 of .*; use group size 64,"),
        ("int4-g32", "autoawq", (64, 100), r"groups 32 input columns.*use a channel scheme"),
        (
            "int4-channel",
            "compressed-tensors",
            (64, 100),
            r"packs input columns .* 8 at a time .* 100 of shape .*; use fp8",
        ),
        ("int8-channel", "compressed-tensors", (64, 102), r"packs input columns .* 4 at a time \(32 bits\)"),
        ("int3-channel", "compressed-tensors", (64, 112), r"packs input columns .* 32 at a time \(96 bits\).* 112 of"),
        ("int7-g16", "compressed-tensors", (64, 80), r"packs input columns .* 32 at a time \(224 bits\).* 80 of"),
        ("int6-channel", "compressed-tensors", (64, 104), r"packs input columns .* 16 at a time \(96 bits\).* 104 of"),
        ("int2-channel", "compressed-tensors", (64, 104), r"packs input columns .* 16 at a time \(32 bits\).* 104 of"),
        ("int2-g64", "compressed-tensors", (64, 96), r"groups 64 input columns.*96 of .*; use group size 32,"),
        (
            "int4-g32-asym",
            "compressed-tensors",
            (60, 64),
            r"packs zero points of output rows .* 8 at a time.* 60 of shape",
        ),
        ("int8-g32-asym", "compressed-tensors", (62, 64), r"packs zero points of output rows .* 4 at a time"),
        ("int3-g32-asym", "compressed-tensors", (48, 64), r"packs zero points of output rows .* 32 at a time.* 48 of"),
        ("int4-g32", "autoawq", (60, 64), r"AutoAWQ packs weights and zero points of output rows .* 8 at a time"),
        ("int3-g32", "autoawq", (64, 64), r"'autoawq' holds int4 only, not int3-g32"),
        ("int8-g32", "autoawq", (64, 64), r"'autoawq' holds int4 only, not int8-g32"),
        ("fp8-channel", "fp8", (64, 64), r"'fp8' holds fp8-block"),
        ("int4-g32", "gguf", (64, 64), r"unknown output format 'gguf'"),
        ("int4-g32", "compressed-tensors", (64,), r"needs a shape \[out, in\]"),
        ("fp8-block", "fp8", (0, 64), r"needs a shape \[out, in\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name: str, fmt: str, shape: tuple[int, ...], message: str) -> None:
    for call in (
        lambda: layout.stored_tensors(shape, parse_scheme(name), fmt),
        lambda: formats.compress(torch.ones(shape), parse_scheme(name), fmt),
    ):
        with pytest.raises(PlanError, match=message):
            call()


def test_sizes_that_need_no_padding_are_allowed() -> None:
    for name, fmt, shape in [
        ("int4-g32", "compressed-tensors", (61, 64)),
        ("int3-g32", "compressed-tensors", (61, 96)),
        ("int2-g16-asym", "compressed-tensors", (48, 48)),
        ("int6-g16-asym", "compressed-tensors", (16, 16)),
        ("int4-channel", "autoawq", (64, 100)),
        ("fp8-channel", "compressed-tensors", (3, 5)),
        ("fp8-block", "fp8", (130, 200)),
    ]:
        layout.check_divisible(shape, parse_scheme(name), fmt)


def test_bits_per_weight() -> None:
    shape = (3072, 6144)
    block = 8 + 32 / 128**2
    for name, expected in [
        ("int4-g128", 4.125),
        ("int4-g32", 4.5),
        ("int8-g128", 8.125),
        ("fp8-block", block),
        ("int2-g128-asym", 2 + 18 / 128),
        ("int3-g64", 3.25),
    ]:
        bits = layout.bits_per_weight(shape, parse_scheme(name), "compressed-tensors")
        assert bits == pytest.approx(expected, abs=1e-5)
    assert layout.bits_per_weight(shape, parse_scheme("int4-g128-asym"), "autoawq") == pytest.approx(4 + 20 / 128)


def test_layout_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, m3quant.planning.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_decompress_refuses_what_compress_would_not_have_written() -> None:
    scheme, fmt, shape = parse_scheme("int4-g32-asym"), "compressed-tensors", (16, 64)
    good = formats.compress(random_weight(*shape, seed=7), scheme, fmt)
    for broken, message in [
        ({k: v for k, v in good.items() if k != "weight_zero_point"}, r"w1: 'weight_zero_point' is missing"),
        ({**good, "weight_scale": good["weight_scale"].float()}, r"w1: 'weight_scale' is torch.float32"),
        ({**good, "weight_packed": good["weight_packed"][:, :4]}, r"w1: 'weight_packed' is torch.int32 \[16, 4\]"),
        ({**good, "weight_shape": torch.tensor([64, 16])}, r"w1: 'weight_shape' says \[64, 16\]"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            formats.decompress(broken, scheme, fmt, shape, name="w1")


def test_parameters_that_do_not_fit_the_scheme_are_a_programming_error() -> None:
    weight = random_weight(16, 64, seed=8)
    symmetric, asymmetric = parse_scheme("int4-g32"), parse_scheme("int4-g32-asym")
    scale, zero = formats.qparams(weight, asymmetric, "compressed-tensors")
    assert zero is not None
    for scheme, given_scale, given_zero, message in [
        (symmetric, scale, zero, "has no zero point"),
        (asymmetric, scale, None, "needs a zero point"),
        (asymmetric, None, zero, "without its scale"),
        (symmetric, scale[:, :1], None, "has shape"),
        (symmetric, scale * 0, None, "non-zero and finite"),
        (symmetric, scale * float("nan"), None, "non-zero and finite"),
        (asymmetric, scale, zero.int(), "must be int8"),
    ]:
        with pytest.raises(ValueError, match=message):
            formats.compress(weight, scheme, "compressed-tensors", given_scale, given_zero)
