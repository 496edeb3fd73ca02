"""Triton's kernels and the GPU stage against their reference, bit for bit; run as a program by test_fused.py.

    python -m tests.support.quant.kernel_check interpreter     in Triton's interpreter, on the CPU
    python -m tests.support.quant.kernel_check cuda            on a GPU, real widths too

Prints one line a case and ends with 1 if any byte differs or a refusal is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import sys
from typing import Any
from unittest import mock

ON_GPU = sys.argv[1] == "cuda"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from m3quant.checkpoint import TensorInfo, torch_dtype  # noqa: E402
from m3quant.convert import gpu_stage  # noqa: E402
from m3quant.errors import CheckpointError  # noqa: E402
from m3quant.families import Role  # noqa: E402
from m3quant.planning import batches  # noqa: E402
from m3quant.planning.layout import stored_tensors  # noqa: E402
from m3quant.planning.source_layouts import FOUR_BIT, SourceTensor, stored_parts  # noqa: E402
from m3quant.planning.unit import OutputTensor, PlannedTensor  # noqa: E402
from m3quant.quant.formats import compress  # noqa: E402
from m3quant.quant.reading import densify  # noqa: E402
from m3quant.schemes import KEEP, parse_scheme  # noqa: E402

Parts = tuple[torch.Tensor, ...]  # a BF16 weight, or codes and scale
# Scheme, or None for BF16; format; kind of a quantized source and dtype of its scales, or None for a BF16 source.
CASES: list[tuple[str | None, str, str | None]] = [
    ("fp8-channel", "compressed-tensors", None), ("fp8-block", "fp8", None), ("int4-g128", "compressed-tensors", None),
    ("int4-g32", "compressed-tensors", None), ("int8-g64", "compressed-tensors", None), ("int4-channel", "compressed-tensors", None),
    (None, "compressed-tensors", "fp8-block F32"), (None, "compressed-tensors", "fp8-block BF16"), (None, "compressed-tensors", "mxfp8 U8"),
    ("int4-g128", "compressed-tensors", "fp8-block F32"), ("int4-channel", "compressed-tensors", "fp8-block BF16"), ("fp8-channel", "compressed-tensors", "mxfp8 U8"),
    (None, "compressed-tensors", "nvfp4 F8_E4M3"), ("int4-g128", "compressed-tensors", "nvfp4-packed F8_E4M3"),
    (None, "compressed-tensors", "mxfp4 U8"), ("fp8-channel", "compressed-tensors", "mxfp4 F8_E8M0"),
    (None, "compressed-tensors", "fp8-channel BF16"), ("int4-g32", "compressed-tensors", "fp8-tensor F32"),
    ("int2-g128-asym", "compressed-tensors", None), ("int3-g128-asym", "compressed-tensors", None), ("int3-g32", "compressed-tensors", None),
    ("int5-g64-asym", "compressed-tensors", None), ("int6-g16-asym", "compressed-tensors", None), ("int3-g16-asym", "compressed-tensors", None),
]  # fmt: skip
SMALL = [(40, 256), (136, 384), (4, 128)]  # every size keeps outputs aligned, as plans do
PACKED_ROWS = [(32, 256), (64, 256)]  # whose rows fill whole words of zero points at any width
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


def hard_codes(shape: tuple[int, int], stored: str, generator: torch.Generator) -> Parts:
    """Every code that is no NaN, and scales of every magnitude, negative ones too where the format has them."""
    found = []
    for name, dtype, dims in stored_of(stored, "w", shape):
        if dtype in ("U8", "F8_E8M0"):
            most = 240 if "scale" in name else 256
            found.append(torch.randint(0, most, dims, generator=generator).to(torch.uint8))
        elif dtype == "F8_E4M3":
            codes = torch.randint(0, 256, dims, generator=generator).to(torch.uint8)
            found.append(torch.where(codes & 0x7F == 0x7F, codes - 1, codes).view(torch.float8_e4m3fn))
        else:
            low, high = (-20, 20) if "weight_scale_2" in name or "global" in name else (-110, 100)
            scale = torch.randn(dims, generator=generator) * torch.exp2(
                torch.randint(low, high, dims, generator=generator)
            )
            found.append((scale.abs() + 1e-30 if low == -20 else scale).to(torch_dtype(dtype)))
    return tuple(found)


def stored_of(stored: str, name: str, shape: tuple[int, int]) -> list[tuple[str, str, tuple[int, ...]]]:
    """What is stored of a weight, without what is of activations."""
    kind, scale = stored.split()
    return [part for part in stored_parts(kind, f"{name}.weight", shape, scale) if ".input_" not in part[0]]


def planned(name: str, shape: tuple[int, int], scheme_name: str | None, fmt: str, stored: str | None) -> PlannedTensor:
    """scheme_name: None for a tensor that only becomes BF16. stored: how a quantized source has it, None for a BF16 one."""
    scheme = parse_scheme(scheme_name) if scheme_name else KEEP
    made = stored_tensors(shape, scheme, fmt) if scheme_name else {"weight": ("BF16", shape)}
    outputs = tuple(OutputTensor(f"{name}.{k}", code, dims) for k, (code, dims) in made.items())
    source = SourceTensor(TensorInfo(f"{name}.weight", "BF16", shape, "s", 0, shape[0] * shape[1] * 2))
    if stored:
        source = SourceTensor(source.info, stored.split()[0], *map(info_of, stored_of(stored, name, shape)[1:]))
        source = dataclasses.replace(source, info=info_of(stored_of(stored, name, shape)[0]))
    action = "quantize" if scheme_name else "dequantize"
    return PlannedTensor(source, Role("routed_experts"), action, scheme, "", outputs)


def info_of(part: tuple[str, str, tuple[int, ...]]) -> TensorInfo:
    name, dtype, dims = part
    return TensorInfo(name, dtype, dims, "s", 0, math.prod(dims) * torch_dtype(dtype).itemsize)


def laid_out(weights: list[tuple[PlannedTensor, Parts]], pinned: bool) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Places, the read buffer and a poisoned write buffer, as the pipeline makes them."""
    places, staged, output = [], 0, 24
    for tensor, _ in weights:
        item = batches.Item(tensor, batches.FUSED, tensor.source.info, 0, tensor.source.info.nbytes, tensor.outputs)
        places.append((item, staged, output))
        staged += item.staged_bytes
        output += item.bytes_out
    source = torch.full((staged,), 99, dtype=torch.uint8, pin_memory=pinned)
    for (item, start, _), (_, parts) in zip(places, weights, strict=True):
        for view, part in zip(batches.staged_parts(item, source, start).values(), parts, strict=True):
            view.copy_(part)
    return places, source, torch.full((output + 64,), 77, dtype=torch.uint8, pin_memory=pinned)


def expected_of(tensor: PlannedTensor, parts: Parts, fmt: str) -> dict[str, torch.Tensor]:
    dense = densify(tensor.source, dict(zip(tensor.source.names, parts, strict=True)))
    return compress(dense, tensor.scheme, fmt) if tensor.action == "quantize" else {"weight": dense}


def spoiled(parts: Parts, value: float, stored: str | None) -> Parts:
    """The last value NaN or Inf; codes of FP8 have a NaN alone and codes of FP4 neither, so that it stands in a scale."""
    found = [part.clone() for part in parts]
    kind = stored.split()[0] if stored else ""
    if not stored:
        found[0][-1, -1] = value
    elif value != value and kind not in FOUR_BIT:
        found[0].view(torch.uint8)[-1, -1] = 0xFF
    elif value != value and kind != "mxfp4":
        found[1].view(torch.uint8)[-1, -1] = 0x7F
    elif found[-1].dtype == torch.uint8:
        found[-1][-1, -1] = 255
    else:
        found[-1].view(-1)[-1] = value
    return tuple(found)


def check(
    stage: gpu_stage.GpuStage,
    scheme_name: str | None,
    fmt: str,
    stored: str | None,
    shapes: list[tuple[int, int]],
    generator: torch.Generator,
) -> bool:
    """One batch of every shape, twice each and interleaved; every output byte against the reference on the CPU."""
    weights: list[tuple[PlannedTensor, Parts]] = []
    for number, shape in enumerate([*shapes, *shapes]):
        parts = hard_codes(shape, stored, generator) if stored else (hard_weight(shape, generator),)
        weights.append((planned(f"w{number}", shape, scheme_name, fmt, stored), parts))
    places, source, buffer = laid_out(weights, ON_GPU)
    stage.round(places, source, buffer, fmt)
    what = f"{stored or 'BF16'} to {scheme_name or 'BF16'} in {fmt}"
    good = bool((buffer[:24] == 77).all()) and bool((buffer[-64:] == 77).all())
    for (item, _, output), (tensor, parts) in zip(places, weights, strict=True):
        expected = expected_of(tensor, parts, fmt)
        for suffix, view in batches.output_views(item, buffer, output).items():
            same = torch.equal(view.contiguous().view(torch.uint8), expected[suffix].contiguous().view(torch.uint8))
            if not same:
                print(f"{what} {item.shape} {suffix}: bytes differ")
            good &= same
    for value in (float("nan"), float("inf"), float("-inf")):
        bad = spoiled(weights[1][1], value, stored)
        places, source, buffer = laid_out([weights[0], (weights[1][0], bad), weights[2]], ON_GPU)
        try:
            stage.round(places, source, buffer, fmt)
            print(f"{what}: {value} was not refused")
            good = False
        except CheckpointError as error:
            named = re.search(r"w1\.weight(_packed)?(: 1 | is -?inf,)", str(error)) is not None
            good &= named
            if not named:
                print(f"{what}: {value}: {error}")
    print(f"{what}, {len(weights)} weights: {'same bytes' if good else 'DIFFERS'}", flush=True)
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
        wide = [*PACKED_ROWS, *(shape for shape in REAL if ON_GPU and shape[0] % 32 == 0)]
        usual = ("int4", "int8", "fp8", "None")
        good = []
        for case in CASES:
            some = shapes if str(case[0]).startswith(usual) else wide
            seldom = not ON_GPU and str(case[2]).startswith(("nvfp4", "mxfp4", "fp8-channel", "fp8-tensor"))
            good.append(check(stage, *case, [some[0], some[-1]] if seldom else some, generator))
        if not all(good):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
