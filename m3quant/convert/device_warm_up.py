"""What a GPU run would otherwise do before its first search: compile kernels, pin host memory."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..calibration.layers import Layer
from ..calibration.spec import LayerSpec, layer_shapes
from ..planning.unit import Unit

PIECE_BYTES = 32 * 2**20  # torch pins whole powers of two; what `expert_stacks` copies at once fits one of these
PAUSE_SECONDS = 0.003  # enough for the copies of two buffers; pinning a piece takes 15 ms
TOKENS = 128


class WarmUp:
    """Runs during the read of the first layer; close waits for it. What fails here fails again in the search, with a message."""

    def __init__(
        self, units: Sequence[Unit], spec: LayerSpec | None, device: torch.device, stream_bytes: int = 0
    ) -> None:
        """units: layers to come; spec: of the first, None to do nothing. stream_bytes: of one stream, copied to the host
        after every layer; 0 if it is not."""
        self.units, self.device, self.stream_bytes = units, device, stream_bytes
        self._thread = (
            threading.Thread(target=self._quietly, args=(spec,), name="warm-up", daemon=True) if spec else None
        )
        if self._thread:
            self._thread.start()

    def close(self) -> None:
        if self._thread:
            self._thread.join()

    def _quietly(self, spec: LayerSpec) -> None:
        with contextlib.suppress(Exception):  # or the thread would end in a traceback on stderr
            self._run(spec)

    def _run(self, spec: LayerSpec) -> None:
        from ..calibration.kernels import warm_up

        with torch.cuda.device(self.device):
            pass_once(spec, self.device)
            wide = torch.zeros(2, 128, 128, device=self.device)
            torch.bmm(wide, wide)
            schemes = {t.scheme for unit in self.units for t in unit.tensors if t.scheme.kind == "int"}
            warm_up(sorted(schemes, key=str), self.device)
            largest = max(unit.bytes_out for unit in self.units)
            self._pin([PIECE_BYTES] * (largest // PIECE_BYTES + 1) + [self.stream_bytes] * 2)

    @staticmethod
    def _pin(sizes: Sequence[int]) -> None:
        """Pin and free host memory of these sizes: torch keeps it and hands it out again.

        While the driver pins, every copy to the GPU waits, those of the layer being read too; hence the pauses, and hence
        last: the packed layer needs it only after its search.
        """
        held = []
        for size in filter(None, sizes):
            held.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))
            time.sleep(PAUSE_SECONDS)
        del held


def pass_once(spec: LayerSpec, device: torch.device) -> torch.Tensor:
    """A short window of zeros through a layer like this one with few experts: CUDA loads code when it is first used.

    Returns the output, [1, TOKENS, H].
    """
    if spec.moe is not None:
        spec = replace(spec, moe=replace(spec.moe, num_experts=spec.moe.top_k))
    weights = {
        name: torch.zeros(shape, dtype=torch.bfloat16, device=device) for name, shape in layer_shapes(spec).items()
    }
    window = torch.zeros(1, TOKENS, spec.hidden_size, dtype=torch.bfloat16, device=device)
    return Layer(spec, weights, device, torch.bfloat16).forward(window)
