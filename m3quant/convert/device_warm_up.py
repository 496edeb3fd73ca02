"""What a GPU run would else do before its first search: compile kernels, pin host memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..calibration.ops import grouped_linear
from ..calibration.spec import LayerSpec
from ..plan import Unit

PIECE_BYTES = 32 * 2**20  # torch pins whole powers of two; what `expert_stacks` copies at once fits one of these


class WarmUp:
    """Runs beside the read of the first layer; close waits for it. What fails here fails again, in words, in the search."""

    def __init__(self, units: Sequence[Unit], spec: LayerSpec | None, device: torch.device) -> None:
        """units: layers to come; spec: of the first, None to do nothing."""
        self.units, self.device = units, device
        self._thread = threading.Thread(target=self._run, args=(spec,), name="warm-up", daemon=True) if spec else None
        if self._thread:
            self._thread.start()

    def close(self) -> None:
        if self._thread:
            self._thread.join()

    def _run(self, spec: LayerSpec) -> None:
        from ..calibration.kernels import warm_up

        with torch.cuda.device(self.device):
            self._pin(max(unit.bytes_out for unit in self.units))
            self._touch(spec)
            schemes = {t.scheme for unit in self.units for t in unit.tensors if t.scheme.kind == "int"}
            warm_up(sorted(schemes, key=str), self.device)

    def _touch(self, spec: LayerSpec) -> None:
        """Run one small product and attention of each kind: CUDA loads a library's code when it is first used."""
        new: dict[str, Any] = {"dtype": torch.bfloat16, "device": self.device}
        counts = torch.tensor([8, 8], device=self.device)
        grouped_linear(torch.zeros(16, 128, **new), torch.zeros(2, 128, 128, **new), counts)
        q = torch.zeros(1, spec.num_heads, 128, spec.head_dim, **new)
        kv = torch.zeros(1, spec.num_kv_heads, 128, spec.head_dim, **new)
        F.scaled_dot_product_attention(q, kv, kv, is_causal=True, enable_gqa=True)
        wide = torch.zeros(2, 128, 128, device=self.device)
        torch.bmm(wide, wide)

    @staticmethod
    def _pin(size: int) -> None:
        """Pin and free host memory for `size` bytes of packed experts: torch keeps it and hands it out again."""
        held = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(size // PIECE_BYTES + 1)]
        del held
