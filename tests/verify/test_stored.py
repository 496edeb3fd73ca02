"""NaN, Inf and zero scales found by bit patterns, against torch's own words for them."""

from __future__ import annotations

import pytest
import torch

from m3quant.checkpoint import Checkpoint, TensorInfo
from m3quant.checkpoint.reader import bytes_view, torch_dtype
from m3quant.verify import stored
from m3quant.verify.stored import stored_problems

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ")


class Bytes(Checkpoint):
    """A checkpoint of one tensor, in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.data = bytes_view(tensor)

    def peek(self, ranges) -> None:  # type: ignore[no-untyped-def]
        for info, first, view in ranges:
            view[:] = self.data[info.start + first : info.start + first + view.nbytes]


def problems(tensor: torch.Tensor, dtype: str, name: str = "a.weight", dead_allowed: bool = False) -> list[str]:
    size = tensor.numel() * tensor.element_size()
    info = TensorInfo(name=name, dtype=dtype, shape=tuple(tensor.shape), shard="s", start=0, end=size)
    return list(stored_problems(Bytes(tensor), info, dead_allowed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_of_bits_is_judged_as_torch_judges_it(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torch_dtype(dtype)
    if kind.itemsize == 1:
        values = torch.arange(256, dtype=torch.uint8).view(kind)
    elif kind.itemsize == 2:
        values = torch.arange(-(2**15), 2**15, 7).to(torch.int16).view(kind)
    else:
        values = torch.cat([torch.randn(500), torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])]).to(kind)
    monkeypatch.setattr(stored, "PIECE_BYTES", 4096)  # several pieces
    finite = torch.isfinite(values.double())
    assert finite.any() and not finite.all()
    assert problems(values[finite].contiguous(), dtype) == []
    for odd in torch.unique(torch.nonzero(~finite)[:40]):
        tensor = values[finite].contiguous().clone()
        tensor[int(odd) % len(tensor)] = values[odd]
        assert len(problems(tensor, dtype)) == 1, values[odd]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_zero_is_a_fault_of_scales_alone(dtype: str) -> None:
    values = torch.rand(64).to(torch_dtype(dtype)) + 1
    for zero in (0.0, -0.0):
        values[37] = zero
        assert problems(values, dtype) == []
        assert problems(values, dtype, "a.weight_scale") == ["scale 'a.weight_scale' holds a zero"]


def test_only_minus_infinity_stands_for_a_dead_expert() -> None:
    bias = torch.tensor([0.5, -float("inf"), 1.0])
    assert problems(bias, "F32", dead_allowed=True) == [] and problems(bias, "F32") != []
    for odd in (float("inf"), float("nan")):
        bias[1] = odd
        assert problems(bias, "F32", dead_allowed=True) == ["tensor 'a.weight' holds NaN or Inf"]
