"""Triton's kernels and the GPU stage against their reference, bit for bit; run as a program by test_fused.py.

    python kernel_check.py interpreter     in Triton's interpreter, on the CPU
    python kernel_check.py cuda            on a GPU, real widths too

Prints one line a case and ends with 1 if any byte differs or a refusal is missing.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any
from unittest import mock

ON_GPU = sys.argv[1] == "cuda"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from m3quant.checkpoint import TensorInfo  # noqa: E402
from m3quant.convert import batches, gpu_stage  # noqa: E402
from m3quant.errors import CheckpointError  # noqa: E402
from m3quant.families import Role  # noqa: E402
from m3quant.plan import OutputTensor, PlannedTensor  # noqa: E402
from m3quant.quant.formats import compress  # noqa: E402
from m3quant.quant.layout import stored_tensors  # noqa: E402
from m3quant.schemes import parse_scheme  # noqa: E402
from m3quant.source import PLAIN, SourceTensor  # noqa: E402

SCHEMES = {
    "fp8-channel": "compressed-tensors", "fp8-block": "fp8", "int4-g128": "compressed-tensors",
    "int4-g32": "compressed-tensors", "int8-g64": "compressed-tensors", "int4-channel": "compressed-tensors",
}  # fmt: skip
SMALL = [(40, 256), (136, 384), (4, 128)]  # every size keeps outputs aligned, as plans do
REAL = [(1536, 3072), (3072, 1536), (3072, 6144), (6144, 3072), (128, 12288), (200, 24576)]


def hard_weight(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Random rows of every magnitude, with zeros, subnormals, ties and values near the largest."""
    weight = torch.randn(shape, generator=generator) * torch.exp2(
        torch.randint(-20, 20, (shape[0], 1), generator=generator).float()
    )
    if shape[0] > 8:
        weight[0] = 0
        weight[1, :16] = 0
        weight[2] *= 2.0**-120
        weight[3] = 2.0**-133
        weight[4] = torch.randint(-448, 449, (shape[1],), generator=generator).float()
        weight[4, 0] = 448
        weight[5] = torch.randint(-15, 16, (shape[1],), generator=generator).float() / 2
        weight[5, ::32] = 7.5
        weight[6] *= 1e30
    return weight.bfloat16()


def planned(name: str, shape: tuple[int, int], scheme_name: str, fmt: str) -> PlannedTensor:
    scheme = parse_scheme(scheme_name)
    info = TensorInfo(f"{name}.weight", "BF16", shape, "s", 0, shape[0] * shape[1] * 2)
    outputs = tuple(
        OutputTensor(f"{name}.{k}", code, dims) for k, (code, dims) in stored_tensors(shape, scheme, fmt).items()
    )
    return PlannedTensor(SourceTensor(info, PLAIN, None), Role("routed_experts"), "quantize", scheme, "", outputs)


def laid_out(weights: list[tuple[PlannedTensor, torch.Tensor]], pinned: bool) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Places, the read buffer and a poisoned write buffer, as the pipeline makes them."""
    places, staged, output = [], 0, 24
    for tensor, weight in weights:
        item = batches.Item(tensor, batches.FUSED, tensor.source.info, 0, weight.nbytes, tensor.outputs)
        places.append((item, staged, output))
        staged += batches.aligned(item.bytes_in)
        output += item.bytes_out
    source = torch.full((staged,), 99, dtype=torch.uint8, pin_memory=pinned)
    for (item, start, _), (_, weight) in zip(places, weights, strict=True):
        source[start : start + item.bytes_in] = weight.view(torch.uint8).view(-1)
    return places, source, torch.full((output + 64,), 77, dtype=torch.uint8, pin_memory=pinned)


def check(
    stage: gpu_stage.GpuStage, scheme_name: str, fmt: str, shapes: list[tuple[int, int]], generator: torch.Generator
) -> bool:
    """One batch of every shape, twice each and interleaved; every output byte against the reference on the CPU."""
    weights = []
    for number, shape in enumerate([*shapes, *shapes]):
        weights.append((planned(f"w{number}", shape, scheme_name, fmt), hard_weight(shape, generator)))
    places, source, buffer = laid_out(weights, ON_GPU)
    stage.round(places, source, buffer, fmt)
    good = bool((buffer[:24] == 77).all()) and bool((buffer[-64:] == 77).all())
    for (item, _, output), (tensor, weight) in zip(places, weights, strict=True):
        expected = compress(weight, tensor.scheme, fmt)
        for suffix, view in batches.output_views(item, buffer, output).items():
            same = torch.equal(view.contiguous().view(torch.uint8), expected[suffix].contiguous().view(torch.uint8))
            if not same:
                print(f"{scheme_name} {item.stored.shape} {suffix}: bytes differ")
            good &= same
    for value in (float("nan"), float("inf"), float("-inf")):
        bad = weights[1][1].clone()
        bad[-1, -1] = value
        places, source, buffer = laid_out([weights[0], (weights[1][0], bad), weights[2]], ON_GPU)
        try:
            stage.round(places, source, buffer, fmt)
            print(f"{scheme_name}: {value} was not refused")
            good = False
        except CheckpointError as error:
            good &= "w1.weight: 1 of" in str(error)
    print(f"{scheme_name} in {fmt}, {len(weights)} weights: {'same bytes' if good else 'DIFFERS'}", flush=True)
    return good


@contextlib.contextmanager
def no_gpu_needed() -> Any:
    """Streams and devices that do nothing, for the interpreter."""
    nothing = lambda *_: contextlib.nullcontext()  # noqa: E731
    with mock.patch.multiple(torch.cuda, Stream=lambda *_: mock.Mock(), device=nothing, stream=nothing):
        yield


def main() -> None:
    device = torch.device("cuda" if ON_GPU else "cpu")
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))
    with contextlib.nullcontext() if ON_GPU else no_gpu_needed():
        stage = gpu_stage.GpuStage(device)
        reason = gpu_stage.why_plain(device)
        if reason:
            raise SystemExit(f"Triton does not run here: {reason}")
        shapes = [*SMALL, *REAL] if ON_GPU else SMALL
        good = [check(stage, name, fmt, shapes, generator) for name, fmt in SCHEMES.items()]
        if not all(good):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
