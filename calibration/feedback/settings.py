"""What a user may set about the feedback quantizer, and what each number means."""

from dataclasses import dataclass

import torch

from m3quant.calibration.experts import DEFAULT_MIN_EXPERT_TOKENS
from m3quant.calibration.ranks import ALONE, Ranks


@dataclass(frozen=True)
class FeedbackSettings:
    """Settings of `quantizer.FeedbackQuantizer`.

    source_targets: aim at the source stream's outputs, so that earlier layers' errors are compensated as far as they can
    be; else at the unrounded weight's own. residual: let o_proj and the down-projections compensate the residual
    stream's error too. rounds: of descent and refit after the first sweep; None: `planning.quantizers.feedback_rounds`. refit: whether scales are refitted.
    min_expert_tokens, strict_coverage: as in AwqSettings. batch_tokens: tokens per forward pass. scale_dtype: dtype in
    which integer scales will be stored. ranks: processes that quantize together, each a part of the experts.
    """

    source_targets: bool = True
    residual: bool = True
    rounds: int | None = None
    refit: bool = True
    signed_scales: bool = True
    min_expert_tokens: int = DEFAULT_MIN_EXPERT_TOKENS
    strict_coverage: bool = False
    batch_tokens: int = 8192
    scale_dtype: torch.dtype = torch.bfloat16
    ranks: Ranks = ALONE
