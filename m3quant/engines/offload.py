"""Host memory for weights and cache, as an engine is asked for it."""

from __future__ import annotations

from dataclasses import dataclass

from .device import Gpu


@dataclass(frozen=True)
class Offload:
    """cache: bytes of all ranks; weights: of each rank's routed experts. stored: (last part of the name, dtype) of the tensors that hold
    them; narrow: whether integers of other widths than 4 and 8 bits are among the weights. release: of the engine installed, None for
    the newest that was read."""

    cache: int
    weights: int
    stored: frozenset[tuple[str, str]]
    narrow: bool
    gpu: Gpu
    release: str | None
