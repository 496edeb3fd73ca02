"""One-pass rounding writes the bytes of `formats.compress`, on the CPU and, in Triton's interpreter, by the GPU's kernels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from m3quant.errors import CheckpointError
from m3quant.planning.layout import FORMATS, one_pass, stored_tensors
from m3quant.quant import fused
from m3quant.quant.formats import TORCH_DTYPES, compress
from m3quant.quant.fused import compress_into
from m3quant.schemes import parse_scheme
from tests.support.paths import ROOT

CASES = [
    ("fp8-channel", "compressed-tensors"), ("fp8-block", "compressed-tensors"), ("fp8-block", "fp8"),
    ("int4-g128", "compressed-tensors"), ("int4-g32", "compressed-tensors"), ("int4-channel", "compressed-tensors"),
    ("int8-g64", "compressed-tensors"), ("int8-channel", "compressed-tensors"),
    *((f"int{bits}-g{size}", "compressed-tensors") for bits, size in ((2, 128), (3, 32), (5, 64), (6, 128), (7, 16))),
    *((f"int{bits}-g{size}-asym", "compressed-tensors") for bits, size in ((2, 64), (3, 128), (4, 32), (5, 16), (6, 128), (7, 32), (8, 64))),
    ("int3-channel", "compressed-tensors"), ("int5-channel-asym", "compressed-tensors"),
]  # fmt: skip
SHAPES = [(300, 384), (1, 128), (129, 1152)]
PACKED_ROWS = [(320, 384), (32, 128), (160, 1152)]  # whose rows fill whole words of zero points at any width


def poisoned(shape: tuple[int, int], scheme: str, fmt: str) -> dict[str, torch.Tensor]:
    stored = stored_tensors(shape, parse_scheme(scheme), fmt)
    return {
        suffix: torch.full((torch.empty(dims, dtype=TORCH_DTYPES[code]).nbytes,), 0x5A, dtype=torch.uint8)
        .view(TORCH_DTYPES[code])
        .view(dims)
        for suffix, (code, dims) in stored.items()
    }


def hard(shape: tuple[int, int]) -> torch.Tensor:
    """Fresh random rows of every magnitude, zeros, subnormals and ties among them."""
    weight = torch.randn(shape) * torch.exp2(torch.randint(-30, 30, (shape[0], 1)).float())
    if shape[0] > 8:
        weight[0], weight[1, :64], weight[3] = 0, 0, 2.0**-133
        weight[2] *= 2.0**-115
        weight[4] = torch.randint(-448, 449, (shape[1],)).float()
        weight[5] = torch.randint(-15, 16, (shape[1],)).float() / 2
        weight[5, ::32] = 7.5
        weight[6] = 1.5e38
    return weight.bfloat16()


@pytest.mark.parametrize(("scheme", "fmt"), CASES)
@pytest.mark.parametrize("block", [1, 1 << 10, fused.BLOCK_ELEMENTS])
def test_the_bytes_are_those_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, scheme: str, fmt: str, block: int
) -> None:
    monkeypatch.setattr(fused, "BLOCK_ELEMENTS", block)
    assert one_pass(parse_scheme(scheme), fmt)
    for shape in PACKED_ROWS if scheme.endswith("-asym") else SHAPES:
        weight, out = hard(shape), poisoned(shape, scheme, fmt)
        compress_into(weight, parse_scheme(scheme), fmt, out)
        for suffix, expected in compress(weight, parse_scheme(scheme), fmt).items():
            found = out[suffix].contiguous().view(torch.uint8)
            assert torch.equal(found, expected.contiguous().view(torch.uint8)), (shape, suffix)


@pytest.mark.parametrize(("scheme", "fmt"), CASES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_by_name(scheme: str, fmt: str, value: float) -> None:
    weight = torch.randn(256, 256).bfloat16()
    weight[200, 130] = weight[3, 3] = value
    with pytest.raises(CheckpointError, match=r"NaN/Inf in layer\.w: 2 of 65536"):
        compress_into(weight, parse_scheme(scheme), fmt, poisoned((256, 256), scheme, fmt), name="layer.w")


@pytest.mark.parametrize("name", ["int4-g128", "int3-g128", "int2-g128-asym"])
def test_a_range_beyond_float32_is_refused_as_by_the_reference(name: str) -> None:
    weight = torch.full((32, 128), 3e38).bfloat16()
    weight[:, 0] *= -1
    for call in (
        lambda: compress(weight, parse_scheme(name), "compressed-tensors"),
        lambda: compress_into(
            weight, parse_scheme(name), "compressed-tensors", poisoned((32, 128), name, "compressed-tensors")
        ),
    ):
        with pytest.raises(CheckpointError, match="exceeds float32"):
            call()


def test_what_has_no_one_pass_form_says_so() -> None:
    assert one_pass(parse_scheme("int3-g128-asym"), "compressed-tensors")
    assert not any(one_pass(parse_scheme("int4-g128"), fmt) for fmt in FORMATS if fmt != "compressed-tensors")


def kernel_check(where: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.support.quant.kernel_check", where]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, whose interpreter runs on a CPU")
def test_the_gpu_stage_writes_the_same_bytes_in_tritons_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when the kernels are defined."""
    done = kernel_check("interpreter")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("same bytes") == 24


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_stage_writes_the_same_bytes_on_a_gpu() -> None:
    done = kernel_check("cuda")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
