"""Which parts of a checkpoint are computed as an engine computes them: rounded activations, an FP8 KV cache, FP8 index keys.

This applies to the checkpoint only. The source is the reference, with weights as stored and nothing else rounded, also if it is
itself an FP8 release whose engine rounds activations. Given as the checkpoint, such a release is computed as it is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..artifact.eval_record import Computed
from ..calibration.inputs import cache_scales
from ..calibration.layers import Layer
from ..engines.stated import stated_cache
from ..errors import EvaluationError
from ..schemes import NOT_ROUNDED, rounded_activations
from .choices import ENGINE

if TYPE_CHECKING:
    from .models import Model


@dataclass(frozen=True)
class Arithmetic:
    """What of the checkpoint's stream is rounded. activations: one of `choices.ACTIVATIONS`; kv, index: whether to E4M3."""

    activations: str = ENGINE
    kv: bool = False
    index: bool = False

    @classmethod
    def of(cls, model: Model, activations: str, kv_dtype: str, index_dtype: str) -> Arithmetic:
        """kv_dtype 'auto' is FP8 where config.json states such a cache. Raises EvaluationError for what is not computed."""
        index = index_dtype == "fp8"
        if index and not any(spec.sparse for spec in model.family.layers):
            raise EvaluationError(
                f"{model.where} has no index keys, which only sparse attention has: leave --index-dtype out."
            )
        kv = kv_dtype == "fp8" or (kv_dtype == "auto" and _states_fp8_cache(model))
        return cls(activations, kv, index)

    def apply(self, layer: Layer, model: Model) -> Layer:
        """The layer of this model, from now on computed so. Raises CalibrationError for cache scales of a wrong shape."""
        if self.activations == ENGINE:
            layer.round_activations(model.schemes(layer.spec.index))
        if self.kv or self.index:
            layer.round_cache(self.kv, self.index)
        return layer

    def record(self, model: Model, dtype: torch.dtype) -> Computed:
        """What eval.json says of it."""
        schemes = (scheme for layer in range(model.family.num_layers) for scheme in model.schemes(layer).values())
        return Computed(
            dtype=str(dtype).removeprefix("torch."),
            activations="engine" if self.activations == ENGINE else "exact",
            rounding=rounded_activations(schemes) if self.activations == ENGINE else NOT_ROUNDED,
            kv_dtype="fp8" if self.kv else None,
            kv_scales=("stored" if self._has_scales(model) else "1.0") if self.kv else None,
            index_dtype="fp8" if self.index else None,
        )

    def _has_scales(self, model: Model) -> bool:
        for layer, spec in enumerate(model.family.layers):
            prefix = model.family.layer_prefix(layer)
            names = [name for name in model.layer_names(layer) if name.endswith("_scale")]
            tensors = {n.removeprefix(prefix): t for n, t in model.reader.read_many(names).items()}
            if cache_scales(spec, tensors):
                return True
        return False


def _states_fp8_cache(model: Model) -> bool:
    """Whether config.json asks an engine for an FP8 KV cache. Raises EvaluationError for another quantized one."""
    stated = stated_cache(model.config)
    if stated not in (None, "fp8"):
        raise EvaluationError(
            f"{model.where}/config.json states a KV cache in {stated[:80]}, which m3quant does not compute: give --kv-dtype bf16 or fp8."
        )
    return stated == "fp8"
