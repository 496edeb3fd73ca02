"""The layer quantizers by the name that a recipe gives under `rounding`."""

from __future__ import annotations

from typing import Any

import torch

from m3quant.calibration.awq_quantizer import AwqQuantizer
from m3quant.calibration.awq_settings import AwqSettings
from m3quant.calibration.feedback.quantizer import FeedbackQuantizer
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.quantized_layer import LayerQuantizer
from m3quant.calibration.ranks import Ranks
from m3quant.recipe.recipe import Recipe


def layer_quantizer(
    recipe: Recipe, scale_dtype: torch.dtype, strict_coverage: bool, ranks: Ranks
) -> tuple[LayerQuantizer[Any], Any]:
    """The recipe's quantizer and its settings. scale_dtype: in which integer scales are stored.

    strict_coverage: fail instead of topping starved experts up. ranks: the processes that quantize together.
    """
    data = recipe.data
    if recipe.rounding == "feedback":
        return FeedbackQuantizer(), FeedbackSettings(
            **recipe.feedback.model_dump(),
            min_expert_tokens=data.min_expert_tokens,
            strict_coverage=strict_coverage,
            scale_dtype=scale_dtype,
            ranks=ranks,
        )
    return AwqQuantizer(), AwqSettings(
        **recipe.awq.model_dump(),
        min_expert_tokens=data.min_expert_tokens,
        strict_coverage=strict_coverage,
        scale_dtype=scale_dtype,
        seed=data.seed,
        ranks=ranks,
    )
