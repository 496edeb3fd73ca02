"""Chunks of experts side by side on a GPU; run on one as kernel_cases.py is. Without one there is a single lane."""

import threading
from typing import Any

import pytest
import torch

from m3quant.calibration.feedback import mlp
from m3quant.calibration.feedback.quantizer import FeedbackQuantizer
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.layers import Layer
from m3quant.calibration.precision import full_float32, tf32
from m3quant.calibration.quantized_layer import QuantizedLayer
from m3quant.calibration.stream import HiddenStates
from m3quant.schemes import Scheme
from tests.support.calibration.planted import linears, salient, tiny_layer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
INT4, FP8 = Scheme("int", 4, 128), Scheme("fp8", 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["m2", "m3"])
def test_chunks_side_by_side_give_the_bytes_of_one_after_the_other(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, tensors = tiny_layer(family, 1, num_local_experts=8, num_experts_per_tok=2)
    moved = {name: tensor.to(dtype if tensor.dim() > 1 else tensor.dtype) for name, tensor in tensors.items()}
    schemes = {name: INT4 if ".experts." in name else FP8 for name in linears(tensors)}
    monkeypatch.setitem(mlp._CHUNK_BYTES, "cuda", 1)  # an expert each
    source = salient(8, 512, 256).to("cuda", dtype)
    quantized = source + 0.02 * salient(8, 512, 256, seed=1).to("cuda", dtype)

    def run(at_once: int) -> QuantizedLayer:
        monkeypatch.setattr(mlp, "feedback_chunks", lambda *shape: at_once)
        streams = HiddenStates(quantized.clone()), HiddenStates(source.clone())
        layer = Layer(spec, moved, "cuda", dtype)
        return FeedbackQuantizer().quantize(spec, moved, schemes, *streams, FeedbackSettings(), layer=layer)

    alone: Any = run(1)
    for _ in range(3):
        together = run(2)
        for name, weight in alone.weights.items():
            other = together.weights[name]
            assert torch.equal(weight.codes.view(torch.uint8), other.codes.view(torch.uint8)), name
            assert torch.equal(weight.scale, other.scale), name
        assert [together.log[part] for part in ("blocks", "experts")] == [
            alone.log[part] for part in ("blocks", "experts")
        ]


def test_the_switch_of_one_thread_does_not_reach_the_products_of_another() -> None:
    a, b = torch.randn(2, 2, 512, 512, device="cuda").unbind(0)
    wanted, rounded = torch.bmm(a, b), torch.empty(0)
    with tf32():
        rounded = torch.bmm(a, b)
    assert not torch.equal(wanted, rounded)
    over = threading.Event()

    def switch() -> None:
        while not over.is_set():
            with tf32():
                torch.bmm(a, b)

    other = threading.Thread(target=switch)
    other.start()
    try:
        for _ in range(300):
            with full_float32():
                found = torch.bmm(a, b)
            assert torch.equal(found, wanted)
    finally:
        over.set()
        other.join()
